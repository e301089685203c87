"""Between two steps: commit, validate, prune, answer, in this order; nothing is lost wherever a run ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import edit_state
from helpers import metrics, run_ranks, tiny_flags, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit.checkpoint import catalog, saver
from toolkit.checkpoint.validation_score import ValidationScore, read_validation_score
from toolkit.training import between_steps, validation
from toolkit.training.monitor import Monitor

MODES = pytest.mark.parametrize("background", ["false", "true"])
SHORT = (
    "--data.validation", "0.25", "--train.max_steps", 6, "--output.save_every_steps", 2,
    "--output.evaluate_every_steps", 2, "--output.sample_answers", 1, "--output.sample_tokens", 2, "--prefix.cache",
    "off", "--mask.train", "norm", "head", "--train.learning_rate", "3e-2",
)  # fmt: skip


class Killed(BaseException):
    """Ends a run as a kill does: nothing here catches it."""


def flags(model: Path, run: Path, *more: object) -> list[str]:
    return tiny_flags(model, run, *SHORT, *more)


def left(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*flags(tiny_model, run)) == 0
    losses = metrics(run, "eval_loss")
    assert (run / "checkpoints" / "best").read_text() == f"step-{2 + 2 * losses.index(min(losses)):08d}"
    return run


def watch(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Call ``before`` with the name of each part of what is done between two steps, just before it is done."""

    def watched(owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            before(part)
            return original(*given, **options)

        monkeypatch.setattr(owner, name, call)

    watched(saver.Saver, "save", "commit")
    watched(between_steps, "validate", "validate")
    watched(saver, "write_validation_score", "keep the loss")
    watched(catalog, "prune", "prune")
    watched(Monitor, "evaluation", "tell the loss")
    watched(between_steps, "sample_answers", "answer")


PARTS = ["commit", "validate", "tell the loss", "keep the loss", "prune", "answer"]


@MODES
def test_each_point_commits_validates_prunes_and_answers_in_this_order(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, background: str
) -> None:
    seen: list[str] = []
    watch(monkeypatch, seen.append)
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run, "--output.async_save", background)) == 0
    assert seen == PARTS * 3
    assert left(run) == left(whole)
    assert metrics(run, "eval_loss") == metrics(whole, "eval_loss")


@pytest.mark.parametrize(("point", "background"), [(1, "false"), (2, "true"), (3, "false")])
@pytest.mark.parametrize("part", PARTS[1:])
def test_a_run_that_ends_between_two_parts_loses_nothing_and_repeats_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, part: str, point: int,
    background: str,
) -> None:  # fmt: skip
    seen: list[str] = []

    def kill(now: str) -> None:
        seen.append(now)
        if now == part and seen.count(now) == point:
            raise Killed

    given = flags(tiny_model, tmp_path / "run", "--output.async_save", background)
    with monkeypatch.context() as patch:
        watch(patch, kill)
        with pytest.raises(Killed):
            train(*given)
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert latest == f"step-{2 * point:08d}", "the state was committed first"
    again: list[str] = []
    with monkeypatch.context() as patch:
        watch(patch, again.append)
        assert train(*given) == 0
    computed = seen.count("validate") - (part == "validate") + again.count("validate")
    assert computed == 3 + (part == "tell the loss"), "only what nobody has written down is computed again"
    for key in ("step", "loss", "eval_loss"):
        assert metrics(tmp_path / "run", key) == metrics(whole, key)
    assert left(tmp_path / "run") == left(whole)
    assert (tmp_path / "run/checkpoints/best").read_text() == (whole / "checkpoints/best").read_text()


def test_a_validation_that_fails_loses_no_epoch(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the validation failed")

    with monkeypatch.context() as patch:
        patch.setattr(between_steps, "validate", fail)
        with pytest.raises(RuntimeError, match="the validation failed"):
            train(*flags(tiny_model, tmp_path / "run", "--output.async_save", "true"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000002"
    assert train(*flags(tiny_model, tmp_path / "run")) == 0
    assert metrics(tmp_path / "run", "eval_loss") == metrics(whole, "eval_loss")


@pytest.mark.parametrize("error", [RuntimeError("no\nidea"), RuntimeError("out of memory"), MemoryError("none left")])
def test_answers_that_fail_are_said_once_and_training_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, said: list[str], error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(validation, "complete_together", fail)
    assert train(*flags(tiny_model, tmp_path / "run")) == 0
    words = " ".join(str(error).split())
    assert [line for line in said if "sample answers" in line] == [
        f"sample answers failed (FrostlineError: rank 0, {type(error).__name__}: {words}); training goes on, and none "
        "are shown any more"
    ]
    assert metrics(tmp_path / "run", "eval_loss") == metrics(whole, "eval_loss")


def test_a_signal_while_answers_are_written_stops_with_the_loss_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    complete = validation.complete_together

    def signalled(*given: Any, **options: Any) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return complete(*given, **options)

    given = flags(tiny_model, tmp_path / "run", "--output.save_every_steps", 5)  # the first point commits nothing
    with monkeypatch.context() as patch:
        patch.setattr(validation, "complete_together", signalled)
        assert train(*given) == 75
    assert metrics(tmp_path / "run", "step") == [1, 2, 2]
    again: list[str] = []
    with monkeypatch.context() as patch:
        watch(patch, again.append)
        assert train(*given) == 0
    assert again.count("validate") == 2
    assert metrics(tmp_path / "run", "eval_loss") == metrics(whole, "eval_loss")


def test_a_finished_run_whose_last_validation_is_missing_makes_it_up_and_is_then_finished(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], whole: Path
) -> None:
    given = flags(tiny_model, tmp_path / "run")
    assert train(*given) == 0
    (tmp_path / "run/checkpoints/step-00000006/evaluation.json").unlink()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:-1]))
    assert train(*given) == 0
    assert metrics(tmp_path / "run", "eval_loss") == metrics(whole, "eval_loss")
    assert metrics(tmp_path / "run") == metrics(whole)
    monkeypatch.setattr("toolkit.training.run.prepare", lambda *_: pytest.fail("it was loaded"))
    assert train(*given) == 0
    assert any("this run is finished" in line for line in said)


