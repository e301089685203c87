"""Intervals and paired differences by the bootstrap (Efron 1979), and Holm's correction for many metrics."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.metrics.metric import Metric
from toolkit.runtime.errors import DataError

RESAMPLES = 1000
LEAST_UNITS = 50
"""Independent rows or groups below which no difference is claimed."""
_TAILS = 2.5, 97.5
"""Percentiles between which 95 % of the resamples lie."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, NaN if it has none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A difference with its 95 % interval over the same resamples of both."""

    p: float
    """Probability of a difference so far from 0 where there is none, two-sided; never 0."""


@dataclass(frozen=True)
class OverSeeds:
    """Values of one metric over runs that differ in their training seed alone."""

    mean: float
    deviation: float | None
    """Sample standard deviation, by n - 1; None of a single run."""
    lowest: float
    highest: float
    n: int


def resample_weights(
    rows: int, groups: Sequence[Hashable] | None = None, seed: int = 42, resamples: int = RESAMPLES
) -> np.ndarray:
    """Draw resamples with replacement; return how often each takes each row: [resamples, rows].

    With ``groups`` whole groups are drawn, whose rows are not independent of each other: all rows with one value. Needs
    ``8 x resamples x rows`` bytes, twice while it draws.

    Raises:
        DataError: there are no rows, or other groups than rows.
    """
    if rows < 1 or (groups is not None and len(groups) != rows):
        of = "" if groups is None else f" with the groups of {len(groups)}"
        raise DataError(f"resamples were asked for of {rows} rows{of}; expected at least one row, and a group for each")
    labels = range(rows) if groups is None else groups
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    drawn = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples)
    return drawn[:, [numbers[label] for label in labels]].astype(float)


def bootstrap(metric: Metric, weights: np.ndarray) -> Interval:
    """Return a metric with its percentile interval over the resamples [resamples, rows].

    Raises:
        DataError: the resamples are of another number of rows.
    """
    _check(metric, weights)
    return Interval(metric.value, *_tails(metric.score(weights @ metric.statistics)))


def compare(ours: Metric, base: Metric, weights: np.ndarray) -> Difference:
    """Return how much ``ours`` is above ``base`` on the same rows, over the same resamples.

    Its p-value is twice the share of resamples on the other side of 0, each end counted in (Davison & Hinkley 1997).
    Resamples in which one of them is not defined are left out.

    Raises:
        DataError: the resamples are of another number of rows than one of the metrics.
    """
    _check(ours, weights)
    _check(base, weights)
    resampled = ours.score(weights @ ours.statistics) - base.score(weights @ base.statistics)
    resampled = resampled[np.isfinite(resampled)]
    value = ours.value - base.value
    if not len(resampled):
        return Difference(value, np.nan, np.nan, 1.0)
    least = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return Difference(value, *_tails(resampled), min(1.0, 2 * (least + 1) / (len(resampled) + 1)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values adjusted for their number (Holm 1979), which keeps the chance of any false claim at 5 %."""
    adjusted, highest = dict[str, float](), 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = highest
    return adjusted


def claim(difference: Difference, higher_is_better: bool, units: int, p: float) -> str:
    """Say what a difference shows, at 5 %: better, worse, no difference shown, or too few rows.

    ``units`` are the rows, or groups, that are independent of each other; ``p`` is the p-value, adjusted or not. Value
    and interval have to lie on one side of 0: a metric that resampling shifts, such as ``ece``, may have them on two.
    """
    if units < LEAST_UNITS:
        return "too few rows"
    points = np.array([difference.low, difference.value, difference.high])
    if not p <= 0.05 or not ((points > 0).all() or (points < 0).all()):  # neither, if one is NaN
        return "no difference shown"
    return "better" if (difference.value > 0) == higher_is_better else "worse"


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Return how a metric varies over training seeds, which resampling the rows of one run does not tell.

    Raises:
        DataError: there are no values.
    """
    if not values:
        raise DataError("a metric over training seeds has no values; expected that of at least one run")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return OverSeeds(float(np.mean(values)), deviation, float(np.min(values)), float(np.max(values)), len(values))


def _check(metric: Metric, weights: np.ndarray) -> None:
    if len(metric.statistics) != weights.shape[-1]:
        raise DataError(
            f"{metric.name} is of {len(metric.statistics)} rows, and the resamples of {weights.shape[-1]}; expected "
            "resamples of the same rows"
        )


def _tails(resampled: np.ndarray) -> tuple[float, float]:
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return np.nan, np.nan
    low, high = np.percentile(finite, _TAILS)
    return float(low), float(high)
