"""What a sweep does not write over, compare or read: files of others, scores of other inputs, damaged states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, invocation, tiny_flags

from toolkit.checkpoint.run_directory import write_config
from toolkit.runtime.errors import CheckpointError
from toolkit.sweeping.definition import SweepDefinition
from toolkit.sweeping.results import costs_of, score_trials
from toolkit.sweeping.running import run_trials
from toolkit.sweeping.state_file import FORMAT
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
