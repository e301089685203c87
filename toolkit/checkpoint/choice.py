"""Choose a checkpoint of a run by step, ``latest`` or ``best``, and describe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkit.checkpoint.catalog import best_of, checkpoints_of, latest_checkpoint, validation_losses
from toolkit.checkpoint.manifest import directory_name, verify
from toolkit.runtime.errors import CheckpointError

Step = int | Literal["latest", "best"]
"""How a user names a checkpoint: by its step, as the latest, or as the one with the lowest validation loss."""


@dataclass(frozen=True)
class ChosenCheckpoint:
    """A checkpoint of a run, compared with the run's latest and best one."""

    checkpoint: Path
    loss: float | None
    """Its validation loss; None if it was not computed or is not finite."""
    is_latest: bool
    best: Path | None
    """The run's checkpoint with the lowest validation loss; None if no checkpoint has one."""
    best_loss: float | None

    @property
    def step(self) -> int:
        """Return the number of optimizer steps it was trained for."""
        return _step_of(self.checkpoint)

    @property
    def better(self) -> Path | None:
        """Return the best checkpoint if it is another one with a lower validation loss, else None."""
        is_lower = self.loss is None or (self.best_loss is not None and self.best_loss < self.loss)
        return self.best if self.best != self.checkpoint and is_lower else None

    @property
    def text(self) -> str:
        """Return a description such as ``step 116 (latest; validation loss 0.9060)``."""
        labels = [name for name, true in (("latest", self.is_latest), ("best", self.best == self.checkpoint)) if true]
        loss = f"validation loss {self.loss:.4f}" if self.loss is not None else "no validation loss"
        return f"step {self.step} ({'; '.join([*([' and '.join(labels)] if labels else []), loss])})"

    def advice(self, note: str) -> str:
        """Return ``text``, followed by the better checkpoint, if there is one, and a note such as how to choose it."""
        if self.better is None:
            return self.text
        return f"{self.text}; best is step {_step_of(self.better)} ({self.best_loss:.4f}): {note}"


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
    losses, latest = validation_losses(checkpoints_of(run)), latest_checkpoint(run)
    best = best_of(losses)
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
        checkpoint, losses.get(checkpoint), checkpoint == latest, best, losses[best] if best else None
    )


def _step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's directory name."""
    return int(checkpoint.name.removeprefix("step-"))
