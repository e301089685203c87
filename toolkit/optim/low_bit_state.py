"""AdamW state of one tensor with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from toolkit.optim.flat_buffers import OptimizerState
from toolkit.optim.gradients import Clipping
from toolkit.optim.moments import MomentFormat
from toolkit.optim.state_fragments import KINDS, MASTER, MOMENTS, FragmentState
from toolkit.optim.update_kernels import KernelFactory


class LowBitState(OptimizerState, FragmentState):
    """The low-bit state of one tensor: an ``OptimizerState`` of one fragment, itself.

    The master is the parameter itself if that is float32, else an fp32 copy.

    Args:
        group: index of the parameter group.
        parameter: a contiguous tensor.
        scratch: as for ``Gradients``, its length a multiple of ``toolkit.optim.moments.BLOCK`` if there are several
            slices; like ``accumulates``, and ``kernels``, which here serve sums and norms alone.
        moment_format: storage format of the moments.
    """

    def __init__(
        self,
        group: int,
        parameter: nn.Parameter,
        scratch: torch.Tensor,
        accumulates: bool,
        moment_format: MomentFormat,
        kernels: KernelFactory | None = None,
    ) -> None:
        super().__init__(group, [parameter], scratch, accumulates, kernels)
        self._format, self._step = moment_format, 0
        self._moments = moment_format.create(self.total, self.device)
        self._weight = parameter.detach().view(-1)
        self._master = self._weight.float()  # ``float`` returns a float32 tensor itself

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
        return dict(zip(KINDS, (self._master, *self._format.read(self._moments)), strict=True))

    @torch.no_grad()
    @override
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        if MASTER in tensors:
            self._master.copy_(tensors[MASTER])
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
            master, gradient = self._master[span], self.gradient(part)
            self._format.update(self._moments, span, master, gradient, param_group, self._step, factor)
        self.write_back()

    @override
    def write_back(self) -> None:
        if self.is_low:
            self._weight.copy_(self._master)

    @override
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.sample_index
        return self._master.index_select(0, index), self._format.is_moving(self._moments, index)
