"""Flat float32 buffers for the masters and moments of many tensors, and the pieces in which they are updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from toolkit.optim.gradients import Clipping, Gradients, GradientSlice
from toolkit.optim.update_monitor import sampled_indices


class TensorState(Protocol):
    """What an optimizer keeps of one trained tensor, however it stores it."""

    @property
    def master(self) -> torch.Tensor:
        """What takes the updates, float32 in the tensor's shape."""

    @property
    def exp_avg(self) -> torch.Tensor:
        """The first moment, float32 in the tensor's shape."""

    @property
    def exp_avg_sq(self) -> torch.Tensor:
        """The second moment, likewise."""

    @property
    def step(self) -> torch.Tensor:
        """Updates done: a float32 scalar."""

    def put(
        self,
        master: torch.Tensor | None = None,
        exp_avg: torch.Tensor | None = None,
        exp_avg_sq: torch.Tensor | None = None,
        step: float | None = None,
    ) -> None:
        """Take float32 values in, rounded to how they are stored here; what is none stays as it is.

        The parameter follows with the optimizer's ``write_back``.
        """

    def raw(self) -> dict[str, torch.Tensor]:
        """Moments and step exactly as they are stored, for ``set_raw`` of the same optimizer and tensor.

        The master is not among them: its float32 value is exact.
        """

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Take in what ``raw`` gave."""


@dataclass(frozen=True)
class FlatState:
    """The state of one tensor in float32. Views: writing into them changes the optimizer's state."""

    master: torch.Tensor
    """Float32, in the tensor's shape; the parameter itself where that is float32."""
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    """Updates done: a float32 scalar that all tensors of a parameter group share."""

    @torch.no_grad()
    def put(  # noqa: D102
        self,
        master: torch.Tensor | None = None,
        exp_avg: torch.Tensor | None = None,
        exp_avg_sq: torch.Tensor | None = None,
        step: float | None = None,
    ) -> None:
        if master is not None:
            self.master.copy_(master)
        if exp_avg is not None:
            self.exp_avg.copy_(exp_avg)
        if exp_avg_sq is not None:
            self.exp_avg_sq.copy_(exp_avg_sq)
        if step is not None:
            self.step.fill_(step)

    def raw(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:  # noqa: D102
        for kind, own in self.raw().items():
            own.copy_(raw[kind])


class StateStore(Protocol):
    """Tensors of one parameter group with their gradients and state."""

    group: int
    is_summed: bool
    gradients: list[torch.Tensor]
    stretches: list[GradientSlice]
    parameters: list[nn.Parameter]

    @property
    def states(self) -> Sequence[TensorState]:
        """One a parameter, in their order."""

    def collect(self) -> None:
        """As ``Gradients.collect``."""

    def begin(self) -> None:
        """As ``Gradients.begin``."""

    def gradient(self, stretch: GradientSlice) -> torch.Tensor:
        """As ``Gradients.gradient``."""

    def end(self) -> None:
        """As ``Gradients.end``."""

    def update(self, settings: dict[str, Any], clipping: Clipping) -> None:
        """One step of AdamW on the clipped gradient; none where its norm is not finite."""

    def write_back(self) -> None:
        """Round the masters into the parameters."""

    def peek(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled masters, and whether the first moment of each is not zero; see ``toolkit.optim.update_monitor``."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a ``FlatBuffers`` with the state that belongs to it. All lists hold views."""

    stretch: GradientSlice
    lengths: list[int]
    """Into how many elements each the update cuts the gradient: one entry where the masters are one stretch."""
    masters: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    steps: list[torch.Tensor]
    rounded: list[torch.Tensor]
    """The low-precision parameters' elements; empty for parameters that are their own masters."""
    exact: list[torch.Tensor]
    """The masters' elements, in the same shapes."""

    def write_back(self) -> None:
        """Round the masters into the parameters."""
        if self.rounded:
            torch._foreach_copy_(self.rounded, self.exact)


class FlatBuffers(Gradients):
    """Tensors of one parameter group, all float32 or all low-precision, one after another, with float32 state."""

    def __init__(
        self,
        group: int,
        parameters: Sequence[nn.Parameter],
        scratch: torch.Tensor,
        piece: int,
        accumulates: bool,
        ranks: int,
    ) -> None:
        """The arguments are those of ``Gradients``."""
        super().__init__(group, parameters, scratch, piece, accumulates, ranks)
        self._exp_avg, self._exp_avg_sq = (torch.zeros(self.total, device=self.device) for _ in range(2))
        self._step = torch.zeros((), device=self.device)
        self._index: torch.Tensor | None = None
        self._own_indices: list[torch.Tensor] = []
        self._master = torch.empty(self.total, device=self.device) if self.is_low else None
        masters: Sequence[torch.Tensor] = self.parameters
        if self._master is not None:
            masters = self._views(self._master)
            torch._foreach_copy_(masters, [p.detach() for p in parameters])
        moments = zip(masters, self._views(self._exp_avg), self._views(self._exp_avg_sq), strict=True)
        self.states = [FlatState(*tensors, self._step) for tensors in moments]
        self._pieces = [self._piece(stretch) for stretch in self.stretches]

    def update(self, settings: dict[str, Any], clipping: Clipping) -> None:
        """One step of AdamW on the clipped gradient; none where its norm is not finite.

        The kernel is that of torch.optim.AdamW(fused=True), which torch 2.13 offers piece by piece under no public
        name. It also stores the clipped gradient, into the scratch or the sums.
        """
        self._step += 1
        beta1, beta2 = settings["betas"]
        for piece in self._pieces:
            gradients = self.gradient(piece.stretch).split_with_sizes(piece.lengths)
            torch._fused_adamw_(
                piece.masters, gradients, piece.exp_avgs, piece.exp_avg_sqs, [], piece.steps, lr=settings["lr"],
                beta1=beta1, beta2=beta2, weight_decay=settings["weight_decay"], eps=settings["eps"],
                amsgrad=False, maximize=False, grad_scale=clipping.divisor, found_inf=clipping.found_inf,
            )  # fmt: skip
            piece.write_back()
        self._step -= clipping.found_inf

    def write_back(self) -> None:
        """Round the masters into the parameters."""
        for piece in self._pieces:
            piece.write_back()

    def peek(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``StateStore.peek``."""
        if self._index is None:
            self._index = sampled_indices([p.numel() for p in self.parameters]).to(self.device)
            self._own_indices = [sampled_indices([p.numel()]).to(self.device) for p in self.parameters]
        if self._master is not None:
            values = self._master.index_select(0, self._index)
        else:
            own = zip(self.parameters, self._own_indices, strict=True)
            values = torch.cat([p.detach().view(-1).index_select(0, index) for p, index in own])
        return values, self._exp_avg.index_select(0, self._index) != 0

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        parts = buffer.split_with_sizes([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _piece(self, stretch: GradientSlice) -> Piece:
        start, stop = stretch.start, stretch.stop
        exact = stretch.cut([state.master.detach() for state in self.states])
        lengths = [tensor.numel() for tensor in exact]
        moments = self._exp_avg[start:stop], self._exp_avg_sq[start:stop]
        if self._master is None:  # each of these masters lies elsewhere
            masters, rounded = [master.view(-1) for master in exact], []
        else:
            masters, lengths = [self._master[start:stop]], [stop - start]
            rounded = stretch.cut([p.detach() for p in self.parameters])
        exp_avgs, exp_avg_sqs = (list(moment.split_with_sizes(lengths)) for moment in moments)
        steps = [self._step] * len(lengths)
        return Piece(stretch, lengths, masters, exp_avgs, exp_avg_sqs, steps, rounded, exact)
