"""Metrics of probabilities: log-loss, Brier score and calibration error."""

from __future__ import annotations

import numpy as np

from toolkit.metrics.metric import Metric, check_rows, divide, mean_metric
from toolkit.runtime.errors import DataError

BINS = 15
"""Bins of the largest probability, of equal width."""
_LEAST = float(np.finfo(np.float64).eps)
"""Least probability whose logarithm is taken, as in scikit-learn."""
_TOLERANCE = 1e-4
"""How far probabilities may add up to other than 1: they may come from float32."""


def probability_metrics(truth: np.ndarray, probabilities: np.ndarray) -> list[Metric]:
    """Return the metrics of probabilities [rows, classes] beside the numbers of the right classes [rows].

    ``log_loss``: mean of -log p of the right class, in nats. ``brier``: mean squared distance to the right class over
    all classes, from 0 to 2 (Brier 1950). ``ece``: expected calibration error, how far the largest probability is from
    how often it is right, over 15 bins of equal width (arXiv 1706.04599). A row of NaN, such as that of a model that
    diverged, leaves all three undefined.

    Raises:
        DataError: there are no rows, or others than in ``truth``; a class or a probability is out of its range; or
            those of a row do not add up to 1.
    """
    _check(truth, probabilities)
    rows = np.arange(len(truth))
    right = probabilities[rows, truth]
    one_hot = np.zeros_like(probabilities)
    one_hot[rows, truth] = 1
    largest = probabilities.max(1)
    # a bin holds its upper edge, as in the paper; a row of NaN is in the last one, whose sums are NaN then
    bins = np.digitize(largest, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    of_bins = np.zeros((len(truth), BINS, 3))
    of_bins[rows, bins] = np.stack([np.ones(len(truth)), largest, probabilities.argmax(1) == truth], axis=1)
    return [
        mean_metric("log_loss", -np.log(np.clip(right, _LEAST, 1)), higher_is_better=False),
        mean_metric("brier", ((probabilities - one_hot) ** 2).sum(1), higher_is_better=False),
        Metric("ece", of_bins.reshape(len(truth), -1), _ece, higher_is_better=False),
    ]


def prior_log_loss(truth: np.ndarray, counts: np.ndarray) -> Metric:
    """Return the ``log_loss`` of a prior: of giving every row each class's share of the training rows.

    It is what a model has to beat that knows how often each class is right, and nothing of the rows. A class that no
    training row has costs what the least probability does, about 36 nats.

    Args:
        truth: [rows] number of the right class.
        counts: [classes] training rows of each class.

    Raises:
        DataError: there are no rows, or no training rows, or a count or class is out of its range.
    """
    if not np.sum(counts) > 0 or np.min(counts) < 0:
        raise DataError(
            f"the training rows of each class are {np.asarray(counts).tolist()}; expected counts from 0, not all 0"
        )
    prior = np.asarray(counts, float) / np.sum(counts)
    return probability_metrics(truth, np.tile(prior, (len(truth), 1)))[0]


def _check(truth: np.ndarray, probabilities: np.ndarray) -> None:
    """Raise DataError if probabilities are none, or a class is none of theirs."""
    check_rows(labels=truth, probabilities=probabilities)
    classes = probabilities.shape[1]
    if (outside := truth[(truth < 0) | (truth >= classes)]).size:
        raise DataError(f"a right class has the number {outside[0]}; expected one from 0 to {classes - 1}")
    defined = probabilities[~np.isnan(probabilities).any(1)]
    off = (np.abs(defined.sum(1) - 1) > _TOLERANCE) | (defined < 0).any(1)
    if off.any():
        raise DataError(
            f"{off.sum()} rows have numbers such as {defined[off][0].tolist()}; expected probabilities, from 0 to 1 "
            "and with the sum 1"
        )


def _ece(sums: np.ndarray) -> np.ndarray:
    table = sums.reshape(*sums.shape[:-1], BINS, 3)
    return divide(np.abs(table[..., 1] - table[..., 2]).sum(-1), table[..., 0].sum(-1))
