"""How far a run is: in steps, epochs and rows, with what it has added up on the way."""

from __future__ import annotations

import hashlib
import math
from array import array
from dataclasses import dataclass, field

from toolkit.checkpoint.state import CheckpointState
from toolkit.data.batches import epoch_order
from toolkit.training.step import StepResult

_SUMS = ("tokens", "supervised_tokens", "seconds", "epoch_steps", "epoch_loss")


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
    eval_loss: float | None = None
    """Validation loss after the last step; none where it was not computed."""
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    """Sums since the run began; those that begin with ``epoch_`` since the epoch began."""

    @classmethod
    def of(cls, state: CheckpointState) -> Progress:
        """The position of a checkpoint."""
        totals = {**dict.fromkeys(_SUMS, 0.0), **state.totals}
        return cls(state.rows, state.step, state.epoch, state.cursor, totals=totals)

    @property
    def passes(self) -> float:
        """Passes over the rows, as a fraction."""
        return self.epoch + self.cursor / self.rows

    @property
    def is_epoch_done(self) -> bool:
        """The last step took the epoch's last row; ``turn`` has yet to be called."""
        return self.cursor == self.rows

    def add(self, result: StepResult, global_batch: int) -> None:
        """Count a step of at most ``global_batch`` rows."""
        self.step += 1
        self.cursor = min(self.cursor + global_batch, self.rows)
        self.eval_loss = None
        loss = result.loss if math.isfinite(result.loss) else 0.0
        for name, value in zip(
            _SUMS, (result.tokens, result.supervised_tokens, result.seconds, 1.0, loss), strict=True
        ):
            self.totals[name] += value

    def turn(self) -> None:
        """Go over to the next epoch."""
        self.epoch, self.cursor = self.epoch + 1, 0
        self.totals |= {name: 0.0 for name in _SUMS if name.startswith("epoch_")}


def order_digest(rows: int, seed: int, epoch: int) -> str:
    """SHA-256 of the permutation that an epoch follows."""
    return hashlib.sha256(array("q", epoch_order(rows, seed, epoch)).tobytes()).hexdigest()
