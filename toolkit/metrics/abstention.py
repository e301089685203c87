"""Metrics of abstaining: how often a model is wrong where it is surest, and what share of the rows that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolkit.metrics.metric import Metric, check_rows, divide

MOST_LEVELS = 200
"""Most levels of confidence that are told apart; of more, those between two quantiles count as one."""
COVERAGE = 0.8
"""Share of the rows, the surest ones, of ``accuracy_at_80``."""
_STEPS = 10


@dataclass(frozen=True)
class CoveragePoint:
    """States what answering only where a model is sure enough gives."""

    confidence: float
    """Least probability of the likeliest class at which the model answers."""
    coverage: float
    """Share of the rows that it answers."""
    risk: float
    """Share of these that are wrong."""
    under: float
    """Share of these that are below the right class."""
    over: float
    """Share of these that are above it."""


def coverage_metrics(truth: np.ndarray, probabilities: np.ndarray) -> list[Metric]:
    """Return the metrics of abstaining below a confidence, which is the largest probability of a row.

    ``aurc``: area under the curve of risk, the share of errors among what is answered, against coverage, the share that
    is answered (Geifman and El-Yaniv 2017, arXiv 1705.08500); lower is better, and the error rate is that of a model
    whose confidence says nothing. ``accuracy_at_80``: accuracy on the 80 % of the rows of which the model is surest; a
    level of confidence is taken whole. Rows that are equally sure are answered together.

    Args:
        truth: [rows] number of the right class.
        probabilities: [rows, classes]; a row of NaN leaves both undefined.

    Raises:
        DataError: there are no rows, or others than in ``truth``.
    """
    check_rows(labels=truth, probabilities=probabilities)
    confidence = probabilities.max(1)
    edges = np.unique(confidence[~np.isnan(confidence)])
    if len(edges) > MOST_LEVELS:
        edges = np.unique(np.quantile(confidence[~np.isnan(confidence)], np.linspace(0, 1, MOST_LEVELS + 1))[1:])
    levels = max(len(edges), 1)
    at = levels - 1 - np.searchsorted(edges, confidence).clip(0, levels - 1)  # the surest first
    of_levels = np.zeros((len(truth), levels, 2))
    of_levels[np.arange(len(truth)), at] = np.stack([np.ones(len(truth)), probabilities.argmax(1) != truth], axis=1)
    of_levels[np.isnan(confidence)] = np.nan
    statistics = of_levels.reshape(len(truth), -1)
    return [
        Metric("aurc", statistics, _aurc, higher_is_better=False),
        Metric("accuracy_at_80", statistics, _accuracy_at_80),
    ]


def coverage_curve(truth: np.ndarray, probabilities: np.ndarray) -> tuple[CoveragePoint, ...]:
    """Return what abstaining gives at ten shares of the rows, from all of them to the surest tenth.

    Arguments as those of ``coverage_metrics``; under and over are by the number of a class. Shares whose confidence is
    the same are one point; none where a probability is NaN.
    """
    check_rows(labels=truth, probabilities=probabilities)
    confidence, given = probabilities.max(1), probabilities.argmax(1)
    if np.isnan(confidence).any():
        return ()
    surest = np.sort(confidence)[::-1]
    least = [surest[max(1, round(len(surest) * step / _STEPS)) - 1] for step in range(_STEPS, 0, -1)]
    return tuple(_point(truth, given, confidence, float(one)) for one in dict.fromkeys(least))


def _point(truth: np.ndarray, given: np.ndarray, confidence: np.ndarray, least: float) -> CoveragePoint:
    answered = confidence >= least
    right, own = truth[answered], given[answered]
    shares = [float(one.mean()) for one in (right != own, own < right, own > right)]
    return CoveragePoint(least, float(answered.mean()), *shares)


def _cumulative(sums: np.ndarray) -> np.ndarray:
    """Return rows and errors of what is at least as sure as each level: [..., levels, 2]."""
    return sums.reshape(*sums.shape[:-1], -1, 2).cumsum(-2)


def _aurc(sums: np.ndarray) -> np.ndarray:
    counts = sums.reshape(*sums.shape[:-1], -1, 2)[..., 0]
    errors, rows = np.moveaxis(_cumulative(sums)[..., ::-1], -1, 0)
    risks = divide(errors, rows, otherwise=0.0)
    return divide((counts * risks).sum(-1), counts.sum(-1))


def _accuracy_at_80(sums: np.ndarray) -> np.ndarray:
    table = _cumulative(sums)
    enough = table[..., 0] >= COVERAGE * table[..., -1:, 0] - 1e-9
    first = enough.argmax(-1)[..., None, None]
    taken = np.take_along_axis(table, np.broadcast_to(first, (*first.shape[:-1], 2)), axis=-2)[..., 0, :]
    return 1 - divide(taken[..., 1], taken[..., 0])
