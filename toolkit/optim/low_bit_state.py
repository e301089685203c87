"""AdamW state of one tensor with moments in 8 or 16 bits, and optionally a split master instead of an fp32 copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from toolkit.optim.flat_buffers import OptimizerState
from toolkit.optim.gradients import Clipping
from toolkit.optim.moments import MomentFormat
from toolkit.optim.rounding import join_halves, split_halves
from toolkit.optim.state_fragments import KINDS, MASTER, MOMENTS, FragmentState


class LowBitState(OptimizerState, FragmentState):
    """The low-bit state of one tensor: an ``OptimizerState`` of one fragment, itself.

    The master is the parameter itself if that is float32; else an fp32 copy, or with ``join_buffer`` a split master:
    the bfloat16 parameter and the 16 low bits that it lacks, which is the same number in 4 bytes instead of 6.

    Args:
        group: index of the parameter group.
        parameter: a contiguous tensor.
        scratch: as for ``Gradients``, its length a multiple of ``toolkit.optim.moments.BLOCK`` if there are several
            slices; like the two arguments after it.
        moment_format: storage format of the moments.
        join_buffer: workspace like ``scratch`` in which split masters are joined; None keeps an fp32 copy instead.
    """

    def __init__(
        self,
        group: int,
        parameter: nn.Parameter,
        scratch: torch.Tensor,
        accumulates: bool,
        ranks: int,
        moment_format: MomentFormat,
        join_buffer: torch.Tensor | None = None,
    ) -> None:
        super().__init__(group, [parameter], scratch, accumulates, ranks)
        self._format, self._step, self._join_buffer = moment_format, 0, join_buffer
        self._moments = moment_format.create(self.total, self.device)
        self._weight = parameter.detach().view(-1)
        is_split = self.is_low and join_buffer is not None
        self._master = None if is_split else self._weight.float()  # ``float`` returns a float32 tensor itself
        self._low_bits = torch.zeros(self.total if is_split else 0, dtype=torch.int16, device=self.device)

    @property
    @override
    def states(self) -> list[LowBitState]:
        return [self]

    @property
    @override
    def updates(self) -> int:
        return self._step

    @override
    def read(self) -> dict[str, torch.Tensor]:
        masters_and_moments = self._master_at(slice(None)), *self._format.read(self._moments)
        return dict(zip(KINDS, masters_and_moments, strict=True))

    @torch.no_grad()
    @override
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        if MASTER in tensors:
            master = tensors[MASTER].detach().to(self.device, torch.float32, copy=True)
            if self._master is not None:
                self._master.copy_(master)
            else:
                split_halves(master, self._weight, self._low_bits)
        if MOMENTS[0] in tensors:
            self._format.write(self._moments, *(tensors[kind] for kind in MOMENTS))
        self._step = updates

    @override
    def raw(self) -> dict[str, torch.Tensor]:
        return {**self._moments, "step": torch.tensor(float(self._step))}

    @override
    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        for kind, stored in self._moments.items():
            stored.copy_(raw[kind])
        self._step = int(raw["step"])

    @override
    def update(self, param_group: dict[str, Any], clipping: Clipping) -> None:
        factor = clipping.factor
        if factor is None:  # the gradient's norm is not finite
            return
        self._step += 1
        for part in self.slices:
            span = slice(part.start, part.stop)
            master = self._master_at(span, self._join_buffer)
            self._format.update(self._moments, span, master, self.gradient(part), param_group, self._step, factor)
            if self._master is None:
                split_halves(master, self._weight[span], self._low_bits[span])
        self.write_back()

    @override
    def write_back(self) -> None:
        """Copy the master into the parameter, rounded; a split master needs no copy."""
        if self._master is not None and self.is_low:
            self._weight.copy_(self._master)

    @override
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._master_at(self.sample_index), self._format.is_moving(self._moments, self.sample_index)

    def _master_at(self, index: slice | torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Return elements of the fp32 master: views if it is kept whole, else copies, joined into ``buffer``."""
        if self._master is not None:
            return self._master[index]
        weight, low_bits = self._weight[index], self._low_bits[index]
        out = torch.empty_like(weight, dtype=torch.float32) if buffer is None else buffer[: weight.numel()]
        return join_halves(weight, low_bits, out)
