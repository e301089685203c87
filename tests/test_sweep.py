"""Sweeps: trials one after the other over one cache, stopped and gone on with, compared by quality and cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from helpers import ENGLISH, invocation, metrics, run_here, run_script, tiny_flags
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import toolkit
from benchmarks import sweep as benchmark
from benchmarks.process import Finished
from benchmarks.record import rms
from toolkit.config.schema import RunConfig
from toolkit.metrics.resampling import Interval
from toolkit.runtime import signals
from toolkit.runtime.errors import CheckpointError, ConfigError
from toolkit.split.prefix import Prefix
from toolkit.sweeping import running
from toolkit.sweeping.definition import SweepDefinition, definition_of, describe, take_flags, trial_configs
from toolkit.sweeping.report import write_report
from toolkit.sweeping.results import score_trials
from toolkit.sweeping.running import run_trials
from toolkit.sweeping.table import ScoredTrial, front, markdown
from toolkit.sweeping.trials import Sweep, Trial, open_sweep
from toolkit.training.run import run

LIMIT, HELD_OUT = 12, 5
ROWS = LIMIT + HELD_OUT
"""Rows that each trial computes with; a fourth of the sample's 20 are held out."""
MASKS, RATES = ["last:1", "last:4 head", "last:2"], [1e-3, 1e-4]
GRID = {"mask.train": MASKS, "train.learning_rate": RATES}


def base(model: Path, directory: Path, *more: object) -> list[str]:
    given = ("--data.limit", LIMIT, "--data.validation", "0.25", "--train.epochs", 1, "--output.report_to", "[]")
    return tiny_flags(model, directory, *given, "--prefix.cache_dir", directory.parent / "cache", *more)


