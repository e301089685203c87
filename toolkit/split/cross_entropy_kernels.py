"""Triton kernels of the cross entropy of a tile of logits: one launch a tile forward, one backward.

Cut Cross-Entropy (arXiv 2411.09009) and Liger (arXiv 2410.10989) fuse more. Here the products stay torch's, which are
as fast as the card, and the kernels are for what lies between them: float32 copies of the logits, a pass of memory
each, and hundreds of launches. A logit is read twice and its gradient written once, in the logits' own precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 4096
"""Columns of a row that are in registers at once."""
WARPS = 8


def add_statistics(
    logits: torch.Tensor, targets: torch.Tensor, first: int, normaliser: torch.Tensor, target_logits: torch.Tensor
) -> None:
    """Serve ``logit_tiles.add_statistics`` in one launch; logits in bfloat16, float16 or float32."""
    rows, width = logits.shape
    if rows:
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _add_statistics[(rows,)](
                logits, targets, normaliser, target_logits, first, width, logits.stride(0), COLUMNS, num_warps=WARPS
            )


def replace_by_gradient(
    logits: torch.Tensor, targets: torch.Tensor, first: int, shift: torch.Tensor, magnitude: torch.Tensor
) -> None:
    """Serve ``logit_tiles.replace_by_gradient`` in one launch; logits in bfloat16, float16 or float32."""
    rows, width = logits.shape
    if rows:
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            _replace_by_gradient[(rows, triton.cdiv(width, COLUMNS))](
                logits, targets, shift, magnitude, first, width, logits.stride(0), COLUMNS, num_warps=WARPS
            )


@triton.jit  # type: ignore[untyped-decorator]
def _add_statistics(  # type: ignore[no-untyped-def]
    logits, targets, normaliser, target_logits, first, width, stride, columns: tl.constexpr
):
    """Serve one row: its largest logit and its sum of exponentials, in one pass (online softmax, arXiv 1805.02867)."""
    row = tl.program_id(0).to(tl.int64)
    of_row = logits + row * stride
    largest = -3.0e38  # finite, so that a row of minus infinities gives no NaN
    total = 0.0
    for start in range(0, width, columns):
        at = start + tl.arange(0, columns)
        values = tl.load(of_row + at, mask=at < width, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), axis=0)
        largest = larger
    of_tile = largest + tl.log(total)
    before = tl.load(normaliser + row)
    larger = tl.maximum(before, of_tile)
    tl.store(normaliser + row, larger + tl.log(tl.exp(before - larger) + tl.exp(of_tile - larger)))
    target = tl.load(targets + row) - first
    found = tl.load(of_row + target, mask=(target >= 0) & (target < width), other=0.0).to(tl.float32)
    tl.store(target_logits + row, tl.load(target_logits + row) + found)


@triton.jit  # type: ignore[untyped-decorator]
def _replace_by_gradient(  # type: ignore[no-untyped-def]
    logits, targets, shift, magnitude, first, width, stride, columns: tl.constexpr
):
    """Serve some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * columns + tl.arange(0, columns)
    places = logits + row * stride + at
    values = tl.load(places, mask=at < width, other=0.0).to(tl.float32)
    gradient = tl.exp(values - tl.load(shift + row))
    gradient = tl.where(at == tl.load(targets + row) - first, gradient - tl.load(magnitude), gradient)
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=at < width)
