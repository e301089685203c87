"""Flat float32 buffers for the masters and moments of many tensors, and the slices in which they are updated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from toolkit.optim.gradients import Clipping, Gradients, GradientSlice, copy_each
from toolkit.optim.state_fragments import KINDS, FlatState, FragmentState
from toolkit.optim.update_kernels import KernelFactory
from toolkit.optim.update_monitor import sampled_indices


class OptimizerState(Gradients, ABC):
    """Gradients and AdamW state of some tensors of one parameter group; takes the arguments of ``Gradients``."""

    @property
    @abstractmethod
    def states(self) -> Sequence[FragmentState]:
        """Return the state of each tensor, as one fragment, in the order of ``parameters``."""

    @abstractmethod
    def update(self, param_group: dict[str, Any], clipping: Clipping) -> None:
        """Take one step of AdamW with the clipped gradient; change nothing if the gradient's norm is not finite."""

    @abstractmethod
    def write_back(self) -> None:
        """Copy the masters into the parameters, rounded to their precision."""

    @abstractmethod
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sample of the masters, and for each element whether its first moment is not zero.

        ``UpdateMonitor`` compares the samples before and after an update.
        """

    @cached_property
    def sample_index(self) -> torch.Tensor:
        """Return the indices of the sample in the flattened, concatenated parameters, int64."""
        return sampled_indices(self.sizes).to(self.device)


@dataclass(frozen=True)
class StateSlice:
    """A slice of ``FlatBuffers`` that one kernel call updates: gradients and their state. All lists hold flat views."""

    gradients: GradientSlice
    masters: list[torch.Tensor]
    """The slice as one tensor of its own buffer, or in parts if each parameter is its own master."""
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    steps: list[torch.Tensor]
    weights: list[torch.Tensor]
    """Parts of the low-precision parameters; empty for float32 parameters, which are their own masters."""
    masters_by_weight: list[torch.Tensor]
    """The masters of each part in ``weights``."""

    def write_back(self) -> None:
        """Copy the masters into the parameters, rounded to their precision."""
        if self.weights:
            copy_each(self.weights, self.masters_by_weight)


class FlatBuffers(OptimizerState):
    """Flat float32 masters and moments for tensors of one parameter group and one precision."""

    def __init__(
        self,
        group: int,
        parameters: Sequence[nn.Parameter],
        scratch: torch.Tensor | None,
        accumulates: bool,
        kernels: KernelFactory | None = None,
    ) -> None:
        super().__init__(group, parameters, scratch, accumulates, kernels)
        self._exp_avg, self._exp_avg_sq = (torch.zeros(self.total, device=self.device) for _ in range(2))
        self._step = torch.zeros((), device=self.device)
        self._weights = [p.detach().view(-1) for p in parameters]
        self._master = torch.empty(self.total, device=self.device) if self.is_low else None
        masters: Sequence[torch.Tensor] = self._weights
        if self._master is not None:
            masters = self._master.split_with_sizes(self.sizes)
            torch._foreach_copy_(masters, self._weights)
        moments = (moment.split_with_sizes(self.sizes) for moment in (self._exp_avg, self._exp_avg_sq))
        self._states = [
            FlatState(dict(zip(KINDS, tensors, strict=True)), self._step)
            for tensors in zip(masters, *moments, strict=True)
        ]
        self._state_slices = [self._state_slice(part, masters) for part in self.slices]

    @property
    @override
    def states(self) -> Sequence[FragmentState]:
        return self._states

    @override
    def update(self, param_group: dict[str, Any], clipping: Clipping) -> None:
        """Take one step of AdamW with the clipped gradient; change nothing if the gradient's norm is not finite.

        Without kernels of our own, calls the kernel of torch.optim.AdamW(fused=True) on each slice; torch 2.13 has no
        public name for it. That kernel also writes the clipped gradient back, into the scratch or the fp32 accumulation
        buffer.
        """
        self._step += 1
        if self.kernels:
            self.kernels.adamw(
                self.by_tensor(), self._weights, self._master, (self._exp_avg, self._exp_avg_sq), self._step,
                param_group, clipping.divisor, clipping.found_inf,
            )  # fmt: skip
        else:
            self._update_slices(param_group, clipping)
        self._step -= clipping.found_inf  # undo the count of a skipped step, without waiting for the device

    def _update_slices(self, param_group: dict[str, Any], clipping: Clipping) -> None:
        beta1, beta2 = param_group["betas"]
        for part in self._state_slices:
            gradients = self.gradient(part.gradients).split_with_sizes([master.numel() for master in part.masters])
            torch._fused_adamw_(
                part.masters, gradients, part.exp_avgs, part.exp_avg_sqs, [], part.steps, lr=param_group["lr"],
                beta1=beta1, beta2=beta2, weight_decay=param_group["weight_decay"], eps=param_group["eps"],
                amsgrad=False, maximize=False, grad_scale=clipping.divisor, found_inf=clipping.found_inf,
            )  # fmt: skip
            part.write_back()

    @override
    def write_back(self) -> None:
        if self._master is not None:
            torch._foreach_copy_(self._weights, self._master.split_with_sizes(self.sizes))

    @override
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._master is not None:
            values = self._master.index_select(0, self.sample_index)
        else:
            pairs = zip(self._weights, self._indices_by_weight, strict=True)
            values = torch.cat([weight.index_select(0, index) for weight, index in pairs])
        return values, self._exp_avg.index_select(0, self.sample_index) != 0

    @cached_property
    def _indices_by_weight(self) -> list[torch.Tensor]:
        """Return ``sample_index`` in parts, each relative to the start of its parameter."""
        return [sampled_indices([size]).to(self.device) for size in self.sizes]

    def _state_slice(self, part: GradientSlice, masters: Sequence[torch.Tensor]) -> StateSlice:
        """Build the views of masters, moments and parameters that belong to a slice of the gradients."""
        span = slice(part.start, part.stop)
        by_weight = part.cut(masters)
        own, weights = by_weight, []
        if self._master is not None:
            own, weights = [self._master[span]], part.cut(self._weights)
        lengths = [master.numel() for master in own]
        exp_avgs, exp_avg_sqs = (
            list(moment[span].split_with_sizes(lengths)) for moment in (self._exp_avg, self._exp_avg_sq)
        )
        return StateSlice(part, own, exp_avgs, exp_avg_sqs, [self._step] * len(own), weights, by_weight)
