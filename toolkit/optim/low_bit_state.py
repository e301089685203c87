"""AdamW state of one tensor with moments in 8 or 16 bits, and optionally a split master instead of an fp32 copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from toolkit.optim.flat_buffers import OptimizerState
from toolkit.optim.gradients import Clipping, GradientSlice
from toolkit.optim.moments import MOMENTS, MomentFormat
from toolkit.optim.rounding import join_halves, split_halves
from toolkit.optim.update_monitor import sampled_indices


class LowBitState(OptimizerState):
    """The low-bit state of one tensor: an ``OptimizerState`` and a ``TensorState``.

    The master is the parameter itself if that is float32; else an fp32 copy, or with ``join_buffer`` a split master:
    the bfloat16 parameter and the 16 low bits that it lacks, which is the same number in 4 bytes instead of 6.

    Args:
        group: index of the parameter group.
        parameter: a contiguous tensor.
        scratch: float32 workspace of ``piece`` elements, or of the parameter's elements if they are fewer.
        piece: elements updated by one kernel call; a multiple of ``toolkit.optim.moments.BLOCK``.
        accumulates: True if a step has more than one backward pass.
        ranks: number of processes over which gradients are summed.
        moment_format: storage format of the moments.
        join_buffer: workspace like ``scratch`` in which split masters are joined; None keeps an fp32 copy instead.
    """

    def __init__(
        self,
        group: int,
        parameter: nn.Parameter,
        scratch: torch.Tensor,
        piece: int,
        accumulates: bool,
        ranks: int,
        moment_format: MomentFormat,
        join_buffer: torch.Tensor | None = None,
    ) -> None:
        super().__init__(group, [parameter], scratch, piece, accumulates, ranks)
        self._format, self._step, self._join_buffer = moment_format, 0, join_buffer
        self._moments = moment_format.create(self.total, self.device)
        self._flat_weight = parameter.detach().view(-1)
        self._master: torch.Tensor | None = None
        self._low_bits: torch.Tensor | None = None
        self._sample_index: torch.Tensor | None = None
        if not self.is_low:
            self._master = self._flat_weight
        elif join_buffer is None:
            self._master = self._flat_weight.float()
        else:
            self._low_bits = torch.zeros(self.total, dtype=torch.int16, device=self.device)

    @property
    @override
    def states(self) -> list[LowBitState]:
        return [self]

    @property
    def own_bytes(self) -> tuple[int, int]:
        """Return the bytes held besides the parameter: for its master, and for the moments."""
        beside = [t for t in (self._master, self._low_bits) if t is not None and t is not self._flat_weight]
        return sum(t.nbytes for t in beside), sum(t.nbytes for t in self._moments.values())

    @property
    def master(self) -> torch.Tensor:
        """Return the fp32 master weight in the tensor's shape; a copy if it is a split master."""
        shape = self.parameters[0].shape
        if self._master is not None:
            return self._master.view(shape)
        assert self._low_bits is not None
        return join_halves(self._flat_weight, self._low_bits, torch.empty(self.total, device=self.device)).view(shape)

    @property
    def exp_avg(self) -> torch.Tensor:
        """Return a float32 copy of the first moment, in the tensor's shape."""
        return self._format.read(self._moments)[0].view(self.parameters[0].shape)

    @property
    def exp_avg_sq(self) -> torch.Tensor:
        """Return a float32 copy of the second moment, in the tensor's shape."""
        return self._format.read(self._moments)[1].view(self.parameters[0].shape)

    @property
    def step(self) -> torch.Tensor:
        """Return the number of updates done: a float32 scalar."""
        return torch.tensor(float(self._step))

    @torch.no_grad()
    def write(self, values: Mapping[str, torch.Tensor], step: float | None = None) -> None:
        """Set the given kinds of state, and the step if given.

        Both moments are requantised if either is given.
        """
        if "master" in values:
            flat = values["master"].detach().to(self.device, torch.float32, copy=True).flatten()
            if self._master is not None:
                self._master.copy_(flat)
            else:
                assert self._low_bits is not None
                split_halves(flat, self._flat_weight, self._low_bits)
        if values.keys() & set(MOMENTS):
            stored = dict(zip(MOMENTS, self._format.read(self._moments), strict=True))
            self._format.write(self._moments, *(values.get(kind, stored[kind]).flatten() for kind in MOMENTS))
        if step is not None:
            self._step = int(step)

    def raw(self) -> dict[str, torch.Tensor]:
        """Return the step, and the moments in their stored format: flat codes and scales, or bfloat16 numbers."""
        return {**self._moments, "step": self.step}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Set moments and step from the result of ``raw``."""
        for kind, stored in self._moments.items():
            stored.copy_(raw[kind])
        self._step = int(raw["step"])

    @override
    def update(self, settings: dict[str, Any], clipping: Clipping) -> None:
        factor = clipping.factor
        if factor is None:  # the gradient's norm is not finite
            return
        self._step += 1
        for part in self.slices:
            span = slice(part.start, part.stop)
            exact = self._master_slice(part)
            gradient = self.gradient(part)
            self._format.update(self._moments, span, exact, gradient, settings, self._step, factor)
            if self._low_bits is not None:
                split_halves(exact, self._flat_weight[span], self._low_bits[span])
        self.write_back()

    @override
    def write_back(self) -> None:
        """Copy the master into the parameter, rounded; a split master needs no copy."""
        if self._master is not None and self._master is not self._flat_weight:
            self._flat_weight.copy_(self._master)

    @override
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._sample_index is None:
            self._sample_index = sampled_indices([self.total]).to(self.device)
        index = self._sample_index
        if self._master is not None:
            values = self._master.index_select(0, index)
        else:
            assert self._low_bits is not None
            parts = self._flat_weight.index_select(0, index), self._low_bits.index_select(0, index)
            values = join_halves(*parts, torch.empty(index.numel(), device=self.device))
        return values, self._format.moving(self._moments, index)

    def _master_slice(self, part: GradientSlice) -> torch.Tensor:
        """Return the master of a slice, float32: a view of the copy, or a split master joined in the workspace."""
        span = slice(part.start, part.stop)
        if self._master is not None:
            return self._master[span]
        assert self._low_bits is not None
        assert self._join_buffer is not None
        return join_halves(self._flat_weight[span], self._low_bits[span], self._join_buffer[: part.stop - part.start])
