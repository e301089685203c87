"""What a sweep does not write over, compare or read: files of others, scores of other inputs, damaged states."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, ROOT, invocation, tiny_flags

import toolkit
from toolkit.checkpoint.run_directory import write_config
from toolkit.runtime.errors import CheckpointError, ConfigError, UsageError
from toolkit.sweeping.definition import SweepDefinition
from toolkit.sweeping.results import bases_of, costs_of, score_trials
from toolkit.sweeping.running import run_trials
from toolkit.sweeping.state_file import FORMAT
from toolkit.sweeping.table import markdown
from toolkit.sweeping.trials import Trial, open_sweep, prepare_run
from toolkit.training.run import run

RATES = [1e-3, 1e-4]


def definition(rates: list[float]) -> SweepDefinition:
    return SweepDefinition({"train.learning_rate": rates})


def in_this_process(trial: Trial) -> int:
    given = invocation("--config", str(trial.directory / "config.yaml"))
    return run(replace(given, shared_by=2))


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> list[str]:
    """A recipe that trains two steps, with files of its own."""
    rows = ENGLISH.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:4]), encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("".join(rows[4:6]), encoding="utf-8")
    return tiny_flags(
        tiny_model, tmp_path / "sweep", "--data.path", tmp_path / "rows.jsonl", "--data.validation",
        tmp_path / "held_out.jsonl", "--train.max_steps", 2, "--output.report_to", "[]", "--output.report", "[]",
    )  # fmt: skip


def test_a_trial_writes_into_no_directory_that_is_not_its_own(words: list[str], tmp_path: Path) -> None:
    with open_sweep(invocation(*words), definition(RATES), "sweep") as sweep:
        first, second = sweep.trials
        first.directory.mkdir()
        (first.directory / "config.yaml").write_text("my own: precious")
        with pytest.raises(CheckpointError, match=r"trial-001 is no run directory and holds config\.yaml"):
            prepare_run(first)
        assert (first.directory / "config.yaml").read_text() == "my own: precious"
        assert [path.name for path in first.directory.iterdir()] == ["config.yaml"]

        (tmp_path / "elsewhere").mkdir()
        second.directory.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=r"trial-002 is a symbolic link, .* remove it"):
            prepare_run(second)
        assert not list((tmp_path / "elsewhere").iterdir())

        (first.directory / "config.yaml").unlink()
        write_config(first.directory, second.config)
        with pytest.raises(CheckpointError, match="trial-001 holds a run of another recipe; move it away"):
            prepare_run(first)
        write_config(first.directory, first.config)
        assert prepare_run(first) == prepare_run(first) == first.directory / "config.yaml"


def test_trials_computed_from_other_rows_are_not_compared(words: list[str], tmp_path: Path) -> None:
    with open_sweep(invocation(*words), definition(RATES[:1]), "sweep") as sweep:
        assert run_trials(sweep, in_this_process)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(held_out.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with open_sweep(invocation(*words), definition([*RATES, 1e-5]), "sweep") as sweep:
        with pytest.raises(CheckpointError, match=r"trial 2 was not computed from what trial 1 was: the rows, .* then"):
            run_trials(sweep, in_this_process)
        assert not sweep.trials[2].directory.exists(), "it ends before more is paid for"
        assert score_trials(sweep)
        assert sweep.trials[1].result == {}
        assert "cannot be scored: trial 2 was not computed from what trial 1 was" in str(sweep.trials[1].fault)


@pytest.mark.parametrize("odd", ['{"step": 3, "trained_parameters": 5}', '{"step": 3, "trained_parameters": "x"}'])
def test_a_line_of_the_log_that_lacks_something_costs_no_table(words: list[str], odd: str) -> None:
    with open_sweep(invocation(*words), definition(RATES), "sweep") as sweep:
        (trial, _) = sweep.trials
        trial.directory.mkdir()
        whole = {"step": 1, "trained_parameters": 7, "seconds": 0.5, "peak_memory_gib": None}
        (trial.directory / "metrics.jsonl").write_text(f"{json.dumps(whole)}\n{odd}\n")
        costs = costs_of(trial)
        assert (costs["seconds"], costs["trained"]) == (0.5, 7)


SCORES = {"value": 1.0, "low": 1, "high": None, "higher_is_better": False, "rows": 3, "metric": "loss"}
TRIAL = {"trial": 1, "settings": {}, "wall_seconds": 1, "code": None, "fault": None, "validation": SCORES}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"validation": "x"}, "trials.0.validation"),
        ({"validation": {"value": 7}}, "trials.0.validation.low"),
        ({"validation": {**SCORES, "value": "7.1"}}, "trials.0.validation.value"),
        ({"seconds": "abc"}, "trials.0.seconds"),
        ({"trained": [1]}, "trials.0.trained"),
        ({"trial": 10**9}, "trials.0.trial"),
        ({"trial": -1}, "trials.0.trial"),
        ({"trial": True}, "trials.0.trial"),
    ],
)
def test_a_state_that_was_edited_is_refused_with_its_place(
    words: list[str], tmp_path: Path, changes: dict[str, Any], where: str
) -> None:
    def refused(state: dict[str, Any]) -> str:
        (tmp_path / "sweep" / "sweep.json").write_text(
            json.dumps({"format": FORMAT, "recipe": {}, "base": {}, **state})
        )
        with (
            pytest.raises(CheckpointError) as error,
            open_sweep(invocation(*words), definition(RATES), "sweep", writes=False),
        ):
            pass
        return str(error.value)

    (tmp_path / "sweep").mkdir()
    assert f"is of no sweep that this version reads ({where}: " in refused({"trials": [{**TRIAL, **changes}]})
    assert "(base.a.validation" in refused({"base": {"a": {"validation": "x"}}, "trials": []})
    assert "has two trials of one number" in refused({"trials": [TRIAL, TRIAL]})
    assert "holds a sweep of another recipe" in refused({"trials": [TRIAL]})


def test_scores_are_those_of_the_rows_and_the_weights_that_are_there(words: list[str], tmp_path: Path) -> None:
    """Rows change and trials are trained anew: what was scored before is not shown, neither of trial nor of base."""
    held_out = tmp_path / "held_out.jsonl"

    def results() -> tuple[dict[str, Any], dict[str, Any]]:
        with open_sweep(invocation(*words), definition(RATES[:1]), "sweep") as sweep:
            assert run_trials(sweep, in_this_process)
            assert score_trials(sweep)
            return sweep.trials[0].result, bases_of(sweep)

    before, base_before = results()
    again, _ = results()
    assert again == before
    rows = ENGLISH.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out.write_text("".join(rows[6:9]), encoding="utf-8")
    shutil.rmtree(tmp_path / "sweep" / "trial-001")
    with open_sweep(invocation(*words), definition(RATES[:1]), "sweep") as sweep:
        assert sweep.trials[0].result == {}, "a trial that is not there has no score"
        assert "| not finished |" in markdown(sweep)
    (prepared,) = sweep.trials
    prepared.directory.mkdir()
    write_config(prepared.directory, prepared.config)
    assert in_this_process(prepared) == 0  # as a job of SLURM would
    after, base_after = results()
    assert after["validation"]["rows"] == 3
    assert after["validation"]["value"] != before["validation"]["value"]
    assert after["digest"] != before["digest"]
    (then,), (now,) = base_before.values(), base_after.values()
    assert (then["validation"]["rows"], now["validation"]["rows"]) == (2, 3)
    assert isinstance(after["trained"], int)


def test_how_rows_are_trained_on_makes_no_other_rows(words: list[str]) -> None:
    packed = SweepDefinition({"data.packing": ["on", "off"]})
    with open_sweep(invocation(*words, "--train.micro_batch_size", "2"), packed, "sweep") as sweep:
        assert run_trials(sweep, in_this_process)
        assert score_trials(sweep)
        assert len(bases_of(sweep)) == 1
        assert "held out different rows" not in markdown(sweep)


def test_rows_that_are_taken_more_often_hold_out_no_others(words: list[str], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    labelled = [json.dumps({**row, "kind": "rare" if number == 0 else "usual"}) for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(labelled), encoding="utf-8")
    with open_sweep(invocation(*words), SweepDefinition({"data.oversample": ["none", "kind"]}), "sweep") as sweep:
        assert run_trials(sweep, in_this_process)
        assert score_trials(sweep)
        assert [trial.fault for trial in sweep.trials] == [None, None]
        assert "held out different rows" not in markdown(sweep)


def test_a_directory_called_base_is_not_the_base(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    with open_sweep(invocation(*words), definition(RATES[:1]), "sweep") as sweep:
        assert run_trials(sweep, in_this_process)
        assert score_trials(sweep)
        assert sweep.trials[0].fault is None
        assert len(bases_of(sweep)) == 1
    with pytest.raises(UsageError, match=r"write \./base for the directory of that name"):
        toolkit.evaluate("base", data=tmp_path / "rows.jsonl")


def test_test_rows_that_are_not_there_are_said_before_anything_trains(words: list[str], tmp_path: Path) -> None:
    overrides = {"model.name_or_path": tmp_path / "none", "data.validation": 0.25, "output.dir": tmp_path / "api"}
    with pytest.raises(UsageError, match=r"--test scores the rows of data\.test, which is none"):
        toolkit.sweep(overrides=overrides, grid={"train.seed": [1, 2]}, test=True)
    assert not (tmp_path / "api").exists()


def test_masks_are_words_beside_a_rotation_too(words: list[str]) -> None:
    rotation = {"method": "frostline", "every_steps": 1, "blocks": 1}
    given = invocation(*words, "--mask.train", "last:2", "--mask.rotation", json.dumps(rotation))
    masks = SweepDefinition({"mask.train": ["last:3", "[last:2]"]})
    with open_sweep(given, masks, "sweep", writes=False) as sweep:
        assert [trial.config.mask.train for trial in sweep.trials] == [["last:3"], ["last:2"]]
        assert all(trial.config.mask.rotation is not None for trial in sweep.trials)
    without = SweepDefinition(trials=[{"mask.train": "lora last:3", "mask.rotation": "none"}])
    with open_sweep(given, without, "sweep", writes=False) as sweep:
        assert sweep.trials[0].config.mask.rotation is None


def test_a_cache_without_a_prefix_is_refused_before_anything_trains(words: list[str]) -> None:
    given = invocation(*words, "--prefix.cache", "on")
    masks = SweepDefinition({"mask.train": ["last:2", "lora all"]})
    with (
        pytest.raises(ConfigError, match=r"trial 2 \(.*\): prefix\.cache is on, but nothing below"),
        open_sweep(given, masks, "sweep"),
    ):
        pass


def test_memory_is_that_of_the_process_itself() -> None:
    """A process is started by one that has held much memory, which ``ru_maxrss`` begins at."""
    child = "import torch; from toolkit.training.monitor import peak_memory_gib as p; print(p(torch.device('cpu')))"
    parent = f"import subprocess, sys; held = b'x' * 2**31; del held; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.01 < float(done.stdout) < 1.5
