"""Run operators on meta tensors: each worked out once for each shape, and attention as its fused kernels allocate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

_repeats: dict[Any, Callable[[tuple[Any, ...]], Any] | None] = {}
"""Functions that repeat a result, by operator and arguments."""


def infer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator on meta tensors, or repeat its result of an earlier call with the same shapes.

    Blocks, tiles and traces repeat the same calls, and torch works out shapes in Python: 0.2 ms an operator.
    """
    key = func, _signature(args), _signature(kwargs)
    if repeat := _repeats.get(key):
        return repeat(args)
    out = _call(func, args, kwargs)
    _repeats[key] = _repeat(func, args, kwargs, out)
    return out


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator; products of experts in another precision are worked out as if they were in bfloat16.

    torch takes no other for them on the meta device (2.13), and all of them on real ones. Can go when it does.
    """
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)

    def in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bfloat16, device="meta")

    out = func(*tree_map_only(torch.Tensor, in_bfloat16, args), **kwargs)
    return torch.empty_strided(out.shape, out.stride(), dtype=args[0].dtype, device="meta")


def _signature(value: Any) -> Any:
    """Return all of an argument that a result on the meta device depends on."""
    if isinstance(value, torch.Tensor):
        return value.device, value.dtype, value.shape, value.stride(), value.storage_offset()
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    return type(value), value


def _repeat(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Callable[[tuple[Any, ...]], Any] | None:
    """Return a function that gives ``out`` again; None if it shares storage or is no single meta tensor."""
    if not (isinstance(out, torch.Tensor) and out.is_meta):
        return None
    if args and out is args[0]:  # written in place
        return itemgetter(0)
    inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    if func._schema.is_mutable or out.untyped_storage()._cdata in inputs:
        return None
    size, stride, dtype = out.shape, out.stride(), out.dtype
    return lambda _: torch.empty_strided(size, stride, dtype=dtype, device="meta")


@contextmanager
def meta_attention(count: Callable[[int, int], None]) -> Iterator[None]:
    """Replace scaled_dot_product_attention by ``_MetaAttention`` in the context, and ``count`` its FLOPs and tokens.

    On the meta device the original would materialise T x T scores. A TorchFunctionMode is not enough: it is not active
    in autograd's backward, where activation checkpointing recomputes.
    """
    original = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if attn_mask is not None and attn_mask.dtype != query.dtype:  # a boolean mask becomes a bias
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return _MetaAttention.apply(query, key, value, attn_mask, count)  # type: ignore[no-untyped-call]

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


class _MetaAttention(torch.autograd.Function):
    """Attention that allocates and counts like the fused kernels (Dao et al., arXiv 2205.14135), without results.

    Forward saves one logsumexp for each token and head instead of the scores; backward recomputes the scores, which
    makes five products for the two of forward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, bias: Any, count: Callable[[int, int], None]
    ) -> torch.Tensor:
        batch, heads, length, size = query.shape
        out: torch.Tensor = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        ctx.pairs, ctx.count = batch * heads * length * key.shape[-2], count
        count(2 * ctx.pairs * (size + value.shape[-1]), length)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.count(2 * ctx.pairs * (3 * query.shape[-1] + 2 * value.shape[-1]), query.shape[2])
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
