"""Flat float32 buffers for the masters and moments of many tensors, and the slices in which they are updated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from typing_extensions import override

from toolkit.optim.gradients import Clipping, Gradients, GradientSlice
from toolkit.optim.update_monitor import sampled_indices


class TensorState(Protocol):
    """The optimizer state of one trained tensor, however it is stored."""

    @property
    def master(self) -> torch.Tensor:
        """Return the fp32 master weight, which the update is applied to, in the tensor's shape."""

    @property
    def exp_avg(self) -> torch.Tensor:
        """Return the first moment, float32 in the tensor's shape."""

    @property
    def exp_avg_sq(self) -> torch.Tensor:
        """Return the second moment, float32 in the tensor's shape."""

    @property
    def step(self) -> torch.Tensor:
        """Return the number of updates done: a float32 scalar."""

    def write(self, values: Mapping[str, torch.Tensor], step: float | None = None) -> None:
        """Set some of master, exp_avg and exp_avg_sq from float32 values, rounded to the stored format.

        The parameter itself changes only with the optimizer's ``write_back``.
        """

    def raw(self) -> dict[str, torch.Tensor]:
        """Return moments and step in their stored format, such as 8-bit codes and scales; for checkpoints.

        The master is not included: its float32 value is exact already.
        """

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Restore moments and step from the result of ``raw`` for the same optimizer and tensor."""


@dataclass(frozen=True)
class FlatState:
    """The float32 state of one tensor. Views: writing into them changes the optimizer's state."""

    master: torch.Tensor
    """Float32, in the tensor's shape; the parameter itself if that is float32."""
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    """Number of updates done: a float32 scalar that all tensors of a parameter group share."""

    @torch.no_grad()
    def write(self, values: Mapping[str, torch.Tensor], step: float | None = None) -> None:
        """Set the given kinds of state, and the step if given."""
        for kind, value in values.items():
            getattr(self, kind).copy_(value)
        if step is not None:
            self.step.fill_(step)

    def raw(self) -> dict[str, torch.Tensor]:
        """Return views of moments and step, which are float32 as stored."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Set moments and step from the result of ``raw``."""
        for kind, view in self.raw().items():
            view.copy_(raw[kind])


class OptimizerState(Gradients, ABC):
    """Gradients and AdamW state of some tensors of one parameter group; takes the arguments of ``Gradients``."""

    @property
    @abstractmethod
    def states(self) -> Sequence[TensorState]:
        """Return the state of each tensor, in the order of ``parameters``."""

    @abstractmethod
    def update(self, settings: dict[str, Any], clipping: Clipping) -> None:
        """Take one step of AdamW with the clipped gradient; change nothing if the gradient's norm is not finite."""

    @abstractmethod
    def write_back(self) -> None:
        """Copy the masters into the parameters, rounded to their precision."""

    @abstractmethod
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sample of the masters, and for each element whether its first moment is not zero.

        ``UpdateMonitor`` compares the samples before and after an update.
        """


@dataclass(frozen=True)
class StateSlice:
    """A slice of ``FlatBuffers`` that one kernel call updates: gradients and their state. All lists hold views."""

    gradients: GradientSlice
    lengths: list[int]
    """Elements of each part that the gradient is split into for the kernel; one part if the masters are contiguous."""
    masters: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    steps: list[torch.Tensor]
    rounded: list[torch.Tensor]
    """The low-precision parameters' elements; empty for float32 parameters, which are their own masters."""
    exact: list[torch.Tensor]
    """The masters' elements, in the shapes of ``rounded``."""

    def write_back(self) -> None:
        """Copy the masters into the parameters, rounded to their precision."""
        if self.rounded:
            torch._foreach_copy_(self.rounded, self.exact)


