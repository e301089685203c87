"""Put intervals to the metrics of models, and say what of a difference between two is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.metrics.metric import Metric
from toolkit.metrics.resampling import Difference, Interval, bootstrap, claim, compare, holm, resample_weights

_DETAILS = ("recall/", "field/")
"""Parts of the names of metrics of one label or field."""


@dataclass(frozen=True)
class Score(Interval):
    """A metric of one model, with its 95 % interval, and its difference to the model that it is compared with."""

    difference: Difference | None = None
    """None for that model itself, for trivial answers, and where one of the two lacks the metric."""
    verdict: str | None = None
    """See ``claim``; None without a difference or a better direction."""
    higher_is_better: bool | None = None
    """None if neither is."""


@dataclass(frozen=True)
class ModelScores:
    """All scores of a model or of trivial answers."""

    name: str
    step: int | None
    """Step of the checkpoint; None if it is not a run."""
    is_trivial: bool
    scores: Mapping[str, Score]
    """By the metric's name."""


@dataclass(frozen=True)
class Entry:
    """A model or trivial method with its metrics."""

    name: str
    metrics: Mapping[str, Metric]
    step: int | None = None
    is_trivial: bool = False


def judge(
    entries: Sequence[Entry], against: str | None, primary: str, resampling: Resampling
) -> tuple[ModelScores, ...]:
    """Put intervals to all metrics, and compare those of each model with those of ``against``.

    Verdicts on metrics other than ``primary`` are corrected for their number, those on details (``is_detail``) for the
    number of all.
    """
    reference = next((entry.metrics for entry in entries if entry.name == against), {})
    return tuple(
        ModelScores(
            entry.name, entry.step, entry.is_trivial,
            _scores(entry.metrics, {} if entry.is_trivial or entry.name == against else reference, primary, resampling),
        )
        for entry in entries
    )  # fmt: skip


def is_detail(metric: str) -> bool:
    """Return whether a metric is of one label or field, of which there may be many: it is in the JSON alone."""
    return any(part in metric for part in _DETAILS)


def _scores(
    metrics: Mapping[str, Metric], reference: Mapping[str, Metric], primary: str, resampling: Resampling
) -> dict[str, Score]:
    """Return the scores of a model; verdicts on metrics other than the declared one are corrected for their number."""
    differences = {
        name: compare(metric, reference[name], resampling.weights(metric))
        for name, metric in metrics.items()
        if name in reference
    }
    judged = {name: of.p for name, of in differences.items() if metrics[name].higher_is_better is not None}
    others = {name: p for name, p in judged.items() if name != primary}
    # a correction for the details too would leave the rest nothing to show: 1,000 resamples know no p below 0.001
    p_values = {**holm(others), **holm({name: p for name, p in others.items() if not is_detail(name)})}
    if primary in judged:
        p_values[primary] = judged[primary]
    scores = {}
    for name, metric in metrics.items():
        own, difference, verdict = bootstrap(metric, resampling.weights(metric)), differences.get(name), None
        if difference is not None and metric.higher_is_better is not None:
            units = resampling.units(len(metric.statistics))
            verdict = claim(difference, metric.higher_is_better, units, p_values[name])
        scores[name] = Score(own.value, own.low, own.high, difference, verdict, metric.higher_is_better)
    return scores


class Resampling:
    """The resamples of the rows, the same for all models, and for metrics of the first rows alone."""

    def __init__(self, groups: Sequence[str | None], seed: int) -> None:
        self._groups = [group if group is not None else at for at, group in enumerate(groups)]
        self._seed = seed
        self._weights: dict[int, np.ndarray] = {}

    def weights(self, metric: Metric) -> np.ndarray:
        """Return how often each resample takes each row of a metric: [resamples, rows]."""
        rows = len(metric.statistics)
        if rows not in self._weights:
            self._weights[rows] = resample_weights(rows, self._groups[:rows], self._seed)
        return self._weights[rows]

    def units(self, rows: int) -> int:
        """Return how many of the first rows, or groups of them, are independent of each other."""
        return len(set(self._groups[:rows]))
