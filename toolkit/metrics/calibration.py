"""Metrics of probabilities: log-loss, Brier score and calibration error."""

from __future__ import annotations

import numpy as np

from toolkit.metrics.metric import Metric, divide, mean_metric

BINS = 15
"""Bins of the largest probability, of equal width."""
_LEAST = float(np.finfo(np.float64).eps)
"""Least probability whose logarithm is taken, as in scikit-learn."""


def probability_metrics(truth: np.ndarray, probabilities: np.ndarray) -> list[Metric]:
    """Return the metrics of probabilities [rows, classes] of which each row's add up to 1.

    ``log_loss``: mean of -log p of the right class, in nats. ``brier``: mean squared distance to the right class over
    all classes, from 0 to 2 (Brier 1950). ``ece``: expected calibration error, how far the largest probability is from
    how often it is right, over 15 bins of equal width (arXiv 1706.04599).
    """
    rows = np.arange(len(truth))
    right = probabilities[rows, truth]
    one_hot = np.zeros_like(probabilities)
    one_hot[rows, truth] = 1
    largest = probabilities.max(1)
    bins = np.minimum((largest * BINS).astype(int), BINS - 1)
    of_bins = np.zeros((len(truth), BINS, 3))
    of_bins[rows, bins] = np.stack([np.ones(len(truth)), largest, probabilities.argmax(1) == truth], axis=1)
    return [
        mean_metric("log_loss", -np.log(np.clip(right, _LEAST, 1)), higher_is_better=False),
        mean_metric("brier", ((probabilities - one_hot) ** 2).sum(1), higher_is_better=False),
        Metric("ece", of_bins.reshape(len(truth), -1), _ece, higher_is_better=False),
    ]


def _ece(sums: np.ndarray) -> np.ndarray:
    table = sums.reshape(*sums.shape[:-1], BINS, 3)
    return divide(np.abs(table[..., 1] - table[..., 2]).sum(-1), table[..., 0].sum(-1))
