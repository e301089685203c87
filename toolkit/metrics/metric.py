"""A metric: what each row adds to some sums, and the value that follows from the sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Score = Callable[[np.ndarray], np.ndarray]
"""Sums […, K] to values […], NaN where the value is not defined."""


@dataclass(frozen=True)
class Metric:
    """A metric of some rows."""

    name: str
    statistics: np.ndarray
    """[rows, K] float64: what each row adds."""
    score: Score
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


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first of two sums by the second, [..., 2] to [...]; NaN where that is 0."""
    return divide(sums[..., 0], sums[..., 1])


def divide(over: np.ndarray, under: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """Return ``over / under``, and ``otherwise`` where ``under`` is 0."""
    over, under = np.broadcast_arrays(over, under)
    divided: np.ndarray = np.divide(over, under, out=np.full(under.shape, otherwise, dtype=float), where=under != 0)
    return divided
