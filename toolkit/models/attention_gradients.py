"""Gradients of bfloat16 attention on a CPU, from float32 products.

torch's own backward pass of bfloat16 attention compiles code for each length of rows and adds up in bfloat16 the
gradients of a key that several heads share. Here the scores of some queries at a time are computed again in float32, as
FlashAttention does on a GPU (arXiv 2205.14135), and keys that come later are left out. The forward pass stays torch's
own, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from toolkit.models.faster_way import is_faster_here, speedup

QUERIES = 64
"""Queries whose scores are computed at once; with their keys they stay in the processor's caches."""
SHORTEST, LONGEST = 64, 2048
"""Row lengths between which the ways are compared."""

_IN_FLOAT32 = "_gradient_in_float32"
"""Attribute of the attention layers whose gradients are those of torch's attention in float32."""
_IN_BLOCKS = "_gradient_in_blocks"
"""Attribute of the attention layers whose gradients are computed ``QUERIES`` at a time where that can be."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Query, key, value and a mask to the attended values."""


def mark_attention(model: nn.Module, in_float32: bool, in_blocks: bool) -> None:
    """Choose how the attention layers of ``model`` that run through ``sdpa`` compute their gradients."""
    AttentionInterface.register("sdpa", sdpa)  # other models' attention goes through it unchanged
    for module in model.modules():
        if hasattr(module, "is_causal"):
            setattr(module, _IN_FLOAT32, in_float32)
            setattr(module, _IN_BLOCKS, in_blocks)


def sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Run transformers' ``sdpa``, with the gradients that ``mark_attention`` chose for ``module``."""

    def attend(*states: torch.Tensor | None) -> torch.Tensor:
        output: torch.Tensor = sdpa_attention_forward(module, *states, *args[1:], **kwargs)[0]
        return output

    mask, bias = args[0] if args else kwargs.pop("attention_mask", None), kwargs.get("position_bias")
    is_own = query.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled()
    learns_mask = bias is not None or (mask is not None and mask.requires_grad)  # such as Inkling's position bias
    if not is_own or learns_mask or kwargs.get("dropout"):  # a second pass would drop other values
        return attend(query, key, value, mask), None
    if getattr(module, _IN_BLOCKS, False) and mask is None and _is_causal(module, query, key, args[1:], kwargs):
        scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        return _BlockAttention.apply(query, key, value, scale, attend), None  # type: ignore[no-untyped-call]
    if getattr(module, _IN_FLOAT32, False):
        return _Float32Attention.apply(query, key, value, mask, attend), None  # type: ignore[no-untyped-call]
    return attend(query, key, value, mask), None


def _is_causal(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, more: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Return whether ``sdpa`` without a mask is causal attention of as many queries as keys, and nothing beside it."""
    is_causal = module.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
    is_plain = is_causal is True and not more and kwargs.get("cache") is None
    return is_plain and query.shape[2] == key.shape[2] > 1 and query.shape[1] % key.shape[1] == 0


class _Float32Attention(torch.autograd.Function):
    """``attend(query, key, value, mask)`` whose backward computes it once more in float32 and differentiates that."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, attend: Attend
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.attend = attend
        return attend(query, key, value, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        *states, mask = ctx.saved_tensors
        in_float32 = [tensor.detach().float().requires_grad_() for tensor in states]
        with torch.enable_grad():
            output = ctx.attend(*in_float32, mask.float() if mask is not None and mask.is_floating_point() else mask)
        gradients = torch.autograd.grad(output, in_float32, gradient.float())
        return *(g.to(tensor.dtype) for g, tensor in zip(gradients, states, strict=True)), None, None


class _BlockAttention(torch.autograd.Function):
    """Causal ``attend(query, key, value, None)`` whose gradients are computed ``QUERIES`` at a time in float32."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, attend: Attend
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return attend(query, key, value, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        return *attention_gradients(gradient.transpose(1, 2), query, key, value, ctx.scale), None, None


def attention_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of causal attention, ``softmax(scale * query @ key.T) @ value``, in float32.

    Queries whose gradient is zero are left out, a block at a time: in the last block of a model those of a prompt.

    Args:
        gradient: [B, heads, T, value size], that of the output.
        query: [B, heads, T, size].
        key: [B, key heads, T, size]; each key head serves ``heads / key heads`` heads that follow one another.
        value: [B, key heads, T, value size].
        scale: factor of the scores.

    Returns:
        The gradients of query, key and value, each rounded once to the precision of its tensor.
    """
    groups, tokens = key.shape[0] * key.shape[1], key.shape[2]
    keys, values = (x.float().reshape(groups, tokens, -1) for x in (key, value))
    d_query, d_keys, d_values = torch.zeros_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    later = torch.full((QUERIES, QUERIES), -torch.inf).triu_(1)
    for start in range(0, tokens, QUERIES):
        end = min(start + QUERIES, tokens)
        if not gradient[:, :, start:end].any():
            continue
        d_output = gradient[:, :, start:end].float().reshape(groups, -1, values.shape[-1])
        queries = query[:, :, start:end].float().mul_(scale).reshape(groups, -1, keys.shape[-1])
        scores = queries @ keys[:, :end].transpose(1, 2)
        scores.view(groups, -1, end - start, end)[..., start:].add_(later[: end - start, : end - start])
        weights = torch.softmax(scores, dim=-1)
        d_weights = d_output @ values[:, :end].transpose(1, 2)
        d_values[:, :end].baddbmm_(weights.transpose(1, 2), d_output)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32)
        d_query[:, :, start:end] = (d_scores @ keys[:, :end]).mul_(scale).view(d_query[:, :, start:end].shape)
        d_keys[:, :end].baddbmm_(d_scores.transpose(1, 2), queries)
    return d_query, d_keys.to(key.dtype).view(key.shape), d_values.to(value.dtype).view(value.shape)


def blocks_are_faster(tokens: int, in_float32: bool) -> bool:
    """Return whether this machine computes attention's gradients faster in blocks, for rows of about so many tokens.

    Without them they are torch's own, or those of its attention ``in_float32``. It is asked of the nearest power of two
    from ``SHORTEST`` to ``LONGEST``.
    """
    nearest = 2 ** round(math.log2(max(SHORTEST, min(tokens, LONGEST))))
    usual = "float32" if in_float32 else "bfloat16"
    what = f", {usual} attention of {nearest} tokens"
    return is_faster_here("attention-gradients.json", what, _measure_speedup, nearest, in_float32)


def _measure_speedup(tokens: int, in_float32: bool) -> float:
    """Measure it with eight heads of 64 on two key heads."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, tokens, 64, generator=generator) for heads in (8, 2, 2)]
    states = [tensor.bfloat16().requires_grad_() for tensor in drawn]

    def backward(in_blocks: bool) -> Callable[[], object]:
        module = nn.Module()
        for name, value in (("is_causal", True), ("num_key_value_groups", 4)):
            setattr(module, name, value)
        mark_attention(module, in_float32, in_blocks)
        with torch.enable_grad():
            output, _ = sdpa(module, *states, None)
        gradient = torch.ones_like(output)
        return lambda: torch.autograd.grad(output, states, gradient, retain_graph=True)

    return speedup(backward(False), backward(True))
