"""``evaluate.py --save`` puts scores where a run's curves are, and leaves what is there as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import invocation, metrics, run_here, tiny_flags, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit.commands import evaluate
from toolkit.runtime.file_lock import RunLock
from toolkit.training.run import run as train_run


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path) -> list[str]:
    """A run of 6 steps in ``tmp_path/run``, with a checkpoint and a validation every 3."""
    return tiny_flags(
        tiny_model, tmp_path / "run", "--data.validation", "0.25", "--train.max_steps", 6, "--output.keep", 9,
        "--output.save_every_steps", 3, "--output.evaluate_every_steps", 3, "--prefix.cache_dir", tmp_path / "cache",
    )  # fmt: skip


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_scores_of_each_run_are_beside_its_curves_and_training_goes_on(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*flags) == 0
    before, losses, validations = curves(run), metrics(run), metrics(run, "eval_loss")

    done = run_here("evaluate", "base", run, f"{run}@3", "--save", "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8")) == printed

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = [row for row in rows if row.get("event") == "evaluation"]
    models = {model["name"]: model for model in printed["models"]}
    assert [row["step"] for row in saved] == [6, 3]
    for row, name in zip(saved, (str(run), f"{run}@3"), strict=True):
        assert row["scores"] == {metric: score["value"] for metric, score in models[name]["scores"].items()}
        assert (row["rows"], row["held_out"]) == (5, True)
    assert saved[0]["scores"]["loss"] == pytest.approx(validations[-1], rel=1e-5)

    shown = curves(run)
    assert shown["evaluation/loss"] == [
        (step, pytest.approx(models[name]["scores"]["loss"]["value"], rel=1e-6))
        for step, name in ((6, str(run)), (3, f"{run}@3"))
    ]
    assert {tag: points for tag, points in shown.items() if not tag.startswith("evaluation/")} == before

    longer = invocation(*flags, "--train.max_steps", "8", "--resume-override")
    assert train_run(longer) == 0
    assert metrics(run, "step") == [*range(1, 4), 3, *range(4, 7), 6, 6, 3, 7, 8, 8]
    assert metrics(run)[:6] == losses
    shown = curves(run)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in shown["evaluation/loss"]] == [6, 3]


def test_no_tensorboard_is_made_for_a_run_that_has_none(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*flags, "--output.report_to", "none") == 0
    assert run_here("evaluate", run, "--save").returncode == 0
    assert (run / "evaluation.json").is_file()
    assert not (run / "tensorboard").exists()


def test_what_cannot_be_saved_is_refused_before_the_work(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train(*flags) == 0
    content = (run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(evaluate, "evaluate", lambda **_: pytest.fail("it was computed"))

    lock = RunLock.take(run)
    assert isinstance(lock, RunLock)
    done = run_here("evaluate", "base", run, "--save")
    lock.release()
    assert done.returncode == 2
    assert f"{run} is being trained: process" in done.stderr
    assert "--output FILE" in done.stderr

    done = run_here("evaluate", "base", tmp_path / "model", "--save")
    assert done.returncode == 2
    assert "--save writes into the runs among the sources" in done.stderr
    assert (run / "metrics.jsonl").read_bytes() == content
    assert not (run / "evaluation.json").exists()
