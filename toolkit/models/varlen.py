"""Attention over samples packed into one row: each sample attends to itself, and no T x T mask is made.

transformers' own way to keep packed samples apart under ``sdpa`` is a dense mask over the whole row, so a row of T
tokens costs T² however short its samples are. This attention cuts the row at the samples' ends and calls the same
kernel on each piece, T_1² + T_2² + …, with the causal fast path. Without ``sample_lengths``, as in generation with a
cache of any kind, it is transformers' ``sdpa`` with its mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from toolkit.models.float32_gradients import sdpa

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
    """Compute causal attention inside each sample of a packed row, and transformers' ``sdpa`` for everything else.

    Args:
        module: the attention layer; says how many query heads share a key.
        query: [1, heads, T, size] of a packed row.
        key: [1, key heads, T, size] of a packed row; longer than the query where a cache holds what came before.
        value: as ``key``.
        attention_mask: [.., 1, T, keys], true or 0 where a token is seen; of a packed row, each sample's own part.
        sample_lengths: of the samples, which add up to T; none where rows are not packed.
        sliding_window: a token sees so many tokens, itself included; none is all before it.
        kwargs: scaling, dropout and what else a model gives its attention.

    Returns:
        [1, T, heads, size], and no attention weights.

    Raises:
        ValueError: the model adds a bias of its own to the scores, which would have to be cut as well.
    """
    if sample_lengths is None:
        return sdpa(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError("attention with a position bias cannot run sample by sample")
    outputs, start = [], 0
    for length in sample_lengths:
        own = slice(start, start := start + length)
        if attention_mask is None:
            mask = _window(length, sliding_window, query.device)
        else:  # of a model that does not tell transformers the positions
            mask = attention_mask[..., own, own]
        outputs.append(sdpa(module, *(states[:, :, own] for states in (query, key, value)), mask, **kwargs)[0])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _window(length: int, size: int | None, device: torch.device) -> torch.Tensor | None:
    """Return a causal band [1, 1, T, T] where a sample outgrows the window; else none, plain causal attention."""
    if size is None or length <= size:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < size))[None, None]


def _mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return transformers' mask for ``sdpa``, but none where all there is to mask is samples that share a row.

    transformers finds packed rows by their positions, and only where there is neither padding nor a cache; it then
    forbids the causal fast path. A model that forbids it for a pattern of its own gives that as a function to map.
    """
    if attention_mask is None and not allow_is_causal_skip and not use_vmap and q_length == kv_length > 1:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )
    return mask


def register_varlen() -> None:
    """Register this attention with transformers under the name ``VARLEN``; it stays registered in this process."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _mask)
