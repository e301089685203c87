"""Storage formats of AdamW's two moments (float32, 8 bits), each with its own update step.

The state of a format is a dict of plain tensors, which an optimizer holds and a checkpoint stores. Masters are float32
and passed in by the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from typing_extensions import override

from toolkit.config.schema import OptimName
from toolkit.models.quantization import import_bitsandbytes
from toolkit.optim.state_fragments import MOMENTS

BLOCK = 256
"""Elements that share a scale in 8 bits, as in bitsandbytes."""

SMALLEST = 4096
"""Tensors with fewer elements keep float32 moments, as in bitsandbytes: norms and biases, too small to matter."""

_PAGED_FROM = 100_000
"""Elements from which on bitsandbytes keeps a tensor's moments in paged memory."""

MomentState = dict[str, torch.Tensor]


class MomentFormat(Protocol):
    """A storage format for the moments of n elements, with the step of AdamW that goes with it."""

    def create(self, size: int, device: torch.device) -> MomentState:
        """Return moments of zero."""

    def update(
        self, state: MomentState, span: slice, master: torch.Tensor, gradient: torch.Tensor,
        param_group: Mapping[str, Any], step: int, factor: float,
    ) -> None:  # fmt: skip
        """Take one step of AdamW on a slice.

        Args:
            state: moments of all elements, changed in place within the slice.
            span: range of the slice, which starts at a multiple of ``BLOCK``.
            master: float32 master weights of the slice, changed in place.
            gradient: float32 gradient of the slice; may be overwritten.
            param_group: parameter group with lr, betas, eps and weight_decay.
            step: number of updates including this one.
            factor: multiplier that clips the gradient.
        """

    def read(self, state: MomentState) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both moments, each float32 [n]."""

    def write(self, state: MomentState, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        """Store both moments from float32 [n], rounded to the nearest."""

    def is_moving(self, state: MomentState, index: torch.Tensor) -> torch.Tensor:
        """Return for each element of ``index`` whether its first moment is not zero, so that an update moves it.

        False for all of them if the moments are paged: to look would fetch their pages to the host, and wait.
        """


def has_float32_moments(name: OptimName, size: int, is_embedding: bool) -> bool:
    """Return True if a tensor, or ZeRO partition, of ``size`` elements has float32 moments.

    In the 8-bit optimizers embeddings and small tensors have them, too.
    """
    return name == "adamw" or is_embedding or size < SMALLEST


def moment_bytes(name: OptimName, size: int, is_embedding: bool = False) -> int:
    """Return the bytes of both moments of a tensor, or ZeRO partition, of ``size`` elements."""
    if has_float32_moments(name, size, is_embedding):
        return 8 * size
    return 2 * size + 8 * math.ceil(size / BLOCK)


class Float32(MomentFormat):
    """Both moments in float32."""

    @override
    def create(self, size: int, device: torch.device) -> MomentState:
        return {kind: torch.zeros(size, device=device) for kind in MOMENTS}

    @override
    def update(
        self, state: MomentState, span: slice, master: torch.Tensor, gradient: torch.Tensor,
        param_group: Mapping[str, Any], step: int, factor: float,
    ) -> None:  # fmt: skip
        exp_avg, exp_avg_sq = (state[kind][span] for kind in MOMENTS)
        fused_adamw(master, gradient, exp_avg, exp_avg_sq, param_group, step, factor)

    @override
    def read(self, state: MomentState) -> tuple[torch.Tensor, torch.Tensor]:
        return state["exp_avg"], state["exp_avg_sq"]

    @override
    def write(self, state: MomentState, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].copy_(exp_avg_sq)

    @override
    def is_moving(self, state: MomentState, index: torch.Tensor) -> torch.Tensor:
        return state["exp_avg"].index_select(0, index) != 0


class EightBit(MomentFormat):
    """Both moments in 8 bits, ``BLOCK`` elements to a float32 scale (Dettmers et al., arXiv 2110.02861).

    Kernels, codebooks and paged memory are bitsandbytes'.

    Args:
        device: device of the moments.
        paged: True to keep moments of large tensors in CUDA managed memory, which the driver pages to the host.
    """

    def __init__(self, device: torch.device, paged: bool = False) -> None:
        self._functional = import_bitsandbytes()
        self._codebooks = [self._functional.create_dynamic_map(signed).to(device) for signed in (True, False)]
        self._index_of_zero = int((self._codebooks[0] == 0).nonzero()[0])
        self._paged = paged and device.type == "cuda"
        self._device = device

    @override
    def create(self, size: int, device: torch.device) -> MomentState:
        state = {}
        for kind in MOMENTS:
            if self._paged and size >= _PAGED_FROM:
                state[kind] = self._functional.get_paged(size, dtype=torch.uint8, device=device)
                self._functional.fill(state[kind], 0)
            else:
                state[kind] = torch.zeros(size, dtype=torch.uint8, device=device)
            # while a scale is zero, so are the moments
            state[f"{kind}_scales"] = torch.zeros(math.ceil(size / BLOCK), device=device)
        return state

    @override
    def update(
        self, state: MomentState, span: slice, master: torch.Tensor, gradient: torch.Tensor,
        param_group: Mapping[str, Any], step: int, factor: float,
    ) -> None:  # fmt: skip
        blocks = slice(span.start // BLOCK, math.ceil(span.stop / BLOCK))
        if span.start == 0 and self._is_paged(state):
            for kind in MOMENTS:
                self._functional.prefetch_tensor(state[kind])
        quantized = [_slice_quantized(state[kind], span) for kind in MOMENTS]
        scales = [state[f"{kind}_scales"][blocks] for kind in MOMENTS]
        beta1, beta2 = param_group["betas"]
        self._functional.optimizer_update_8bit_blockwise(
            "adam", gradient, master, *quantized, beta1, beta2, 0.0, 0.0, param_group["eps"], step, param_group["lr"],
            *self._codebooks, *scales, param_group["weight_decay"], gnorm_scale=factor,
        )  # fmt: skip

    @override
    def read(self, state: MomentState) -> tuple[torch.Tensor, torch.Tensor]:
        self._synchronize(state)
        first, second = (
            self._functional.dequantize_blockwise(
                state[kind].to(self._device), absmax=state[f"{kind}_scales"], code=codebook, blocksize=BLOCK
            )
            for kind, codebook in zip(MOMENTS, self._codebooks, strict=True)
        )
        return first, second

    @override
    def write(self, state: MomentState, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
        self._synchronize(state)
        for kind, exact, codebook in zip(MOMENTS, (exp_avg, exp_avg_sq), self._codebooks, strict=True):
            flat = exact.to(self._device, torch.float32)
            quantized, quant_state = self._functional.quantize_blockwise(flat, code=codebook, blocksize=BLOCK)
            state[kind].copy_(quantized)
            state[f"{kind}_scales"].copy_(quant_state.absmax)

    @override
    def is_moving(self, state: MomentState, index: torch.Tensor) -> torch.Tensor:
        """Return for each element of ``index`` whether its stored first moment is not zero.

        A moment below a millionth of its block's largest is stored as zero.
        """
        if self._is_paged(state):
            return torch.zeros_like(index, dtype=torch.bool)
        quantized, scales = state["exp_avg"], state["exp_avg_scales"]
        is_nonzero = quantized.index_select(0, index) != self._index_of_zero
        return is_nonzero & (scales.index_select(0, index // BLOCK) != 0)

    def _is_paged(self, state: MomentState) -> bool:
        return getattr(state["exp_avg"], "is_paged", False)

    def _synchronize(self, state: MomentState) -> None:
        """Wait for the GPU before the host touches pages that kernels write to."""
        if self._is_paged(state):
            torch.cuda.synchronize(self._device)


def fused_adamw(
    master: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    param_group: Mapping[str, Any], step: int, factor: float,
) -> None:  # fmt: skip
    """Take one step of torch's fused AdamW on float32 [n], in place, with the gradient multiplied by ``factor``."""
    beta1, beta2 = param_group["betas"]
    divisor = torch.full((), 1 / factor, device=master.device) if factor != 1 else None
    torch._fused_adamw_(
        [master], [gradient], [exp_avg], [exp_avg_sq], [], [torch.full((), float(step), device=master.device)],
        lr=param_group["lr"], beta1=beta1, beta2=beta2, weight_decay=param_group["weight_decay"],
        eps=param_group["eps"], amsgrad=False, maximize=False, grad_scale=divisor, found_inf=None,
    )  # fmt: skip


def moment_format(name: OptimName, device: torch.device) -> MomentFormat:
    """Return the moment format of an optimizer whose moments are not float32."""
    return EightBit(device, paged=name == "paged_adamw_8bit")


def _slice_quantized(quantized: torch.Tensor, span: slice) -> torch.Tensor:
    """Return a slice of 8-bit moments, with the attributes by which bitsandbytes recognises paged tensors."""
    part = quantized[span]
    if getattr(quantized, "is_paged", False):
        part.is_paged, part.page_deviceid = True, quantized.page_deviceid  # type: ignore[attr-defined]
    return part
