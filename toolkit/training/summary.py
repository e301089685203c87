"""What a run says of itself when it is done."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from toolkit.training.monitor import peak_memory_gib


@dataclass(frozen=True)
class MemoryUse:
    """What one rank's memory held at its peak."""

    peak: float
    """GiB; see ``toolkit.training.monitor.peak_memory_gib``."""
    libraries: float | None
    """GiB of Python and what it had imported, measured before the model was loaded; none on a GPU, where only what
    torch's allocator gave counts."""

    @classmethod
    def now(cls, device: torch.device, libraries: int) -> MemoryUse:
        """Of this process so far.

        Args:
            device: it computes on.
            libraries: bytes of ``MemoryUse.libraries``.
        """
        return cls(peak_memory_gib(device), None if device.type == "cuda" else libraries / 2**30)

    def text(self, planned: float | None) -> str:
        """In words, for the last line of a run.

        Args:
            planned: GiB of tensors that the run was planned to have at its peak; none where it could not be planned.
        """
        what = "peak memory" if self.libraries is not None else "peak GPU memory"
        parts = []
        if self.libraries is not None:
            parts.append(f"{self.libraries:.2f} Python and libraries before the model")
        since = self.peak - (self.libraries or 0.0)
        if planned is None:
            parts.append(f"{since:.2f} since" if parts else "as torch allocated it; it could not be planned")
        elif since >= planned:
            parts += [f"{planned:.2f} tensors as planned", f"{since - planned:.2f} other"]
        else:
            parts.append(f"{since:.2f} since, where {planned:.2f} of tensors were planned")
        return f"{what} {self.peak:.2f} GiB ({', '.join(parts)})"


def highest(uses: Sequence[MemoryUse]) -> MemoryUse:
    """Of all ranks, the one with the highest peak."""
    return max(uses, key=lambda use: use.peak)


def grown_by(module: str) -> int:
    """Import ``module``; how many bytes of memory that has taken."""
    before = resident_bytes()
    importlib.import_module(module)
    return resident_bytes() - before


def resident_bytes() -> int:
    """Memory that this process has now."""
    return int(psutil.Process().memory_info().rss)
