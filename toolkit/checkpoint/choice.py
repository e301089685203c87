"""Choose a checkpoint of a run by step, ``latest`` or ``best``, and describe it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from toolkit.checkpoint.catalog import LATEST_FILE, best_of, checkpoints_of, latest_checkpoint, validation_scores
from toolkit.checkpoint.manifest import directory_name, step_of, verify
from toolkit.checkpoint.validation_score import ValidationScore
from toolkit.runtime.errors import CheckpointError

T = TypeVar("T")
Step = int | Literal["latest", "best"]
"""How a user names a checkpoint: by its step, as the latest, or as the one with the best validation score."""
_TRIES = 50
"""Most times to read a run whose checkpoints are removed faster than they are read."""


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
    return read_checkpoint(run, step, lambda choice: choice)


def read_checkpoint(run: Path, step: Step | None, read: Callable[[ChosenCheckpoint], T]) -> T:
    """Find and verify a checkpoint as ``choose_checkpoint`` does, and return what ``read`` makes of it.

    A run that trains removes checkpoints: where those that are there changed meanwhile, it begins again with the one
    that is ``latest`` (or ``best``) now.

    Raises:
        CheckpointError: the checkpoint is missing or damaged; or as ``read``.
    """

    def read_whole() -> T:
        choice = _find(run, step)
        verify(choice.checkpoint)
        return read(choice)

    return retry_while_rotating(run, read_whole)


def find_checkpoint(run: Path, step: Step | None = None) -> ChosenCheckpoint:
    """Find a checkpoint as ``choose_checkpoint`` does, and read none of its tensors.

    Raises:
        CheckpointError: the checkpoint is missing; lists those that are present.
    """
    return retry_while_rotating(run, lambda: _find(run, step))


def retry_while_rotating(run: Path, read: Callable[[], T]) -> T:
    """Call ``read``, and again after a failure if the run's checkpoints changed meanwhile, as often as ``_TRIES``."""
    for tries_left in reversed(range(_TRIES)):
        before = _identities(run)
        try:
            return read()
        except (CheckpointError, OSError):
            if _identities(run) == before or not tries_left:
                raise
    raise AssertionError("unreachable")


def _identities(run: Path) -> list[tuple[str, int, int]]:
    """Return name, inode and time of each checkpoint of a run and of the file ``latest``."""
    found = []
    for path in (*checkpoints_of(run), run / "checkpoints" / LATEST_FILE):
        with suppress(OSError):
            status = path.stat()
            found.append((path.name, status.st_ino, status.st_mtime_ns if path.name == LATEST_FILE else 0))
    return found


def _find(run: Path, step: Step | None) -> ChosenCheckpoint:
    """Find a checkpoint in the directory as it is now; see ``find_checkpoint``."""
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
