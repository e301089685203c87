"""Choose a checkpoint of a run by step, ``latest`` or ``best``, and describe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkit.checkpoint.catalog import best_of, checkpoints_of, latest_checkpoint, validation_scores
from toolkit.checkpoint.manifest import directory_name, step_of, verify
from toolkit.checkpoint.validation_score import ValidationScore
from toolkit.runtime.errors import CheckpointError

Step = int | Literal["latest", "best"]
"""How a user names a checkpoint: by its step, as the latest, or as the one with the best validation score."""


@dataclass(frozen=True)
class ChosenCheckpoint:
    """A checkpoint of a run, compared with the run's latest and best one."""

    checkpoint: Path
    score: ValidationScore | None
    """Its validation score; None if it was not computed or is not finite."""
    is_latest: bool
    best: Path | None
    """The run's checkpoint with the best validation score; None if no checkpoint has one."""
    best_score: ValidationScore | None

    @property
    def step(self) -> int:
        """Return the number of optimizer steps it was trained for."""
        return step_of(self.checkpoint)

    @property
    def better(self) -> Path | None:
        """Return the best checkpoint if it is another one with a better validation score, else None."""
        is_better = self.score is None or (self.best_score is not None and self.best_score.rank < self.score.rank)
        return self.best if self.best != self.checkpoint and is_better else None

    @property
    def text(self) -> str:
        """Return a description such as ``step 116 (latest; validation loss 0.9060)``."""
        labels = [name for name, true in (("latest", self.is_latest), ("best", self.best == self.checkpoint)) if true]
        score = self.score.text if self.score is not None else "no validation loss"
        return f"step {self.step} ({'; '.join([*([' and '.join(labels)] if labels else []), score])})"

    def advice(self, note: str) -> str:
        """Return ``text``, followed by the better checkpoint, if there is one, and a note such as how to choose it."""
        if self.better is None or self.best_score is None:
            return self.text
        return f"{self.text}; best is step {step_of(self.better)} ({self.best_score.deciding}): {note}"


def choose_checkpoint(run: Path, step: Step | None = None) -> ChosenCheckpoint:
    """Find and verify a checkpoint of a run: that of ``step``, or the latest.

    Raises:
        CheckpointError: the checkpoint is missing (lists those that are present) or damaged.
    """
    choice = find_checkpoint(run, step)
    verify(choice.checkpoint)
    return choice


def find_checkpoint(run: Path, step: Step | None = None) -> ChosenCheckpoint:
    """Find a checkpoint as ``choose_checkpoint`` does, and read none of its tensors.

    Raises:
        CheckpointError: the checkpoint is missing; lists those that are present.
    """
    scores, latest = validation_scores(checkpoints_of(run)), latest_checkpoint(run)
    best = best_of(scores)
    if latest is None:
        raise CheckpointError(f"{run} has no committed checkpoint yet; expected a run that finished an epoch")
    present = ", ".join(path.name for path in checkpoints_of(run))
    if isinstance(step, int):
        checkpoint = run / "checkpoints" / directory_name(step)
    elif step != "best":
        checkpoint = latest
    elif best is not None:
        checkpoint = best
    else:
        raise CheckpointError(
            f"{run} has no checkpoint with a validation loss, so none is known to be the best; present: {present}. "
            "Take one of them by its number, or the latest; with data.validation a run computes that loss"
        )
    if not checkpoint.is_dir():
        raise CheckpointError(f"{run} has no checkpoint of step {step}; present: {present}")
    return ChosenCheckpoint(
        checkpoint, scores.get(checkpoint), checkpoint == latest, best, scores[best] if best else None
    )
