"""Early stopping: a run ends where its validation losses say so, also after an interruption, and keeps the best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import metrics, tiny_flags, train

from toolkit.checkpoint.choice import choose_checkpoint
from toolkit.checkpoint.early_stopping import has_stopped_improving
from toolkit.config.schema import TrainConfig
from toolkit.runtime import signals
from toolkit.runtime.errors import CheckpointError, ConfigError
from toolkit.training import validation
from toolkit.training.between_steps import BetweenSteps

CURVE = (3.0, 2.0, 2.5, 1.9, 2.0, 1.95, 0.1, 0.1, 0.1)
"""Two validations without a lower loss come after the sixth."""


def flags(model: Path, run: Path, *more: object) -> list[str]:
    return tiny_flags(
        model, run, "--data.validation", 0.25, "--train.epochs", 2, "--train.micro_batch_size", 1,
        "--output.evaluate_every_steps", 2, "--train.early_stopping_patience", 2, "--output.keep", 1, *more,
    )  # fmt: skip


def plant(monkeypatch: pytest.MonkeyPatch, losses: Iterator[float]) -> None:
    """Let validations find these losses."""
    evaluate = validation.evaluate_rows
    monkeypatch.setattr(validation, "evaluate_rows", lambda *given: replace(evaluate(*given), loss=next(losses)))


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "ends"),
    [
        ((3, 2, 2.5), 2, 0, False),
        ((3, 2, 2.5, 2), 2, 0, True),
        ((3, 2, 2.5, 1.9, 2), 2, 0, False),
        ((3,), 1, 0, False),
        ((3, 3), 1, 0, True),
        ((3, 2.95, 2.9), 2, 0.2, True),
        ((3, 2.95, 2.7), 2, 0.2, False),
        ((math.nan, 3), 1, 0, False),
        ((3, math.nan), 1, 0, True),
        ((math.nan, math.nan), 2, 0, True),
        ((), 1, 0, False),
    ],
)
def test_the_losses_decide(losses: Sequence[float], patience: int, threshold: float, ends: bool) -> None:
    train_config = TrainConfig(early_stopping_patience=patience, early_stopping_threshold=threshold)
    assert has_stopped_improving(losses, train_config) is ends
    assert not has_stopped_improving(losses, TrainConfig())


def test_a_run_ends_after_its_patience_and_the_best_is_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plant(monkeypatch, iter(CURVE))
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run)) == 0
    assert len(metrics(run)) == 12
    assert metrics(run, "eval_loss") == list(CURVE[:6])
    assert (
        "early stopping after step 12: in 2 validations the loss was not lower than before by over 0; best 1.9000"
        in caplog.text
    )
    assert "done: 12 steps" in caplog.text
    assert choose_checkpoint(run, "best").step == 8
    assert choose_checkpoint(run).step == 12
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-00000008", "step-00000012"}
    assert train(*flags(tiny_model, run)) == 0
    assert "this run is finished, nothing to train" in caplog.text
    assert len(metrics(run)) == 12


@pytest.mark.parametrize("stop", [7, 10, 11])
def test_an_interrupted_run_ends_where_it_would_have(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    losses = iter(CURVE)
    plant(monkeypatch, losses)
    run = tmp_path / "run"
    after_step = BetweenSteps.after_step

    def stopped(self: BetweenSteps, state: object, is_stopping: bool) -> bool:
        if self._progress.step == stop:
            signals.request_stop("a test", broadcast=False)
        return after_step(self, state, is_stopping)  # type: ignore[arg-type]

    with signals.record_signals({}):
        monkeypatch.setattr(BetweenSteps, "after_step", stopped)
        assert train(*flags(tiny_model, run)) == 75
        monkeypatch.setattr(BetweenSteps, "after_step", after_step)
    assert train(*flags(tiny_model, run)) == 0
    assert metrics(run, "eval_loss") == list(CURVE[:6])
    assert sorted(set(metrics(run, "step"))) == list(range(1, 13))
    assert len(metrics(run)) == 12
    assert choose_checkpoint(run, "best").step == 8


def test_a_run_that_ended_early_goes_on_with_more_patience(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, iter([*CURVE, *[0.1] * 9]))
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run)) == 0
    more = ("--train.early_stopping_patience", 3)
    with pytest.raises(CheckpointError, match="early_stopping_patience"):
        train(*flags(tiny_model, run, *more))
    assert train(*flags(tiny_model, run, *more, "--resume-override")) == 0
    assert metrics(run, "eval_loss")[:10] == [*CURVE[:9], 0.1]
    assert (
        len(metrics(run)) == 18
    )  # the lowest came after step 14; none was lower after 15, where an epoch ends, 16 and 18


def test_early_stopping_without_validation_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"- train.early_stopping_patience is 2.*no validation loss to watch; hold rows out with"
    ):
        train(*flags(tiny_model, tmp_path / "run", "--data.validation", "none"))
    with pytest.raises(ConfigError, match=r"does nothing without train\.early"):
        train(*tiny_flags(tiny_model, tmp_path / "run", "--train.early_stopping_threshold", 0.1))
