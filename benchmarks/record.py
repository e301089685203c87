"""Record the start, end and loss of each step of a contender's run, from within its process."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

SAME_LEARNING = 0.015
"""Largest RMS of the step losses' differences at which two bfloat16 loops count as learning the same.

Rounding gave 0.0076 and 0.0075 with the gradients in float32 and in bfloat16 (20 rows, 3 epochs); the largest
difference of a step, 0.018 and 0.025 there, hangs on a single rounding. AdamW on bfloat16 weights, which loses its
updates, is more than 0.05 away.
"""


def rms(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the root mean square of the differences."""
    squares = [(a - b) ** 2 for a, b in zip(found, expected, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


@dataclass
class Record:
    """Times and losses of the steps, in seconds of the training process's own clock."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    trainable: int = 0
    """Number of parameters that train."""
    gpu_peak: int = 0
    """Most bytes held on the GPU; 0 without one."""

    def start(self) -> None:
        """Note that a step begins."""
        self.starts.append(time.perf_counter())

    def end(self) -> None:
        """Note that a step has ended; call it once the device has finished, too."""
        self.ends.append(time.perf_counter())

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Record:
        """Read a record that ``save`` wrote."""
        return Record(**json.loads(path.read_text(encoding="utf-8")))
