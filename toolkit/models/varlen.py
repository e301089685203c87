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

from toolkit.models.attention_gradients import sdpa

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

    Of ``query`` [1, heads, T, size], ``key`` and ``value`` [1, key heads, T, size] it returns [1, T, heads, size], and
    no attention weights; keys are more than T where a cache holds what came before. ``sample_lengths`` are the tokens
    of each sample, T in all; None if rows are not packed. Of ``attention_mask`` [.., 1, T, keys], True or 0 where a
    token is attended to, only the part within each sample is used. A token attends to ``sliding_window`` tokens, itself
    included, or to all before it.

    Raises:
        ValueError: the model adds a bias of its own to the scores, which would have to be cut as well.
    """
    if sample_lengths is None:
        return sdpa(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError("attention with a position bias cannot run sample by sample")
    outputs, start = [], 0
    for length in sample_lengths:
        span = slice(start, start := start + length)
        if attention_mask is None:
            mask = _sliding_window_mask(length, sliding_window, query.device)
        else:  # the model gave transformers no positions, so it made a mask
            mask = attention_mask[..., span, span]
        outputs.append(sdpa(module, *(states[:, :, span] for states in (query, key, value)), mask, **kwargs)[0])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _sliding_window_mask(length: int, size: int | None, device: torch.device) -> torch.Tensor | None:
    """Return a causal sliding-window mask [1, 1, T, T]; None, for the causal fast path, if the sample fits."""
    if size is None or length <= size:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < size))[None, None]


def _varlen_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return transformers' mask for ``sdpa``; None if samples that share a row are all there is to mask.

    transformers detects packed rows by their positions, and only if there is neither padding nor a cache; it then
    forbids the causal fast path (``allow_is_causal_skip``). A model that does so for a pattern of its own sets
    ``use_vmap``.
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
    AttentionMaskInterface.register(VARLEN, _varlen_mask)