def in_this_process(trial: Trial) -> int:
    """Train as the trial's process would."""
    given = invocation("--config", str(trial.directory / "config.yaml"))
    return run(replace(given, shared_by=len(MASKS) * len(RATES)))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in this process, which has imported torch already."""
    monkeypatch.setattr(running, "in_processes", lambda *given: in_this_process)


@contextmanager
def opened(model: Path, directory: Path, definition: SweepDefinition, *more: object) -> Iterator[Sweep]:
    with open_sweep(invocation(*base(model, directory, *more)), definition, "sweep") as sweep:
        yield sweep


@contextmanager
def counting_prefix_blocks() -> Iterator[Counter[int]]:
    """How many samples each block runs on as a part of a prefix."""
    runs: Counter[int] = Counter()
    forward, run_prefix, inside = LlamaDecoderLayer.forward, Prefix._run, []

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if inside and not hidden_states.is_meta:  # which the plan traces
            runs[self.self_attn.layer_idx] += hidden_states.shape[0]
        return forward(self, hidden_states, *args, **kwargs)

    def marked(self: Prefix, *args: Any, **kwargs: Any) -> torch.Tensor:
        inside.append(True)
        try:
            return run_prefix(self, *args, **kwargs)
        finally:
            inside.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", counted)
        patch.setattr(Prefix, "_run", marked)
        yield runs


@pytest.fixture(scope="module")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[int], list[int]]:
    """The directory of a sweep of six trials over three frost lines, how often prefix blocks ran, and in what order."""
    directory = tmp_path_factory.mktemp("swept") / "sweep"
    order = []

    def start(trial: Trial) -> int:
        order.append(trial.number)
        return in_this_process(trial)

    with (
        counting_prefix_blocks() as runs, opened(tiny_model, directory, SweepDefinition(GRID)) as sweep,
        pytest.MonkeyPatch.context() as patch,
    ):  # fmt: skip
        patch.setattr(running, "in_processes", lambda *given: start)
        from toolkit.commands.sweep import _train_and_compare

        assert _train_and_compare(sweep, invocation(*base(tiny_model, directory)), (), False)
    return directory, runs, order


def state(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "sweep.json").read_text(encoding="utf-8")))


def test_each_prefix_block_runs_once_a_row_in_all(swept: tuple[Path, Counter[int], list[int]]) -> None:
    _, runs, order = swept
    assert order == [3, 4, 5, 6, 1, 2], "the lowest frost line first"
    # beside the rows each first trial of a line checks: the cut on one row, three times that it repeats; and where it
    # continues from a lower line, two rows from their tokens and again from there
    tokens, again = 4, 2
    assert runs[0] == runs[1] == ROWS + 3 * tokens + 2 * again
    assert runs[2] == runs[3] == ROWS + 2 * tokens + 2 * again + again
    assert runs[4] == ROWS + tokens + again + again
    assert runs[5] == 0


def test_a_sweep_ends_with_a_table_a_picture_and_both_as_values(swept: tuple[Path, Counter[int], list[int]]) -> None:
    directory = swept[0]
    trials = state(directory)["trials"]
    for trial in trials:
        outcome = toolkit.evaluate(trial["directory"], step="best")
        scores = outcome.models[0].scores["loss"]
        assert Interval(*(trial["validation"][key] for key in ("value", "low", "high"))) == pytest.approx(
            Interval(scores.value, scores.low, scores.high)
        )
        rows = [json.loads(line) for line in (Path(trial["directory"]) / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "loss" in row]
        assert trial["seconds"] == pytest.approx(sum(row["seconds"] for row in steps))
        assert trial["memory_gib"] == max(row["peak_memory_gib"] for row in steps)
        assert trial["trained"] == steps[-1]["trained_parameters"]
    least = min(trials, key=lambda trial: trial["validation"]["value"])
    assert least["front"] == ["seconds", "memory_gib", "trained"]
    (of_base,) = state(directory)["base"].values()
    table = (directory / "sweep.md").read_text(encoding="utf-8")
    assert f"| base |  |  | {of_base['validation']['value']:.4f} (" in table
    assert f"| {least['trial']} | " in table
    assert "| seconds, peak GiB, trained |" in table
    picture = ElementTree.fromstring((directory / "sweep.svg").read_text(encoding="utf-8"))
    texts = {"".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"1", "6", "peak memory, GiB", "trained parameters", "validation loss"} <= texts
    assert not [text for text in texts if "times" in text or "10^" in text], "few labels, which do not overlap"


def test_a_trial_is_an_ordinary_run(swept: tuple[Path, Counter[int], list[int]]) -> None:
    directory = swept[0] / "trial-003"
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    assert (config["mask"]["train"], config["train"]["learning_rate"]) == (["last:4", "head"], 1e-3)
    before = metrics(directory)
    assert run(invocation("--config", str(directory / "config.yaml"))) == 0
    assert metrics(directory) == before, "it is finished"


def test_a_finished_sweep_runs_nothing_again_and_takes_more_trials(
    tiny_model: Path, swept: tuple[Path, Counter[int], list[int]]
) -> None:
    started = []
    more = SweepDefinition({"mask.train": ["last:4 head", "last:3"], "train.learning_rate": [1e-4]})
    with opened(tiny_model, swept[0], more) as sweep:
        assert [trial.number for trial in sweep.trials] == [4, 7]
        assert sweep.trials[0].result["validation"]["value"] > 0
        assert run_trials(sweep, lambda trial: started.append(trial.number) or 1)
    assert started == [7]
    assert [trial["trial"] for trial in state(swept[0])["trials"]] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(CheckpointError, match=r"sweep of another recipe: train.epochs is 2, and was 1"):
        opened(tiny_model, swept[0], more, "--train.epochs", 2).__enter__()


def test_a_stopped_sweep_goes_on_where_it_was(tiny_model: Path, tmp_path: Path, here: None) -> None:
    definition, started = SweepDefinition({"train.learning_rate": [1e-3, 1e-4, 1e-5]}), []

    def stops_at_the_second(trial: Trial) -> int:
        started.append(trial.number)
        if started == [1, 2]:
            os.kill(os.getpid(), signal.SIGTERM)
        return in_this_process(trial)

    with signals.record_signals(), opened(tiny_model, tmp_path / "sweep", definition) as sweep:
        assert not run_trials(sweep, stops_at_the_second)
        assert sweep.trials[1].fault is None
    with signals.record_signals(), opened(tiny_model, tmp_path / "sweep", definition) as sweep:
        assert run_trials(sweep, stops_at_the_second)
        assert all(trial.is_done for trial in sweep.trials)
    assert started == [1, 2, 2, 3]


def test_a_request_to_stop_is_passed_on_to_the_process_of_a_trial() -> None:
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(75)); print('there', flush=True); signal.pause()"
    for ends, told in (("75", 75), ("0", 0)):
        with signals.record_signals(), subprocess.Popen(
            [sys.executable, "-c", code.replace("75", ends)], stdout=subprocess.PIPE
        ) as process:  # fmt: skip
            assert process.stdout is not None
            process.stdout.readline()
            signals.request_stop("SIGTERM")
            assert running._wait(process) == told, "a run that was done by then is done"


def test_a_trial_that_fails_is_said_and_the_others_go_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_once(trial: Trial) -> int:
        return 1 if trial.number == 1 else in_this_process(trial)

    monkeypatch.setattr(running, "in_processes", lambda *given: fails_once)
    words = [*base(tiny_model, tmp_path / "sweep"), "--sweep.train.learning_rate", "1e-3", "1e-4"]
    done = run_here("sweep.py", *words)
    assert done.returncode == 1
    assert "sweep: trial 1 failed with exit code 1, as it says above; the others go on" in done.stderr
    assert "| 1 | learning_rate 0.001 | 2 | failed with exit code 1 |" in done.stdout
    assert "| 2 | learning_rate 0.0001 | 2 | " in done.stdout
    monkeypatch.setattr(running, "in_processes", lambda *given: in_this_process)
    again = run_here("sweep.py", *words)
    assert again.returncode == 0, "a failed trial is tried again"
    assert "failed" not in again.stdout
    assert "sweep: 1 of 2 trials are finished already" in again.stderr


def test_trials_of_several_seeds_say_what_they_held_out(tiny_model: Path, tmp_path: Path, here: None) -> None:
    directory = tmp_path / "sweep"
    result = toolkit.sweep(
        None,
        {
            "model.name_or_path": tiny_model, "model.dtype": "float32", "data.path": ENGLISH, "data.limit": 6,
            "data.validation": 0.2, "data.test": 0.15, "mask.train": ["last:2"], "train.epochs": 1,
            "output.dir": directory, "output.sample_answers": 0, "output.report": [],
        },
        grid={"train.seed": [1, 2]},
        test=True,
    )  # fmt: skip
    assert (result.directory, result.stopped) == (directory, False)
    values = [trial["validation"]["value"] for trial in result.trials]
    table = (directory / "sweep.md").read_text(encoding="utf-8")
    assert "Trials held out different rows (other seeds or data)" in table
    assert f"| 1, 2 | {sum(values) / 2:.4f} | " in table
    assert len(state(directory)["base"]) == 2
    assert all(trial["test"]["rows"] == 3 for trial in result.trials)


def point(number: int, loss: float, seconds: float, higher: bool = False) -> ScoredTrial:
    return ScoredTrial(Trial(number, {}, RunConfig(), result={"seconds": seconds}), Interval(loss, loss, loss), higher)


def test_the_front_is_what_no_other_trial_beats_for_less() -> None:
    points = [point(1, 0.9, 10), point(2, 0.8, 20), point(3, 0.85, 30), point(4, 0.8, 25), point(5, 0.95, 10)]
    assert [one.trial.number for one in front(points, "seconds")] == [1, 2]
    accuracies = [point(1, 0.9, 10, True), point(2, 0.8, 20, True), point(3, 0.95, 30, True)]
    assert [one.trial.number for one in front(accuracies, "seconds")] == [1, 3]
    assert front([], "seconds") == []


def test_flags_name_the_values_of_a_key() -> None:
    words = ["--config", "x", "--sweep.mask.train", "last:4 head", "lora last:8", "--train.epochs", "2",
             "--sweep.train.seed=1", "2"]  # fmt: skip
    assert take_flags(words) == (
        {"mask.train": ["last:4 head", "lora last:8"], "train.seed": ["1", "2"]},
        ["--config", "x", "--train.epochs", "2"],
    )
    for faulty, message in ((["--sweep.train.seed"], "has no value"), (["--sweep.a", "1", "--sweep.a", "2"], "twice")):
        with pytest.raises(ConfigError, match=message):
            take_flags(faulty)


def test_a_mapping_may_be_a_word() -> None:
    words = {"mask.rotation": ["{method: badam, every_steps: 2}", "none"]}
    found = trial_configs(RunConfig(), definition_of(words, [], "sweep"), "sweep")
    assert [settings["mask.rotation"] and settings["mask.rotation"]["method"] for settings, _ in found] == [
        "badam", None,
    ]  # fmt: skip


def test_each_trial_is_combined_with_the_grid() -> None:
    definition = definition_of(
        {"train.seed": [1, 2]},
        [{"mask.train": "last:2", "train.learning_rate": "1e-5"}, {"mask.train": [{"lora": {"select": "last:4"}}]}],
        "sweep",
    )
    found = trial_configs(RunConfig(), definition, "sweep")
    assert [describe(*one) for one in found] == [
        "last:2, learning_rate 1e-05, seed 1", "last:2, learning_rate 1e-05, seed 2",
        "lora16 last:4, seed 1", "lora16 last:4, seed 2",
    ]  # fmt: skip
    assert found[1][1].train.learning_rate == 1e-5
    assert found[3][1].mask.train[0].lora.select == ["last:4"]


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "unknown key": ({"train.lr": [1]}, [], r"train.lr: unknown key \(did you mean train.learning_rate\?\)"),
    "no list": ({"train.seed": 3}, [], "grid.train.seed is 3; expected a list of values"),
    "bad value": ({"train.epochs": [0, 1]}, [], "trial 1: train.epochs is 0"),
    "bad mask": ({"mask.train": ["rows head"]}, [], "mask.train 'rows head' is no mask"),
    "a default spelled out": (
        {},
        [{"mask.train": "last:2"}, {"mask.train": "last:2", "train.seed": RunConfig().train.seed}],
        "trial 2 is trial 1 again: last:2, seed",
    ),
    "no text": ({1: [2]}, [], "1 is no text; expected a recipe key"),
    "too many": ({"train.seed": [*range(40)], "train.epochs": [*range(1, 27)]}, [], "1,040 trials; expected at most"),
    "same twice": ({"train.seed": [1, "1"]}, [], "trial 2 is trial 1 again: seed 1"),
    "in both": ({"train.seed": [1]}, [{"train.seed": 2}], "train.seed: stands in grid and in trials"),
    "not a mapping": ([1], [], "grid is a list; expected grid: "),
    "not trials": ({}, [1], "trials: expected a list of mappings"),
    "own directory": ({"output.dir": ["a", "b"]}, [], "output.dir: each trial has a directory of its own"),
    "nothing": ({}, [], "nothing to sweep over"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_sweep_are_said(fault: str) -> None:
    grid, trials, message = FAULTS[fault]
    with pytest.raises(ConfigError, match=message):
        trial_configs(RunConfig(), definition_of(grid, trials, "sweep"), "sweep")


def test_what_cannot_be_swept_is_refused_before_anything_runs(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("parameters: {train.seed: {values: [1]}}")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    words = base(tiny_model, tmp_path / "sweep")
    refused: Callable[..., str] = lambda *more: run_here("sweep.py", *words, *more).stderr  # noqa: E731
    assert "parameters: unknown; expected grid: " in refused("--sweep", tmp_path / "sweep.yaml")
    assert "trial 1 (last:9): " in refused("--sweep.mask.train", "last:9")
    assert "holds no sweep" in refused("--sweep.train.seed", 1, "--output.dir", tmp_path / "used")
    (tmp_path / "used" / "sweep.json").write_text('{"format": "frostline-sweep-1", "trials": [1], "base": {}}')
    assert "is of no sweep that this version reads" in refused(
        "--sweep.train.seed", 1, "--output.dir", tmp_path / "used"
    )
    assert "data.validation is none" in refused("--sweep.train.seed", 1, "--data.validation", "none")
    assert "data.folds is set" in refused("--sweep.train.seed", 1, "--data.folds", 3)
    assert "--nodes describes a job" in refused("--sweep.train.seed", 1, "--nodes", 2)
    assert "--test scores the rows of data.test" in refused("--sweep.train.seed", 1, "--test")
    assert "trial 2: data.validation is none" in refused("--sweep.data.validation", 0.25, "none")
    assert "close or escape the quote" in refused("--sweep.train.seed", 1, "--launcher", "torchrun 'x")
    assert "has no word" in refused("--sweep.train.seed", 1, "--launcher", " ")
    assert "--table trains nothing" in refused("--sweep.train.seed", 1, "--launcher", "torchrun", "--table")
    test = ("--data.test", 0.1, "--test")
    assert "--test scores finished trials" in refused("--sweep.train.seed", 1, "--slurm", *test)
    for state in ({"recipe": 3, "base": {}}, {"recipe": {"mask": 3}, "base": {}}, {"recipe": {}, "base": {"a": 1}}):
        text = json.dumps({"format": "frostline-sweep-1", "trials": [], **state})
        (tmp_path / "used" / "sweep.json").write_text(text)
        used = refused("--sweep.train.seed", 1, "--output.dir", tmp_path / "used")
        assert "is of no sweep that this version reads" in used
    assert not (tmp_path / "sweep").exists()


def test_a_slurm_sweep_lets_the_others_wait_for_the_lowest_line(tiny_model: Path, tmp_path: Path) -> None:
    words = [*base(tiny_model, tmp_path / "sweep"), "--sweep.mask.train", *MASKS, "--slurm", "--dry-run"]
    done = run_here("sweep.py", *words, "--cpus-per-task", 2)
    assert done.returncode == 0, done.stderr
    first, others = done.stdout.split("#!/bin/bash")[1:]
    assert f"run={tmp_path}/sweep/trial-002" in first
    assert "--array" not in first
    assert "#SBATCH --array=0-1" in others
    assert "#SBATCH --dependency=afterany:JOB" in others
    assert others.index("trial-003") < others.index("trial-001")
    assert not (tmp_path / "sweep").exists()


def test_what_is_not_finished_stands_in_the_table(tiny_model: Path, tmp_path: Path) -> None:
    with opened(tiny_model, tmp_path / "sweep", SweepDefinition({"train.seed": [1, 2]})) as sweep:
        assert score_trials(sweep)
        assert markdown(sweep).count("| not finished |") == 2


def scored(value: float | None, **settings: Any) -> dict[str, Any]:
    scores = {"value": value, "low": value, "high": value, "higher_is_better": False, "rows": 3, "metric": "loss"}
    return {"validation": scores, "seconds": 1.0, "memory_gib": 1.0, "trained": 10, **settings}


@pytest.mark.parametrize("value", [float("nan"), None], ids=["as scored", "as read again"])
def test_a_score_that_is_not_finite_is_said(tiny_model: Path, tmp_path: Path, value: float | None) -> None:
    with opened(tiny_model, tmp_path / "sweep", SweepDefinition({"train.seed": [1, 2]})) as sweep:
        for trial, loss in zip(sweep.trials, (value, 2.0), strict=True):
            trial.result = scored(loss, base="these rows")
        sweep.base = {"these rows": scored(value)}
        write_report(sweep)
        table = (tmp_path / "sweep" / "sweep.md").read_text(encoding="utf-8")
    assert "| base |  |  | not finite |" in table
    assert "| 1 | seed 1 | 2 | not finite | 1.0 | 1.00 | 10 |  |" in table
    assert "| 2 | seed 2 | 2 | 2.0000 (2.0000 to 2.0000) | 1.0 | 1.00 | 10 | seconds, peak GiB, trained |" in table
    assert "nan" not in (tmp_path / "sweep" / "sweep.svg").read_text(encoding="utf-8").lower()


def test_bases_are_those_of_the_trials_and_have_their_precision(tiny_model: Path, tmp_path: Path) -> None:
    definition = SweepDefinition({"model.dtype": ["float32", "bfloat16"]})
    with opened(tiny_model, tmp_path / "sweep", definition) as sweep:
        sweep.base = {"first": scored(2.0), "second": scored(2.1), "earlier": scored(9.9)}
        for trial, base_key in zip(sweep.trials, sweep.base, strict=False):
            trial.result = scored(1.0, base=base_key)
        table = markdown(sweep)
    assert "| base 1 |  |  | 2.0000" in table
    assert "| base 2 |  |  | 2.1000" in table
    assert "9.9" not in table
    assert "held out different rows" not in table


def test_text_of_several_lines_stays_in_its_row(tiny_model: Path, tmp_path: Path) -> None:
    definition = SweepDefinition({"data.group_by": ["a\nb", "c"]})
    with opened(tiny_model, tmp_path / "sweep", definition) as sweep:
        assert "| 1 | group_by a b | 2 | not finished |" in markdown(sweep)


@pytest.mark.slow
def test_a_sweep_trains_each_trial_in_a_process_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    words = [*base(tiny_model, tmp_path / "sweep"), "--sweep.mask.train", "last:1", "last:4 head"]
    done = run_script("launch/sweep.py", *words)
    assert done.returncode == 0, done.stderr
    assert "missing samples begins at block 2" in done.stderr
    peaks = [trial["memory_gib"] for trial in state(tmp_path / "sweep")["trials"]]
    assert len(set(peaks)) == 2
    assert "| 2 | last:4 head | 2 | " in done.stdout


@pytest.mark.slow
def test_the_benchmark_compares_the_same_trials(
    tiny_model: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_turn(command: list[str], log: Path) -> Finished:
        done = run_here("sweep.py", *command[2:])
        log.write_text(done.stderr, encoding="utf-8")
        return Finished(done.returncode, 1.0, 0, {})

    monkeypatch.setattr(benchmark, "run_process", in_turn)
    uncached, cached = (benchmark.run_sweep(tmp_path, way, 4, 2, str(tiny_model), ENGLISH) for way in ("off", "auto"))
    assert [trial["settings"] for trial in cached.trials] == [trial["settings"] for trial in uncached.trials]
    assert len(cached.losses) == 6
    for ours, theirs in zip(cached.losses, uncached.losses, strict=True):
        assert rms(ours, theirs) < 0.05, "the same losses, but for bfloat16"
    assert len(benchmark.bounds(uncached, cached)) == 2
    assert "\n| all " in benchmark.result_table(uncached, cached)
    assert "activation cache: off, as the recipe says" in (tmp_path / "log-off.txt").read_text(encoding="utf-8")
    assert "missing samples begins at block" in (tmp_path / "log-auto.txt").read_text(encoding="utf-8")
