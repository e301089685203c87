"""Loss, perplexity and bits per byte of references."""

from __future__ import annotations

import math

import numpy as np

from toolkit.metrics.metric import Metric, divide, ratio


def loss_metrics(losses: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray) -> list[Metric]:
    """Return the metrics of references from the cross entropy of each row: [rows] each.

    ``loss``: nats a token, ``perplexity``: its exponential. ``bits_per_byte``: bits a byte of the references' text in
    UTF-8, which alone compares models of different tokenizers.

    Args:
        losses: nats, summed over a row's supervised tokens, with those that end answers.
        tokens: number of those tokens.
        text_bytes: bytes of the text that they stand for; 0 where not known, which ``bits_per_byte`` leaves out.
    """
    known = np.where(text_bytes > 0, losses, 0.0)
    statistics = np.stack([losses, tokens, known, text_bytes], axis=1).astype(float)
    return [
        Metric("loss", statistics, ratio, higher_is_better=False),
        Metric("perplexity", statistics, _perplexity, higher_is_better=False),
        Metric("bits_per_byte", statistics, _bits_per_byte, higher_is_better=False),
    ]


def _perplexity(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(ratio(sums)))


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    return divide(sums[..., 2] / math.log(2), sums[..., 3])