class FlatBuffers(OptimizerState):
    """Flat float32 masters and moments for tensors of one parameter group, all float32 or all low-precision."""

    def __init__(
        self,
        group: int,
        parameters: Sequence[nn.Parameter],
        scratch: torch.Tensor,
        piece: int,
        accumulates: bool,
        ranks: int,
    ) -> None:
        super().__init__(group, parameters, scratch, piece, accumulates, ranks)
        self._exp_avg, self._exp_avg_sq = (torch.zeros(self.total, device=self.device) for _ in range(2))
        self._step = torch.zeros((), device=self.device)
        self._sample_index: torch.Tensor | None = None
        self._tensor_indices: list[torch.Tensor] = []
        self._master = torch.empty(self.total, device=self.device) if self.is_low else None
        masters: Sequence[torch.Tensor] = self.parameters
        if self._master is not None:
            masters = self._views(self._master)
            torch._foreach_copy_(masters, [p.detach() for p in parameters])
        moments = zip(masters, self._views(self._exp_avg), self._views(self._exp_avg_sq), strict=True)
        self._states = [FlatState(*tensors, self._step) for tensors in moments]
        self._state_slices = [self._state_slice(part) for part in self.slices]

    @property
    @override
    def states(self) -> Sequence[FlatState]:
        return self._states

    @override
    def update(self, settings: dict[str, Any], clipping: Clipping) -> None:
        """Take one step of AdamW with the clipped gradient; change nothing if the gradient's norm is not finite.

        Calls the kernel of torch.optim.AdamW(fused=True) on each slice; torch 2.13 has no public name for it. The
        kernel also writes the clipped gradient back, into the scratch or the fp32 accumulation buffer.
        """
        self._step += 1
        beta1, beta2 = settings["betas"]
        for part in self._state_slices:
            gradients = self.gradient(part.gradients).split_with_sizes(part.lengths)
            torch._fused_adamw_(
                part.masters, gradients, part.exp_avgs, part.exp_avg_sqs, [], part.steps, lr=settings["lr"],
                beta1=beta1, beta2=beta2, weight_decay=settings["weight_decay"], eps=settings["eps"],
                amsgrad=False, maximize=False, grad_scale=clipping.divisor, found_inf=clipping.found_inf,
            )  # fmt: skip
            part.write_back()
        self._step -= clipping.found_inf  # undo the count of a skipped step, without waiting for the device

    @override
    def write_back(self) -> None:
        for part in self._state_slices:
            part.write_back()

    @override
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._sample_index is None:
            self._sample_index = sampled_indices([p.numel() for p in self.parameters]).to(self.device)
            self._tensor_indices = [sampled_indices([p.numel()]).to(self.device) for p in self.parameters]
        if self._master is not None:
            values = self._master.index_select(0, self._sample_index)
        else:
            pairs = zip(self.parameters, self._tensor_indices, strict=True)
            values = torch.cat([p.detach().view(-1).index_select(0, index) for p, index in pairs])
        return values, self._exp_avg.index_select(0, self._sample_index) != 0

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return one view of a flat buffer for each parameter, in its shape."""
        parts = buffer.split_with_sizes([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _state_slice(self, part: GradientSlice) -> StateSlice:
        """Build the views of masters, moments and parameters that belong to a slice of the gradients."""
        start, stop = part.start, part.stop
        exact = part.cut([state.master.detach() for state in self.states])
        lengths = [tensor.numel() for tensor in exact]
        moments = self._exp_avg[start:stop], self._exp_avg_sq[start:stop]
        if self._master is None:  # the masters are the parameters, each in memory of its own
            masters, rounded = [master.view(-1) for master in exact], []
        else:
            masters, lengths = [self._master[start:stop]], [stop - start]
            rounded = part.cut([p.detach() for p in self.parameters])
        exp_avgs, exp_avg_sqs = (list(moment.split_with_sizes(lengths)) for moment in moments)
        steps = [self._step] * len(lengths)
        return StateSlice(part, lengths, masters, exp_avgs, exp_avg_sqs, steps, rounded, exact)