def test_checkpoints_that_keep_their_loss_in_the_state_are_read_as_ever(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run, "--output.keep", 9)) == 0
    for step, loss in ((2, 5.0), (4, 1.0), (6, 3.0)):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        (checkpoint / "evaluation.json").unlink()
        edit_state(checkpoint, eval_loss=loss)
        assert read_validation_score(checkpoint) == ValidationScore(loss)
    (run / "checkpoints" / "best").unlink()
    monkeypatch.setattr(between_steps, "validate", lambda *_: pytest.fail("it was validated again"))
    assert train(*flags(tiny_model, run)) == 0
    assert (run / "checkpoints" / "best").read_text() == "step-00000004"
    assert left(run) == {"latest", "best", "step-00000004", "step-00000006"}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text.replace("0", "1"), "SHA-256"),
        (lambda text: text[:9], "Expecting"),
        (lambda text: "[]", "integer"),
        (lambda text: text + " ", "SHA-256"),
    ],
)
def test_a_loss_that_was_changed_is_named_and_computed_again(
    tiny_model: Path, tmp_path: Path, whole: Path, said: list[str], damage: Callable[[str], str], why: str
) -> None:
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run)) == 0
    kept = run / "checkpoints" / "step-00000006" / "evaluation.json"
    kept.write_text(damage(kept.read_text()))
    assert read_validation_score(kept.parent) is None
    assert any("evaluation.json is not used" in line and why in line for line in said)
    assert train(*flags(tiny_model, run)) == 0
    assert metrics(run, "eval_loss") == metrics(whole, "eval_loss")
    assert read_validation_score(kept.parent) == ValidationScore(metrics(whole, "eval_loss")[-1])


def test_a_loss_never_speaks_for_another_checkpoint(tiny_model: Path, tmp_path: Path, said: list[str]) -> None:
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run, "--output.keep", 9)) == 0
    two, four = (run / "checkpoints" / f"step-{step:08d}" for step in (2, 4))
    (two / "evaluation.json").write_bytes((four / "evaluation.json").read_bytes())
    assert read_validation_score(two) is None
    assert any("it belongs to another checkpoint" in line for line in said)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_3_goes_on_from_a_stop_while_a_validation_was_due(tiny_model: Path, tmp_path: Path) -> None:
    """The run that goes on gathers the suffix for answers before its first step, from forward passes alone."""
    ds = ("--ds", "ds_configs/zero3.json", "--output.save_every_steps", "none", "--mask.train", "last:2", "head")
    stopped, undisturbed = (flags(tiny_model, tmp_path / name, *ds) for name in ("stopped", "undisturbed"))
    first = run_ranks("tests/between_worker.py", "stop-at-2", *stopped)
    assert metrics(tmp_path / "stopped", "step") == [1, 2], first.stderr[-3000:]
    for given in (stopped, undisturbed):
        result = run_ranks("launch/train.py", *given)
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    for key in ("step", "loss", "eval_loss"):
        assert metrics(tmp_path / "stopped", key) == metrics(tmp_path / "undisturbed", key)
    board = EventAccumulator(str(tmp_path / "stopped" / "tensorboard")).Reload()
    assert [event.step for event in board.Tensors("answers/text_summary")] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_answers_that_fail_on_one_rank_hang_no_other(tiny_model: Path, tmp_path: Path, stage: int) -> None:
    given = flags(tiny_model, tmp_path / "run", "--ds", f"ds_configs/zero{stage}.json", "--output.sample_answers", 2)
    result = run_ranks("tests/between_worker.py", "answers-fail", *given)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    words = "sample answers failed (FrostlineError: rank 1, RuntimeError: no room for a key-value cache)"
    assert (result.stdout + result.stderr).count(words) == 1
    assert len(metrics(tmp_path / "run", "eval_loss")) == 3
