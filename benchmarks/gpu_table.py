"""What the parts of ``benchmarks/gpu.py`` share: lines of the table, the sizes of what is measured, and clocks."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.floors import synchronise
from benchmarks.shapes import EXAONE_2_4B, EXAONE_32B, Shape

Case = tuple[int, int, int]
"""Rows, tokens a row and supervised tokens a row of a batch."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: str
    bound: str = ""
    holds: bool | None = None
    """Whether the bound holds; None for a row without a bound."""

    @property
    def cells(self) -> list[str]:
        """Return the line's cells."""
        return [self.what, self.value, self.bound, {None: "", True: "ok", False: "MISS"}[self.holds]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured."""

    copied: int
    """Bytes of the tensor that is copied within the device."""
    product: int
    """Rows and columns of the square matrices that are multiplied."""
    sent: int
    """Bytes that go from the host to the device."""
    loss: tuple[int, int, int]
    """S supervised positions, V tokens of the vocabulary, H hidden size."""
    updated: int
    """Elements that an optimizer updates."""
    shape: Shape
    """Of the model whose steps are timed."""
    batches: tuple[Case, ...]
    """Timed batches."""
    rows: int
    """Rows of the short runs, of which a quarter is held out."""
    large: Shape
    """Of the model whose frozen blocks are streamed to the device."""
    filled: Case
    """The batch of its first pass; its steps take one row each."""
    has_aims: bool = False
    """Whether times are held to what Frostline aims at; not where they are those of calls alone."""


FULL = Sizes(
    2**31, 8192, 8 * 2048 * 2560 * 2, (2048, 102_400, 2560), 214_016 * 2560, EXAONE_2_4B,
    ((1, 700, 60), (1, 700, 699), (8, 2048, 256), (4, 2048, 2047)), 20, EXAONE_32B, (26, 1000, 60), has_aims=True,
)  # fmt: skip
TINY = Sizes(
    2**20, 64, 2**16, (16, 256, 16), 2**16, Shape(32, 6, 4, 2, 64, 260), ((1, 32, 8), (2, 32, 16)), 4,
    Shape(32, 8, 4, 2, 64, 260), (4, 32, 8),
)  # fmt: skip
"""So small that the script itself is tried."""


def median_ms(work: Callable[[], object], device: torch.device, repeats: int = 5, warm_up: int = 2) -> float:
    """Return the median time of several runs in milliseconds, the device's work included."""
    times = []
    for _ in range(warm_up + repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_up:]) * 1e3


def has_bitsandbytes() -> bool:
    """Return whether bitsandbytes is installed, which the 8-bit optimizers and 4-bit weights need."""
    return importlib.util.find_spec("bitsandbytes") is not None
