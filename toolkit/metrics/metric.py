"""A metric: what each row adds to some sums, and the value that follows from the sums."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass

import numpy as np

from toolkit.runtime.errors import DataError


@dataclass(frozen=True)
class Metric:
    """A metric of some rows."""

    name: str
    statistics: np.ndarray
    """[rows, K] float64: what each row adds. A row with NaN leaves all sums, and so the value, undefined."""
    score: Callable[[np.ndarray], np.ndarray]
    """Sums [..., K] to values [...]; NaN where the value is not defined."""
    higher_is_better: bool | None = True
    """None for what is described, not judged."""

    @property
    def value(self) -> float:
        """Return the value over all rows."""
        return float(self.score(self.statistics.sum(0)))


def mean_metric(
    name: str, values: np.ndarray, weights: np.ndarray | None = None, higher_is_better: bool | None = True
) -> Metric:
    """Return the mean of a value of each row, or ``sum(values) / sum(weights)`` with a weight of each: [rows] each."""
    of_rows = np.ones(len(values)) if weights is None else weights
    return Metric(name, np.stack([values, of_rows], axis=1).astype(float), ratio, higher_is_better)


def check_rows(**given: Sized) -> None:
    """Check that there is at least one row, and as many of one thing as of another; names are those of the things.

    Raises:
        DataError: there are none, or their numbers differ.
    """
    counts = {name: len(of_rows) for name, of_rows in given.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        found = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise DataError(f"metrics were asked for of {found}; expected one of each for every row, and at least one row")


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first of two sums by the second, [..., 2] to [...]; NaN where that is 0."""
    return divide(sums[..., 0], sums[..., 1])


def divide(over: np.ndarray, under: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """Return ``over / under``, and ``otherwise`` where ``under`` is 0."""
    over, under = np.broadcast_arrays(over, under)
    divided: np.ndarray = np.divide(over, under, out=np.full(under.shape, otherwise, dtype=float), where=under != 0)
    return divided
