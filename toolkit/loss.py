"""The supervised loss: cross entropy over the answers' tokens, as the mean over a whole global batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from toolkit.data.batches import Batch

Forward = Callable[[torch.Tensor | None, Batch], torch.Tensor]
"""``hidden[b]`` (or none) and a batch to the logits [S, vocabulary] of its supervised positions."""


def supervised_loss(forward: Forward, hidden: torch.Tensor | None, batch: Batch, global_tokens: float) -> torch.Tensor:
    """This micro batch's share of the global mean: ``sum(cross_entropy(logits, targets)) / global_tokens``.

    Shares add up, over micro batches and ranks, to the mean over all supervised tokens of the global batch; a mean of
    means would weigh short answers higher. The softmax is computed in float32.

    Args:
        forward: runs the suffix.
        hidden: [B, T, hidden_size] from the prefix; none where there is none.
        batch: the micro batch; a filler gives exactly 0.
        global_tokens: supervised tokens of the optimizer step over all micro batches and ranks.

    Returns:
        A float32 scalar with gradient.
    """
    logits = forward(hidden, batch)
    total = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return total * (0.0 if batch.is_filler else 1.0 / global_tokens)
