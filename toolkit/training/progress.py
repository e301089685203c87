"""Count how far a run is in steps, epochs and rows, and sum losses and tokens on the way."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from toolkit.checkpoint.state import CheckpointState
from toolkit.checkpoint.validation_score import ValidationScore
from toolkit.data.batches import epoch_order
from toolkit.training.step import StepResult

_EPOCH_SUMS = ("epoch_steps", "epoch_finite", "epoch_loss", "epoch_skipped")
_SUMS = ("tokens", "supervised_tokens", "seconds", *_EPOCH_SUMS)


@dataclass
class Progress:
    """A position between two steps."""

    rows: int
    """Training rows."""
    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done."""
    cursor: int = 0
    """Rows of the next epoch that are done, over all ranks, in the order of its permutation."""
    score: ValidationScore | None = None
    """What a validation after the last step gave; None where there was none."""
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    """Sums since the run began, those named ``epoch_…`` since the epoch began, and the mean loss of each epoch done.
    ``epoch_loss`` sums the ``epoch_finite`` losses that were finite; ``epoch_skipped`` counts steps without effect."""

    @classmethod
    def of(cls, state: CheckpointState) -> Progress:
        """Return the position of a checkpoint.

        One that an earlier version wrote in the middle of an epoch does not tell how many losses it summed: the mean
        loss of that epoch is then taken over the steps to come.
        """
        totals = {**dict.fromkeys(_SUMS, 0.0), **state.totals}
        if "epoch_finite" not in state.totals:
            totals |= dict.fromkeys(_EPOCH_SUMS, 0.0)
        return cls(state.rows, state.step, state.epoch, state.cursor, totals=totals)

    @property
    def passes(self) -> float:
        """Passes over the rows, as a fraction."""
        return self.epoch + self.cursor / self.rows

    @property
    def is_epoch_done(self) -> bool:
        """True if the last step took the epoch's last row, and ``next_epoch`` has yet to be called."""
        return self.cursor == self.rows

    @property
    def epoch_loss(self) -> float:
        """Mean of the finite step losses of the current epoch; NaN if there is none."""
        return self.totals["epoch_loss"] / self.totals["epoch_finite"] if self.totals["epoch_finite"] else math.nan

    def epoch_losses(self) -> list[float | None]:
        """Return the mean loss of each epoch so far, None where it is unknown: before a resume from an old version."""
        losses = [self.totals.get(_mean_loss(epoch)) for epoch in range(self.epoch)]
        return [*losses, self.epoch_loss] if self.totals["epoch_finite"] else losses

    def add(self, result: StepResult, global_batch: int) -> None:
        """Count a step of at most ``global_batch`` rows."""
        self.step += 1
        self.cursor = min(self.cursor + global_batch, self.rows)
        self.score = None
        is_finite = math.isfinite(result.loss)
        amounts = {
            "tokens": result.tokens, "supervised_tokens": result.supervised_tokens, "seconds": result.seconds,
            "epoch_steps": 1, "epoch_finite": is_finite, "epoch_loss": result.loss if is_finite else 0.0,
            "epoch_skipped": result.skipped,
        }  # fmt: skip
        for name, amount in amounts.items():
            self.totals[name] += amount

    def next_epoch(self) -> None:
        """Keep the mean loss of the epoch that is done, and go on to the next one."""
        if self.totals["epoch_finite"]:
            self.totals[_mean_loss(self.epoch)] = self.epoch_loss
        self.epoch, self.cursor = self.epoch + 1, 0
        self.totals |= dict.fromkeys(_EPOCH_SUMS, 0.0)


def _mean_loss(epoch: int) -> str:
    """Return the name of an epoch's mean loss among the totals; ``epoch`` counts from 0, the name from 1."""
    return f"mean_loss_{epoch + 1}"


def order_digest(rows: int, seed: int, epoch: int) -> str:
    """Return the SHA-256 of the permutation that an epoch follows."""
    return hashlib.sha256(epoch_order(rows, seed, epoch).tobytes()).hexdigest()
