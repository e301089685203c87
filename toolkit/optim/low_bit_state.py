"""The state of one trained tensor with moments in fewer than 32 bits, and where wanted without a float32 master."""

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

    What takes the updates is the parameter itself where that is float32; else a float32 copy, or with ``splits`` the
    parameter and 16 more bits beside it, which is the same number in 4 bytes instead of 6.

    Args:
        group: index of the parameter group.
        parameter: contiguous.
        scratch: float32, of at least ``piece`` elements or as many as the parameter has.
        piece: elements updated at once; a multiple of ``toolkit.optim.moments.BLOCK``.
        accumulates: a step has more than one backward pass.
        ranks: processes over which gradients are summed.
        moment_format: how the moments are stored.
        splits: float32 like ``scratch``, in which the exact weights are put together; none keeps a float32 copy.
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
        splits: torch.Tensor | None = None,
    ) -> None:
        super().__init__(group, [parameter], scratch, piece, accumulates, ranks)
        self._format, self._step, self._joined = moment_format, 0, splits
        self._moments = moment_format.create(self.total, self.device)
        self._weight = parameter.detach().view(-1)
        self._exact: torch.Tensor | None = None
        self._rest: torch.Tensor | None = None
        self._index: torch.Tensor | None = None
        if not self.is_low:
            self._exact = self._weight
        elif splits is None:
            self._exact = self._weight.float()
        else:
            self._rest = torch.zeros(self.total, dtype=torch.int16, device=self.device)

    @property
    @override
    def states(self) -> list[LowBitState]:
        return [self]

    @property
    def own_bytes(self) -> tuple[int, int]:
        """Return the bytes held beside the parameter: for the exact weight, and for the moments."""
        beside = [t for t in (self._exact, self._rest) if t is not None and t is not self._weight]
        return sum(t.nbytes for t in beside), sum(t.nbytes for t in self._moments.values())

    @property
    def master(self) -> torch.Tensor:
        """Return what takes the updates, float32 in the tensor's shape; a copy where it is kept in two halves."""
        shape = self.parameters[0].shape
        if self._exact is not None:
            return self._exact.view(shape)
        assert self._rest is not None
        return join_halves(self._weight, self._rest, torch.empty(self.total, device=self.device)).view(shape)

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
        """Set what is given; a moment that is not given while the other is, is requantised."""
        if "master" in values:
            flat = values["master"].detach().to(self.device, torch.float32, copy=True).flatten()
            if self._exact is not None:
                self._exact.copy_(flat)
            else:
                assert self._rest is not None
                split_halves(flat, self._weight, self._rest)
        if values.keys() & set(MOMENTS):
            stored = dict(zip(MOMENTS, self._format.read(self._moments), strict=True))
            self._format.write(self._moments, *(values.get(kind, stored[kind]).flatten() for kind in MOMENTS))
        if step is not None:
            self._step = int(step)

    def raw(self) -> dict[str, torch.Tensor]:
        """Return step, and moments as they are stored: codes and scales, or 16-bit numbers, flat."""
        return {**self._moments, "step": self.step}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Set what ``raw`` returned."""
        for kind, own in self._moments.items():
            own.copy_(raw[kind])
        self._step = int(raw["step"])

    @override
    def update(self, settings: dict[str, Any], clipping: Clipping) -> None:
        factor = clipping.factor
        if factor is None:
            return
        self._step += 1
        for part in self.slices:
            span = slice(part.start, part.stop)
            exact = self._exact_weights(part)
            gradient = self.gradient(part)
            self._format.update(self._moments, span, exact, gradient, settings, self._step, factor)
            if self._rest is not None:
                split_halves(exact, self._weight[span], self._rest[span])
        self.write_back()

    @override
    def write_back(self) -> None:
        """Round the master into the parameter; one in two halves is there already."""
        if self._exact is not None and self._exact is not self._weight:
            self._weight.copy_(self._exact)

    @override
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._index is None:
            self._index = sampled_indices([self.total]).to(self.device)
        index = self._index
        if self._exact is not None:
            values = self._exact.index_select(0, index)
        else:
            assert self._rest is not None
            parts = self._weight.index_select(0, index), self._rest.index_select(0, index)
            values = join_halves(*parts, torch.empty(index.numel(), device=self.device))
        return values, self._format.moving(self._moments, index)

    def _exact_weights(self, part: GradientSlice) -> torch.Tensor:
        """Return the exact weights of a slice, float32: where they are kept, or joined from their halves."""
        span = slice(part.start, part.stop)
        if self._exact is not None:
            return self._exact[span]
        assert self._rest is not None
        assert self._joined is not None
        return join_halves(self._weight[span], self._rest[span], self._joined[: part.stop - part.start])
