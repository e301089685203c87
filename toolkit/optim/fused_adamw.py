"""Triton kernels that clip, update and write back many tensors in one launch each, with no copy of their gradients.

A step of AdamW moves 30 bytes an element: it reads the gradient in its own precision, both moments and the master, and
writes moments, master and the low-precision weight. The kernels visit tensors in blocks of ``BLOCK`` elements, and
find the tensor of a block in a table, as apex's multi-tensor kernels do: launches do not follow the number of tensors.
Gradients and weights stay where they are and are reached by their addresses; masters and moments lie in flat buffers.

Importing this module imports Triton; ``toolkit.optim.kernel_choice`` says where it is used. The kernels are
``torch.library`` operators, so that fake tensors, which have no addresses, pass through them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from typing_extensions import override

from toolkit.optim.update_kernels import BLOCK, UpdateKernels

_ALIGNED = 16
"""Bytes at whose multiples addresses, and elements at whose multiples tensors end, for reads of 16 bytes."""


@triton.jit
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit  # type: ignore[untyped-decorator]
def _locate(owners, layout, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a block's tensor, its elements within the tensor and the flat buffers, and the tensor's size."""
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    first, start, size = tl.load(layout + 3 * owner), tl.load(layout + 3 * owner + 1), tl.load(layout + 3 * owner + 2)
    if ALIGNED:
        start, size = tl.multiple_of(start, 16), tl.multiple_of(size, 16)
    within = (block - first) * BLOCK + tl.arange(0, BLOCK)  # 64 bits, as ``first`` is
    return owner, within, start + within, size


