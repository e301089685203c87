"""What a contender writes down about its own run: when each step started and ended, and its loss."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Record:
    """Filled in by a training process step by step, in seconds of its own clock."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    trainable: int = 0
    """Number of parameters that train."""
    gpu_peak: int = 0
    """Most bytes held on the GPU; 0 without one."""

    def start(self) -> None:
        """A step begins."""
        self.starts.append(time.perf_counter())

    def end(self) -> None:
        """The step is done, on the device too."""
        self.ends.append(time.perf_counter())

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Record:
        """What ``save`` wrote."""
        return Record(**json.loads(path.read_text(encoding="utf-8")))
