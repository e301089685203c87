"""What each rank tells the others with a step's loss: its memory, signals, and how far its checkpoint is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class RankStatus(NamedTuple):
    """State of a rank at the end of a step, or of all ranks together; each field is a number or a truth value."""

    peak_memory_gib: float = 0.0
    """Highest memory so far, as in ``metrics.jsonl``."""
    is_stopping: float = False
    """Whether a signal asked to stop."""
    has_written: float = False
    """Whether the files of the checkpoint that is being saved in the background are written; False if there is none."""

    @classmethod
    def of_all(cls, ranks: Sequence[Sequence[float]]) -> RankStatus:
        """Return the status of all ranks: the most memory, a signal to any, and files written by every one."""
        memory, stopping, written = zip(*ranks, strict=True)
        return cls(max(memory), bool(max(stopping)), bool(min(written)))