@triton.jit  # type: ignore[untyped-decorator]
def _pointer(addresses, owner, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the pointer to a tensor's first element."""
    pointer = tl.load(addresses + owner).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit  # type: ignore[untyped-decorator]
def _squares_kernel(  # type: ignore[no-untyped-def]
    owners, layout, gradients, squares, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the sum of a block's squared gradients."""
    owner, within, _, size = _locate(owners, layout, ALIGNED, BLOCK)
    inside = within < size
    gradient = tl.load(_pointer(gradients, owner, TYPE, ALIGNED) + within, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares + tl.program_id(0), tl.reduce(gradient * gradient, 0, _add))


@triton.jit  # type: ignore[untyped-decorator]
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    owners, layout, gradients, total, IS_FIRST: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a block's gradients to the float32 sums, or set these to them."""
    owner, within, flat, size = _locate(owners, layout, ALIGNED, BLOCK)
    inside = within < size
    gradient = tl.load(_pointer(gradients, owner, TYPE, ALIGNED) + within, mask=inside, other=0.0).to(tl.float32)
    if not IS_FIRST:
        gradient += tl.load(total + flat, mask=inside, other=0.0)
    tl.store(total + flat, gradient, mask=inside)


@triton.jit
def _mean(old, new, beta, rest):  # type: ignore[no-untyped-def]
    """Return ``beta * old + rest * new`` with ``rest`` = 1 - beta, exact where both are equal, however beta rounds."""
    return tl.where(beta < 0.5, new + beta * (old - new), old + rest * (new - old))


@triton.jit
def _bias_correction(step, log_beta):  # type: ignore[no-untyped-def]
    """Return 1 - beta**step: near 0, where the difference would cancel, by the series of exp(x) - 1."""
    x = step * log_beta
    series = 1.0
    for k in tl.static_range(10, 1, -1):
        series = 1.0 + series * x / k
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit  # type: ignore[untyped-decorator]
def _adamw_kernel(  # type: ignore[no-untyped-def]
    owners, layout, gradients, weights, master, exp_avg, exp_avg_sq, step, found_inf, divisor,
    lr, weight_decay, beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps,
    GRADIENT: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a block, or nothing where ``found_inf`` is 1 and not 0; without ``master`` the float32 weights themselves.

    What is None when the kernel is launched is a constant to the compiler.
    """
    owner, within, flat, size = _locate(owners, layout, ALIGNED, BLOCK)
    inside = within < size * (1 - tl.load(found_inf).to(tl.int64))
    gradient = tl.load(_pointer(gradients, owner, GRADIENT, ALIGNED) + within, mask=inside, other=0.0).to(tl.float32)
    if divisor is not None:
        gradient = gradient / tl.load(divisor)
    first = _mean(tl.load(exp_avg + flat, mask=inside, other=0.0), gradient, beta1, rest1)
    second = _mean(tl.load(exp_avg_sq + flat, mask=inside, other=0.0), gradient * gradient, beta2, rest2)
    count = tl.load(step)
    scale1, scale2 = 1.0 / _bias_correction(count, log_beta1), 1.0 / tl.sqrt(_bias_correction(count, log_beta2))
    update = first * scale1 / (tl.sqrt(second) * scale2 + eps)
    rounded = _pointer(weights, owner, WEIGHT, ALIGNED) + within
    exact = rounded if master is None else master + flat
    weight = tl.load(exact, mask=inside, other=0.0)
    weight -= lr * (update + weight_decay * weight)
    tl.store(exp_avg + flat, first, mask=inside)
    tl.store(exp_avg_sq + flat, second, mask=inside)
    tl.store(exact, weight, mask=inside)
    if master is not None:
        tl.store(rounded, weight.to(WEIGHT), mask=inside)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_OPTIONS = {"enable_fp_fusion": True}  # products are added without rounding in between; Triton 3.9 asks to say so
_TABLE = "Tensor owners, Tensor layout, bool aligned"


class TritonKernels(UpdateKernels):
    """The kernels above, on some tensors of one device.

    Args:
        sizes: elements of each tensor; they lie in this order in the flat buffers.
        device: device of all tensors.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        blocks = [math.ceil(size / BLOCK) for size in sizes]
        rows = zip(accumulate([0, *blocks]), accumulate([0, *sizes]), sizes, strict=False)  # first block, start, size
        owners = torch.tensor(np.repeat(np.arange(len(sizes), dtype=np.int32), blocks)).to(device)
        aligned = all(size % _ALIGNED == 0 for size in sizes)
        self._table = owners, torch.tensor(list(rows)).to(device), aligned
        self._count = len(owners)

    @property
    @override
    def count(self) -> int:
        return self._count

    @override
    def squares(self, gradients: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        torch.ops.frostline.squares(gradients, out, *self._table)

    @override
    def accumulate(self, gradients: Sequence[torch.Tensor], total: torch.Tensor, is_first: bool) -> None:
        torch.ops.frostline.accumulate(gradients, total, is_first, *self._table)

    @override
    def adamw(
        self, gradients: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], master: torch.Tensor | None,
        moments: tuple[torch.Tensor, torch.Tensor], step: torch.Tensor, param_group: Mapping[str, Any],
        divisor: torch.Tensor | None, found_inf: torch.Tensor,
    ) -> None:  # fmt: skip
        numbers = *(param_group[key] for key in ("lr", "weight_decay", "eps")), *param_group["betas"]
        torch.ops.frostline.adamw(
            gradients, weights, master, *moments, step, found_inf, divisor, *map(float, numbers), *self._table
        )


@torch.library.custom_op(
    "frostline::squares", mutates_args=("out",), schema=f"(Tensor[] gradients, Tensor(a!) out, {_TABLE}) -> ()"
)
def _squares(
    gradients: Sequence[torch.Tensor], out: torch.Tensor, owners: torch.Tensor, layout: torch.Tensor, aligned: bool
) -> None:
    addresses, is_aligned = _addresses(gradients)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _squares_kernel[(len(owners),)](
            owners,
            layout,
            addresses[0],
            out,
            _TYPES[gradients[0].dtype],
            aligned and is_aligned,
            BLOCK,
            num_warps=4,
            **_OPTIONS,
        )


@torch.library.custom_op(
    "frostline::accumulate", mutates_args=("total",),
    schema=f"(Tensor[] gradients, Tensor(a!) total, bool is_first, {_TABLE}) -> ()",
)  # fmt: skip
def _accumulate(
    gradients: Sequence[torch.Tensor], total: torch.Tensor, is_first: bool, owners: torch.Tensor, layout: torch.Tensor,
    aligned: bool,
) -> None:  # fmt: skip
    addresses, is_aligned = _addresses(gradients)
    with torch.cuda.device_of(total):  # type: ignore[no-untyped-call]
        _accumulate_kernel[(len(owners),)](
            owners, layout, addresses[0], total, is_first, _TYPES[gradients[0].dtype], aligned and is_aligned, BLOCK,
            num_warps=8, **_OPTIONS,
        )  # fmt: skip


@torch.library.custom_op(
    "frostline::adamw", mutates_args=("weights", "master", "exp_avg", "exp_avg_sq"),
    schema="(Tensor[] gradients, Tensor(a!)[] weights, Tensor(b!)? master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor step, Tensor found_inf, Tensor? divisor, float lr, float weight_decay, float eps, float beta1, "
    f"float beta2, {_TABLE}) -> ()",
)  # fmt: skip
def _adamw(
    gradients: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], master: torch.Tensor | None,
    exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: torch.Tensor, found_inf: torch.Tensor,
    divisor: torch.Tensor | None, lr: float, weight_decay: float, eps: float, beta1: float, beta2: float,
    owners: torch.Tensor, layout: torch.Tensor, aligned: bool,
) -> None:  # fmt: skip
    addresses, is_aligned = _addresses(gradients, weights)
    betas = (number for beta in (beta1, beta2) for number in (beta, 1 - beta, math.log(beta) if beta else -math.inf))
    with torch.cuda.device_of(exp_avg):  # type: ignore[no-untyped-call]
        _adamw_kernel[(len(owners),)](
            owners, layout, addresses[0], addresses[1], master, exp_avg, exp_avg_sq, step, found_inf, divisor,
            lr, weight_decay, *betas, eps, _TYPES[gradients[0].dtype], _TYPES[weights[0].dtype],
            aligned and is_aligned, BLOCK, num_warps=8, **_OPTIONS,
        )  # fmt: skip


for _operator in (_squares, _accumulate, _adamw):
    _operator.register_fake(lambda *_: None)


def _addresses(*lists: Sequence[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """Return the tensors' addresses on their device, int64 [lists, tensors], and whether all suit reads of 16 bytes.

    They go there from page-locked memory, which waits for nothing; torch reuses that when the copy is done.
    """
    device = lists[0][0].device
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    on_host = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    is_aligned = all(address % _ALIGNED == 0 for row in addresses for address in row)
    return on_host.to(device, non_blocking=True), is_aligned
