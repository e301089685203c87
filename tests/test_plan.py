"""Planning a run: from a config alone, the first knob to turn, what is printed, saved and refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import REFERENCE_MASK, ROOT, invocation, run_here, tiny_flags
from plan_shapes import EXAONE, exaone

from toolkit.commands.plan import main
from toolkit.config.flags import byte_size
from toolkit.config.schema import MaskConfig, ModelConfig, PrefixConfig, RunConfig, TrainConfig
from toolkit.engine.deepspeed.config import resolve_ds_config
from toolkit.engine.deepspeed.json_file import read_ds_config
from toolkit.planning.command import plan_run
from toolkit.planning.device_fit import choose_variant, fit_device
from toolkit.planning.engine_spec import engine_spec, zero_spec
from toolkit.planning.memory import KINDS
from toolkit.planning.meta_model import meta_model
from toolkit.planning.planner import Planner
from toolkit.planning.table import as_dict, as_text
from toolkit.planning.workload import Workload, read_workload
from toolkit.runtime.errors import ConfigError, MaskError, ModelError
from toolkit.runtime.free_memory import RESERVE
from toolkit.split.loss_head import Shortcuts

LOCAL = engine_spec(None, 1, 1)
OFFLOADED = zero_spec(2, 1, False, 32, "adamw", offload=True)


@pytest.mark.parametrize("name", EXAONE)
def test_exaone_is_planned_from_its_config_alone(name: str, tmp_path: Path) -> None:
    directory = exaone(tmp_path / name, name)
    flags = ("--model.name_or_path", str(directory), *REFERENCE_MASK, "--data.path", "org/none")
    plan = as_dict(*plan_run(invocation(*flags), 1, 80 * 2**30))
    parameters = sum(part["parameters"] for part in plan["mask"]["parts"])
    assert parameters == {"2.4b": 2_667_471_360, "7.8b": 7_818_448_896, "32b": 32_003_200_000}[name]
    assert plan["mask"]["boundary"] == {"2.4b": 26, "7.8b": 28, "32b": 60}[name]
    assert plan["memory"]["peak"] == sum(plan["memory"]["at_peak"][kind] for kind in KINDS)
    assert plan["fit"]["fits"]
    assert plan["micro_batch"]["tokens"] == 2048
    assert plan["flops"]["first_epoch"] is plan["flops"]["later_epoch"] is None
    assert plan["disk"]["cache_token"] == 2 * EXAONE[name]["hidden_size"]


def test_a_cached_prefix_is_not_there_beside_the_optimizer(tmp_path: Path) -> None:
    """EXAONE 32B fits 80 GiB only because the prefix is gone when masters and moments come."""
    directory = exaone(tmp_path / "32b", "32b")
    peaks = {}
    for cache in ("auto", "off"):
        given = (
            "--model.name_or_path", str(directory), "--data.path", "org/none", "--prefix.cache", cache, *REFERENCE_MASK
        )  # fmt: skip
        plan = as_dict(*plan_run(invocation(*given), 1, 80 * 2**30))
        assert plan["prefix"]["cached"] is plan["fit"]["fits"] is (cache == "auto")
        peaks[cache] = plan["memory"]["most"]
    assert peaks["auto"]["prefix weights"] == peaks["off"]["prefix weights"] > 55 * 2**30
    assert plan["memory"]["peak"] > 90 * 2**30


def tiny_planner(directory: Path, rows: int = 1, **options: Any) -> Planner:
    config = RunConfig(
        model=ModelConfig(name_or_path=str(directory), dtype="bfloat16"),
        mask=MaskConfig(train=["last:4"]),
        train=TrainConfig(micro_batch_size=rows, **options),
        prefix=PrefixConfig(cache="off"),
    )
    return Planner(config, meta_model(config.model), Workload(512, 512, None, "a test"))


AWAY: Any = {"cache": "off", "precision": "nf4", "placement": "cpu"}
"""A prefix of which nothing is left to move out of the way."""


def first_change(planner: Planner, budget_of: Any, spec: Any = LOCAL) -> str:
    variant = choose_variant(planner, spec, None)
    fit = fit_device(planner, variant, budget_of(planner, variant))
    assert not fit.fits
    return fit.changes[0][0] if fit.changes else ""


def just_below(planner: Planner, variant: Any) -> int:
    return planner.memory(variant).peak + RESERVE - 1


def test_the_first_knob_is_the_one_that_costs_least(tiny_model: Path) -> None:
    off = {"gradient_checkpointing": "off"}
    assert first_change(tiny_planner(tiny_model, rows=4, **off), just_below) == "train.gradient_checkpointing: on"
    on = {"gradient_checkpointing": "on"}
    assert first_change(tiny_planner(tiny_model, rows=4, **on), just_below).startswith("train.micro_batch_size: 1 with")
    assert first_change(tiny_planner(tiny_model, **on), just_below) == "prefix.precision: int8"
    planner = tiny_planner(tiny_model, **on)
    for prefix, turn in (
        ({"cache": "off", "precision": "nf4"}, "prefix.placement: cpu"),
        (AWAY, "--ds ds_configs/zero2_offload.json (slower"),
    ):
        planner.config = planner.config.model_copy(update={"prefix": PrefixConfig(**prefix)})
        assert first_change(planner, just_below).startswith(turn)
    assert first_change(planner, just_below, OFFLOADED).startswith("data.max_length: 256")


def test_state_that_no_shorter_row_makes_room_for_goes_to_more_ranks_then_to_fewer_blocks(tmp_path: Path) -> None:
    directory = exaone(tmp_path / "7.8b", "7.8b")
    config = RunConfig(
        model=ModelConfig(name_or_path=str(directory)), mask=MaskConfig(train=["last:16"]),
        train=TrainConfig(gradient_checkpointing="on"), prefix=PrefixConfig(**AWAY),
    )  # fmt: skip
    planner = Planner(config, meta_model(config.model), Workload(256, 64, None, "a test"))

    def turns(spec: Any, budget: int) -> list[str]:
        return [text for text, _ in fit_device(planner, planner.variant(spec, checkpointing=True), budget).changes]

    assert [turn.split()[1] for turn in turns(LOCAL, 40 * 2**30)] == ["ds_configs/zero2_offload.json"]
    stage_1 = zero_spec(1, 1, False, 4096, "adamw")
    assert turns(stage_1, 40 * 2**30) == ["--ds ds_configs/zero3.json on 2 ranks"]
    assert turns(OFFLOADED, 7 * 2**30) == ["--ds ds_configs/zero3_offload.json on 2 ranks"]
    wide = planner.variant(zero_spec(3, 8, False, 4096, "adamw", offload=True), checkpointing=True)
    least = planner.memory(wide).peak + RESERVE
    assert fit_device(planner, wide, least).changes == ()
    assert fit_device(planner, wide, least - 2**30).changes[0][0].startswith("mask.train: last:")
    hopeless = fit_device(planner, wide, 2 * 2**30)
    assert not hopeless.helps


def test_auto_recomputes_exactly_where_the_budget_asks_for_it(tiny_model: Path) -> None:
    planner = tiny_planner(tiny_model)
    plain = choose_variant(planner, LOCAL, None)
    needed = planner.memory(plain).peak + RESERVE
    assert not plain.checkpointing
    assert not choose_variant(planner, LOCAL, needed).checkpointing
    assert choose_variant(planner, LOCAL, needed - 1).checkpointing


def test_padded_rows_and_full_masks_can_be_planned(tiny_model: Path) -> None:
    planner = tiny_planner(tiny_model, rows=2)
    one, two = tiny_planner(tiny_model), planner.variant(LOCAL, checkpointing=False)
    activations = planner.memory(two).most["activations"]
    assert activations > 2 * one.memory(one.variant(LOCAL, checkpointing=False)).most["activations"]
    everything = RunConfig(model=planner.config.model, mask=MaskConfig(train=["re:.*"], tied="untie"))
    whole = Planner(everything, planner.meta, Workload(64, 8, None, "a test"))
    plan = whole.plan(whole.variant(LOCAL, checkpointing=True))
    assert plan.memory.most["prefix weights"] == 0
    assert plan.flops.of([(64, 8)])["prefix forward"] == 0


def test_what_the_run_found_takes_the_place_of_what_was_planned_before(tiny_model: Path) -> None:
    planner = tiny_planner(tiny_model)

    def plan(planner: Planner) -> Any:
        return planner.plan(planner.variant(LOCAL, checkpointing=False))

    before = plan(planner)
    uncut, plain = plan(replace(planner, cut=False)), plan(replace(planner, shortcuts=Shortcuts()))
    assert (before.is_cut, uncut.is_cut) == (True, False)
    assert plain.memory.most["logits"] > before.memory.most["logits"]


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 gib", 3 * 2**29)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["24", "a lot", "-1GiB", "0GiB", "24 GiB of memory", ""])
def test_a_size_that_is_none_says_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 24GiB"):
        byte_size(text)


def test_the_command_exits_with_2_and_one_message_on_a_bad_size(tiny_model: Path) -> None:
    result = run_here("launch/plan.py", "--model.name_or_path", tiny_model, "--gpu-memory", "plenty")
    assert result.returncode == 2
    assert "--gpu-memory is 'plenty'; expected a size such as 24GiB or 80GB" in result.stderr
    assert "Traceback" not in result.stderr


def test_headers_that_contradict_the_config_are_an_error(tiny_model: Path, tmp_path: Path) -> None:
    values = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"intermediate_size": 96}))
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    with pytest.raises(ModelError, match=r"\(64, 32\) stored, config.json makes it \(96, 32\)"):
        meta_model(ModelConfig(name_or_path=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        meta_model(ModelConfig(name_or_path=str(tmp_path)))


def test_rows_that_cannot_be_used_are_named_with_the_first(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("QUESTION,CONTEXTS,LONG_ANSWER\n,c,a\n")
    load = read_workload(
        invocation(*tiny_flags(tiny_model, tmp_path, "--data.path", tmp_path / "rows.csv")).config, 512
    )
    assert "1 of 1 rows cannot be used" in load.source
    assert "row 1 has an empty QUESTION; expected text" in load.source


def test_a_faulty_mask_is_reported_before_anything_is_traced(tiny_model: Path) -> None:
    with pytest.raises(MaskError, match="a whole number from 1 to 6"):
        plan_run(invocation(*tiny_flags(tiny_model, Path("x"), "--mask.train", "last:7")), 1, None)


def test_a_run_saves_its_plan_and_names_it_beside_the_measured_peak(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from toolkit.training.run import run

    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 1)
    caplog.set_level("INFO", logger="frostline")
    assert run(invocation(*flags)) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert set(plan["memory"]["most"]) == set(KINDS)
    assert plan["micro_batch"]["source"] == "the longest of 20 training rows"
    planned = f"{plan['memory']['peak'] / 2**30:.2f}"
    assert re.search(rf"done: .* {planned} (tensors as planned|of tensors were planned)", caplog.text)
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
    assert plan["disk"]["checkpoint"] == pytest.approx(written, rel=0.15)


def test_the_table_the_json_and_the_picture_say_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("gc.disable", lambda: None)  # this process goes on
    given = [*tiny_flags(tiny_model, tmp_path / "run"), "--world-size", "2", "--gpu-memory", "24GiB"]
    assert main([*given, "--png", str(tmp_path / "plan.png")]) == 0
    text = capsys.readouterr().out
    assert "frost line: block 2 of 6" in text
    assert "fits: 1.01 GiB of 24.00 GiB" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main([*given, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fit"]["fits"]
    assert values["engine"] == {"name": "local", "ranks": 2, "gradient_checkpointing": False, "optimizer": "adamw"}


def shipped(name: str, ranks: int = 2) -> dict[str, Any]:
    path = ROOT / "ds_configs" / f"{name}.json"
    return resolve_ds_config(read_ds_config(path), RunConfig(), ranks, 576, path)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_a_deepspeed_file_puts_on_the_host_is_not_counted_as_the_devices(tiny_model: Path, stage: int) -> None:
    planner = tiny_planner(tiny_model)

    def memory(ds_config: dict[str, Any], **options: Any) -> Any:
        return planner.memory(planner.variant(engine_spec(ds_config, 2, 1, **options), checkpointing=False))

    plain, away = memory(shipped(f"zero{stage}")), memory(shipped(f"zero{stage}_offload"))
    one_memory = memory(shipped(f"zero{stage}_offload"), host_is_device=True)
    assert plain.host == one_memory.host == {}
    for kind in ("masters", "moments"):
        assert away.most[kind] == 0
        assert away.host[kind] == plain.most[kind] == one_memory.most[kind] > 0
    moved = plain.most["suffix weights"] - away.most["suffix weights"]
    assert away.host.get("suffix weights", 0) == moved
    assert (moved > 0) is (stage == 3)
    assert away.peak < plain.peak


def test_state_in_files_leaves_buffers_on_the_host(tiny_model: Path) -> None:
    planner = tiny_planner(tiny_model)
    variant = planner.variant(engine_spec(shipped("zero3_nvme", 1), 1, 1), checkpointing=False)
    trained, memory = planner._split(variant).tensors.total, planner.memory(variant)
    assert memory.files == (4 + 8 + 4) * trained
    assert memory.host["workspace"] == 4 * 4 * trained  # four buffers of the one group, in float32
    assert "masters" not in memory.host
    ds_config = shipped("zero3_nvme", 1)
    ds_config["zero_optimization"]["offload_param"] = {"device": "nvme", "buffer_size": 1000}
    weights = planner.memory(planner.variant(engine_spec(ds_config, 1, 1), checkpointing=False))
    assert weights.files > memory.files
    assert weights.host["workspace"] == memory.host["workspace"] + 5 * 1000 * 2


def test_the_engine_is_planned_as_deepspeed_reads_its_file() -> None:
    deprecated, current = {"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}
    specs = [engine_spec({"zero_optimization": {"stage": 2, **zero}}, 2, 1) for zero in (deprecated, current)]
    assert specs[0] == specs[1]
    assert specs[0].optimizer_at == "cpu"
    assert specs[0].bucket == 500_000_000, "its default"
    with pytest.raises(ConfigError, match=r"(?s)as DeepSpeed reads it.*sub_group_size"):
        engine_spec({"zero_optimization": {"stage": 3, "sub_group_size": -1}}, 2, 1)


def test_a_plan_with_offload_says_what_is_where(tiny_model: Path) -> None:
    given = tiny_flags(tiny_model, Path("x"), "--ds", ROOT / "ds_configs" / "zero3_nvme.json")
    text = as_text(*plan_run(invocation(*given), 2, None))
    assert "at the peak   on the host" in text
    assert "in the files of ZeRO-3's offload to NVMe 0.00 GiB of each rank" in text


def test_state_on_the_host_is_proposed_before_shorter_rows(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(name_or_path=str(exaone(tmp_path / "7.8b", "7.8b"))), mask=MaskConfig(train=["last:4"]),
        train=TrainConfig(gradient_checkpointing="on"), prefix=PrefixConfig(**AWAY),
    )  # fmt: skip
    planner = Planner(config, meta_model(config.model), Workload(2048, 64, None, "a test"))
    assert first_change(planner, just_below).startswith("--ds ds_configs/zero2_offload.json (slower")


def test_masks_are_compared_side_by_side(tiny_model: Path) -> None:
    """Each row is that mask's own plan; adapters need no DeepSpeed file, weight or schedule."""
    masks = ["last:2 head", "lora last:3", "dora last:1 head", '{select: "blocks:4"}']
    flags = [*tiny_flags(tiny_model, Path("unused")), "--train.epochs", "3"]
    found = run_here("plan.py", *flags, "--compare", *masks, "--json", "--tflops", "2")
    rows = json.loads(found.stdout)
    assert [row["mask"] for row in rows] == masks
    assert [row["boundary"] for row in rows] == [4, 3, 5, 4]
    adapters, magnitudes = "{lora: {select: last:3}}", "{lora: {select: last:1, dora: true}}"
    for row, entries in zip(rows, [["last:2", "head"], [adapters], [magnitudes, "head"], masks[3:]], strict=True):
        own = run_here("plan.py", *flags, "--json", "--mask.train", *entries)
        values = json.loads(own.stdout)
        assert row["memory"] == values["memory"]["peak"]
        assert row["flops"] == values["flops"]["first_epoch"] + 2 * values["flops"]["later_epoch"]
        assert row["seconds"] == row["flops"] / 2e12
        assert row["disk"] == values["disk"]["most"] + values["disk"]["cache"]
    short = ["--compare", "last:2 head", "--json", "--prefix.cache", "off"]
    (part,) = json.loads(run_here("plan.py", *flags, *short, "--train.max_steps", "5").stdout)
    (whole,) = json.loads(run_here("plan.py", *flags, *short).stdout)
    assert part["flops"] == pytest.approx(whole["flops"] * 5 / 60, rel=1e-3)
    table = run_here("plan.py", *flags, "--compare", *masks, "--gpu-memory", "2GiB").stdout.splitlines()
    assert all(line.endswith(("fits", "does not fit")) for line in table[1:5])
    assert sum(line.count("*") for line in table[1:5]) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--compare", "lora"], "'lora' is no mask"),
        (["--compare", "{lora: 3}"], "is no mask"),
        (["--compare", "last:2 'head"], "is no mask"),
        (["--compare", "last:99"], "1 to 6"),
        (["--compare", "last:2", "--suggest", "spectrum"], "leave out --suggest"),
        (["--suggest", "spectrum", "--json"], "leave out --json"),
        (["--tflops", "3"], "--tflops is for the time in --compare"),
        (["--compare", "last:2", "--mask.schedule", "{train: head, until_step: 1}"], "--compare compares masks"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_why(given: list[str], message: str, tiny_model: Path) -> None:
    found = run_here("plan.py", *tiny_flags(tiny_model, Path("unused")), *given)
    assert found.returncode == 2
    assert message in found.stderr
