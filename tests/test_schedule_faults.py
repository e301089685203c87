"""What is wrong with a schedule is said: each fault has a message of its own. And what a plan says of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, ROOT, invocation, run_here, tiny_flags, tiny_llama

from toolkit.config.recipe import build_config, dump, read_recipe
from toolkit.config.schema import MaskConfig, RunConfig
from toolkit.engine.deepspeed.config import resolve_ds_config
from toolkit.mask.schedule import build_schedule
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.planning.engine_memory import OtherPhases
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.meta_model import MetaModel, meta_model
from toolkit.planning.phase_plans import combine_plans, phase_planners
from toolkit.planning.table import as_dict, as_text
from toolkit.planning.workload import Workload
from toolkit.runtime.errors import ConfigError, MaskError

HEAD = {"train": ["head"], "until_epoch": 1}
TWO = {"train": ["last:2", "head"], "until_epoch": 2}


def schedule(*phases: dict[str, Any], train: list[str] | None = None, tied: str = "untie") -> Any:
    """Resolved on a tied Llama of 6 blocks, 10 steps an epoch, 3 epochs."""
    config = MaskConfig.model_validate({"train": train or ["last:4", "head"], "schedule": phases, "tied": tied})
    return build_schedule(config, detect_anatomy(tiny_llama()), 10, 30)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"train": ["head"]}], r"mask\.schedule\.0: it has neither until_epoch nor until_step"),
        ([{**HEAD, "until_step": 4}], r"mask\.schedule\.0: it has until_epoch 1 and until_step 4; a phase ends once"),
        ([TWO, HEAD], r"mask\.schedule\.1 ends with epoch 1, the phase before it with epoch 2; expected each phase"),
        ([HEAD, {**TWO, "until_epoch": 1}], r"mask\.schedule\.1 ends with epoch 1, the phase before it with epoch 1"),
        ([{**HEAD, "until_epoch": 0}], r"mask\.schedule\.0\.until_epoch is 0; expected greater than or equal to 1"),
        ([{**HEAD, "train": []}], r"mask\.schedule\.0\.train is \[\]; expected Value should have at least 1 item"),
        ([{"until_epoch": 1}], r"mask\.schedule\.0\.train"),
        ([{**HEAD, "until_epochs": 2}], r"until_epochs: unknown key \(did you mean mask\.schedule\.0\.until_epoch\?"),
        (["head"], r"mask\.schedule: 'head' is not a phase; expected a mapping such as \{train: \[head\]"),
    ],
)
def test_a_recipe_with_a_faulty_schedule_is_refused(phases: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"mask": {"schedule": phases}}, "test")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            [HEAD, {**TWO, "until_epoch": 3}],
            r"mask\.schedule\.1 ends with epoch 3, which is step 30, but the run has 30",
        ),
        ([{"train": ["head"], "until_step": 99}], r"ends with step 99, which is step 99, but the run has 30 steps"),
        (
            [HEAD, {"train": ["last:2"], "until_step": 10}],
            r"mask\.schedule\.1 ends with step 10, which is step 10 \(10 steps an epoch\), the phase before",
        ),
    ],
)
def test_phases_have_to_end_one_after_the_other_and_before_the_run(phases: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule(*phases)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{**HEAD, "freeze": ["all"]}], r"mask\.schedule\.0: the mask leaves nothing to train"),
        ([HEAD, {**TWO, "train": ["last:9"]}], r"mask\.schedule\.1: mask selector 'last:9': expected a whole number"),
        (
            [HEAD, {**HEAD, "until_epoch": 2}],
            r"mask\.schedule\.1 trains the same tensors .* as mask\.schedule\.0 before",
        ),
        ([{**TWO, "train": ["last:4", "head"]}], r"mask\.train trains the same tensors .* as mask\.schedule\.0 before"),
    ],
)
def test_the_mask_of_each_phase_is_checked(phases: list[Any], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        schedule(*phases)


def test_a_tied_conflict_names_its_phase() -> None:
    with pytest.raises(MaskError, match=r"mask\.schedule\.0: the mask selects lm_head\.weight, but the head and"):
        schedule(HEAD, train=["last:2"], tied="error")
    with pytest.raises(MaskError, match=r"mask\.train: mask\.tied is head_only, but the mask selects the embeddings"):
        schedule(HEAD, train=["embeddings", "head"], tied="head_only")


def test_epochs_and_steps_may_be_mixed() -> None:
    phases = schedule({"train": ["head"], "until_step": 4}, {"train": ["last:1", "head"], "until_epoch": 1}).phases
    assert [(phase.start, phase.end, phase.mask.boundary) for phase in phases] == [(0, 4, 6), (4, 10, 5), (10, 30, 2)]


def test_a_phase_may_differ_in_its_settings_alone() -> None:
    slower = {"train": [{"select": ["last:4", "head"], "learning_rate": 1e-6}], "until_epoch": 1}
    assert len(schedule(slower).phases) == 2


def test_groups_are_split_by_when_their_tensors_began() -> None:
    last = schedule(HEAD, TWO).phases[-1]
    assert [len(group.names) for group in last.groups] == [1, 18, 18]
    assert sorted(set(last.trained_since.values())) == [0, 10, 20]


def test_a_flag_takes_yaml_or_json_and_the_saved_recipe_reads_back(tmp_path: Path) -> None:
    """One list, or one mapping a word."""
    listed = invocation("--mask.schedule", json.dumps([HEAD, TWO])).config
    words = invocation("--mask.schedule", "{train: head, until_epoch: 1}", "{train: [last:2, head], until_epoch: 2}")
    assert listed == words.config
    assert [phase.until_epoch for phase in listed.mask.schedule] == [1, 2]
    (tmp_path / "config.yaml").write_text(dump(listed), encoding="utf-8")
    assert build_config(read_recipe(tmp_path / "config.yaml"), "test") == listed
    with pytest.raises(ConfigError, match=r"--mask\.schedule: '\{train: \[head' is not valid YAML"):
        invocation("--mask.schedule", "{train: [head")


@pytest.fixture(scope="module")
def bare(tiny_model: Path) -> MetaModel:
    return meta_model(invocation("--model.name_or_path", str(tiny_model)).config.model)


def test_the_plan_is_that_of_the_phase_that_needs_most(bare: MetaModel) -> None:
    freezing = ("--mask.schedule", "{train: [last:4, head], until_step: 4}", "--mask.train", "head")
    config = invocation("--mask.tied", "untie", *freezing).config
    planners = phase_planners(config, bare, Workload(64, 32, None, "a test"), [3, 3])
    plans = [p.plan(p.variant(engine_spec(None, 1, 1), checkpointing=False)) for p in planners]
    whole = combine_plans(plans, config.mask)
    assert [planner.others for planner in planners] == [OtherPhases(0, 53504), OtherPhases(53504 - 16384, 53504)]
    assert plans[1].memory.host == {"masters": 4 * (53504 - 16384), "workspace": 12 * 53504}
    on_cpu = [p.memory(p.variant(engine_spec(None, 1, 1, host_is_device=True), checkpointing=False)) for p in planners]
    assert on_cpu[1].moment == "change of phase"
    assert on_cpu[1].most["masters"] - plans[1].memory.most["masters"] == 4 * (53504 - 16384)
    assert plans[0].memory.peak > plans[1].memory.peak
    assert (whole.memory, whole.mask.boundary) == (plans[0].memory, 2)
    assert [phase.is_most for phase in whole.phases] == [True, False]
    assert [phase["trained"] for phase in as_dict(whole)["schedule"]] == [53504, 16384]
    resting = 4 * (53504 - 16384)
    assert whole.checkpoint == max(plans[0].checkpoint, plans[1].checkpoint + resting)
    text = as_text(whole)
    assert "1       step 4        2 of 6                  53,504" in text
    assert "what follows is about this one" in text
    assert plans[1].mask.tied == "untie"


def test_the_plan_command_shows_the_phases_and_refuses_one_that_ends_too_late(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path, "--data.path", ENGLISH, "--train.epochs", 2, "--gpu-memory", "24GiB")
    two = run_here("launch/plan.py", *flags, "--mask.schedule", "{train: head, until_epoch: 1}")
    assert two.returncode == 0, two.stderr
    assert "2       the end       2 of 6" in two.stdout
    late = run_here("launch/plan.py", *flags, "--mask.schedule", "{train: head, until_epoch: 2}")
    assert late.returncode == 2
    assert "mask.schedule.0 ends with epoch 2, which is step 40, but the run has 40 steps" in late.stderr
    assert (ROOT / "docs" / "schedule.md").is_file()


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3, "offload_param": {"device": "nvme"}}, r"offload_param\.device is 'nvme', and mask\.schedule"),
        ({"stage": 0}, r"zero_optimization\.stage is 0; mask\.schedule needs 1, 2 or 3"),
    ],
)
def test_what_could_not_be_moved_to_the_next_phase_is_refused_at_the_start(zero: dict[str, Any], message: str) -> None:
    scheduled = RunConfig(mask=MaskConfig.model_validate({"schedule": [HEAD]}))
    with pytest.raises(ConfigError, match=message):
        resolve_ds_config({"zero_optimization": zero}, scheduled, 1, 32, Path("a.json"))
    resolve_ds_config({"zero_optimization": zero}, RunConfig(), 1, 32, Path("a.json"))
