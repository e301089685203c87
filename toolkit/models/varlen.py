"""Attention over samples packed into one row: each sample attends to itself, and no T x T mask is made.

transformers' own way to keep packed samples apart under ``sdpa`` is a dense mask over the whole row, so a row of T
tokens costs T² however short its samples are. This attention cuts the row at the samples' ends and calls the same
kernel on each piece, T_1² + T_2² + …, with the causal fast path. Without ``sample_lengths`` it is transformers'
``sdpa``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from toolkit.models.products import sdpa

VARLEN = "frostline_varlen"
"""Name of this attention in ``config._attn_implementation``."""


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sample_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample of a packed row.

    Args:
        module: the attention layer; says how many query heads share a key.
        query: [1, heads, T, size].
        key: [1, key heads, T, size].
        value: [1, key heads, T, size].
        attention_mask: of a padded batch, and then all there is to it; none for rows without padding.
        sample_lengths: of the samples, which add up to T; none where each row is one sample.
        sliding_window: a token sees so many tokens, itself included; none is all before it.
        kwargs: scaling, dropout and what else a model gives its attention.

    Returns:
        [1, T, heads, size], and no attention weights.

    Raises:
        ValueError: the model adds a bias of its own to the scores, which would have to be cut as well.
    """
    if attention_mask is not None:
        output, _ = sdpa(module, query, key, value, attention_mask, **kwargs)
        return output, None
    if kwargs.get("position_bias") is not None:
        raise ValueError("attention with a position bias cannot run sample by sample")
    lengths = list(sample_lengths or (query.shape[2],))
    pieces = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for (one, its_key, its_value), length in zip(pieces, lengths, strict=True):
        window = _window(length, sliding_window, query.device)
        output, _ = sdpa(module, one, its_key, its_value, window, **kwargs)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _window(length: int, size: int | None, device: torch.device) -> torch.Tensor | None:
    """A causal band [1, 1, T, T] where a sample outgrows the window; else none, which is plain causal attention."""
    if size is None or length <= size:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < size))[None, None]


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """A dense mask for padded batches alone."""
    if attention_mask is None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, _mask)
