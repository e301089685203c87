"""Gradients between backward and the update: accumulated in float32 if needed, and handed on in slices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from toolkit.optim.update_kernels import KernelFactory


@dataclass(frozen=True)
class GradientSlice:
    """A slice of the concatenated, flattened tensors, updated by one kernel call. All lists hold views."""

    start: int
    stop: int
    """Range in elements of all tensors, flattened and concatenated."""
    members: tuple[tuple[int, slice | None], ...]
    """Index of each tensor in the slice, and the range of its elements; None for the whole tensor."""
    scratch: torch.Tensor
    """Float32 [stop - start], overwritten by ``gather``."""
    upcast: list[torch.Tensor]
    """Views of ``scratch``, one for each member, in the shape of its gradient."""

    def gather(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copy the members' gradients into ``scratch``, which upcasts them to float32, and return it."""
        copy_each(self.upcast, self.cut(gradients))
        return self.scratch

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the parts of ``tensors``, which holds one entry for each parameter, that lie in this slice."""
        return [tensors[i] if part is None else tensors[i].view(-1)[part] for i, part in self.members]


class Gradients:
    """Gradients of tensors of one parameter group that are all float32 or all low-precision.

    Args:
        group: index of the parameter group.
        parameters: contiguous tensors on one device.
        scratch: float32 workspace, as long as the longest slice: the elements updated by one kernel call. None if
            ``kernels`` do all; then there are no slices.
        accumulates: True if a step has more than one backward pass, after each of which ``collect`` is called.
        kernels: makes kernels that read gradients where they are; then all have one precision. None without them.
    """

    def __init__(
        self,
        group: int,
        parameters: Sequence[nn.Parameter],
        scratch: torch.Tensor | None,
        accumulates: bool,
        kernels: KernelFactory | None = None,
    ) -> None:
        self.group, self.parameters = group, list(parameters)
        self.is_low = parameters[0].dtype != torch.float32
        """True for low-precision parameters, which need fp32 masters; float32 ones are their own masters."""
        self.is_summed = accumulates and self.is_low
        """True if an fp32 buffer accumulates the gradients; autograd accumulates float32 ones in ``p.grad`` already."""
        self.gradients: list[torch.Tensor] = []
        """From ``begin`` to ``end``: the parameters' gradients, or the one fp32 accumulation buffer."""
        self._accumulated: torch.Tensor | None = None
        self.sizes = [p.numel() for p in parameters]
        self._ends = list(accumulate(self.sizes))
        self.total, self.device = self._ends[-1], parameters[0].device
        self.kernels = kernels(self.sizes, self.device) if kernels else None
        self.slices: list[GradientSlice] = []
        if scratch is not None:
            starts = range(0, self.total, scratch.numel())
            self.slices = [self._slice(start, min(start + starts.step, self.total), scratch) for start in starts]

    @property
    def parts(self) -> int:
        """Return the number of parts whose squares ``square`` adds up."""
        return self.kernels.count if self.kernels else len(self.slices)

    def collect(self) -> None:
        """Add the parameters' gradients to the fp32 accumulation buffer and free them."""
        is_first = self._accumulated is None
        if self._accumulated is None:
            self._accumulated = torch.empty(self.total, device=self.device)
        gradients = self._pop_gradients()
        if self.kernels:
            self.kernels.accumulate(gradients, self._accumulated, is_first)
            return
        for part in self.slices:
            buffer = self._accumulated[part.start : part.stop]
            if is_first:
                buffer.copy_(part.gather(gradients))
            else:
                buffer.add_(part.gather(gradients))

    def begin(self, given: Mapping[nn.Parameter, torch.Tensor] | None = None) -> None:
        """Fill ``gradients`` for a step: those ``given``, or the parameters', of which one without counts as zero."""
        if given is not None:
            self.gradients = [given[parameter] for parameter in self.parameters]
            return
        if self.is_summed and self._accumulated is None:
            self._accumulated = torch.zeros(self.total, device=self.device)
        self.gradients = self._pop_gradients() if self._accumulated is None else [self._accumulated]

    def square(self, out: torch.Tensor) -> None:
        """Set ``out``, float32 [parts], to the sum of the squared gradients of each part."""
        if self.kernels:
            self.kernels.squares(self.by_tensor(), out)
            return
        for part, square in zip(self.slices, out.unbind(), strict=True):
            gradient = self.gradient(part)
            torch.dot(gradient, gradient, out=square)

    def by_tensor(self) -> Sequence[torch.Tensor]:
        """Return the gradient of each parameter, contiguous: as backward left it, or its accumulated float32 sums."""
        return self.gradients if self._accumulated is None else self._accumulated.split_with_sizes(self.sizes)

    def gradient(self, part: GradientSlice) -> torch.Tensor:
        """Return the gradient of a slice, float32 [elements]; valid until the next call."""
        if self._accumulated is None:
            return part.gather(self.gradients)
        return self._accumulated[part.start : part.stop]

    def end(self) -> None:
        """Free the gradients after a step."""
        self.gradients, self._accumulated = [], None

    def _pop_gradients(self) -> list[torch.Tensor]:
        """Return the parameters' gradients, zeros for those without one, and set ``p.grad`` to None."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _slice(self, start: int, stop: int, scratch: torch.Tensor) -> GradientSlice:
        """Build the slice [start, stop) of all elements, with its views of the scratch."""
        members = tuple(self._members(start, stop))
        shapes = [
            self.parameters[index].shape if part is None else torch.Size([part.stop - part.start])
            for index, part in members
        ]
        workspace = scratch[: stop - start]
        parts = workspace.split_with_sizes([shape.numel() for shape in shapes])
        upcast = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return GradientSlice(start, stop, members, workspace, upcast)

    def _members(self, start: int, stop: int) -> Iterator[tuple[int, slice | None]]:
        """Yield index and covered range of each tensor that [start, stop) overlaps; None if it covers the whole one."""
        for index in range(bisect_right(self._ends, start), len(self._ends)):
            size = self.sizes[index]
            begin = self._ends[index] - size
            if begin >= stop:
                return
            part = slice(max(start - begin, 0), min(stop - begin, size))
            yield index, None if part == slice(0, size) else part


def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each tensor to its target, in one call; on a GPU that gives 65,536 elements to a block, and one tensor more.

    A tensor alone is copied by itself, which fills a GPU.
    """
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    else:
        torch._foreach_copy_(list(targets), list(sources))


class Clipping:
    """Gradient clipping of one step, and whether the step is taken or skipped.

    Args:
        norm: 2-norm of the whole gradient before clipping, a float32 scalar.
        max_norm: largest norm after clipping; 0 turns clipping off.
    """

    def __init__(self, norm: torch.Tensor, max_norm: float) -> None:
        self.norm = norm
        self._max_norm = max_norm
        self.found_inf = (~norm.isfinite()).float()
        """1 if the norm is NaN or infinite, else 0: a float32 scalar on the device."""
        self.divisor = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm else None
        """Divisor that clips the gradient, a scalar on the device; None if clipping is off."""

    @cached_property
    def factor(self) -> float | None:
        """Return the factor that clips the gradient; None if the norm is not finite. Waits for the device."""
        found_inf, divisor = torch.stack(
            (self.found_inf, self.found_inf if self.divisor is None else self.divisor)
        ).tolist()
        if found_inf:
            return None
        return 1.0 if self.divisor is None else 1 / float(divisor)
