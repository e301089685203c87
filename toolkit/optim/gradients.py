"""Gradients from backward to the update: added up in float32 where that is asked for, and handed on in slices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn


@dataclass(frozen=True)
class GradientSlice:
    """A slice of tensors that lie one after another, which is updated at once. All lists hold views."""

    start: int
    stop: int
    """In elements of all tensors together."""
    members: tuple[tuple[int, slice | None], ...]
    """Index of each tensor, and the slice of its elements; None is all of them."""
    scratch: torch.Tensor
    """Float32 [stop - start]."""
    upcast: list[torch.Tensor]
    """``scratch`` by members, in the shapes of their gradients."""

    def gather(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copy the members' gradients to ``scratch`` in float32, and return it."""
        torch._foreach_copy_(self.upcast, self.cut(gradients))
        return self.scratch

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what of ``tensors``, one for each of all tensors, lies in this slice."""
        return [tensors[i] if part is None else tensors[i].view(-1)[part] for i, part in self.members]


class Gradients:
    """Gradients of tensors of one parameter group that are all float32 or all low-precision.

    Args:
        group: index of the parameter group.
        parameters: contiguous, on one device.
        scratch: float32, of at least ``piece`` elements or as many as all parameters have.
        piece: elements updated at once.
        accumulates: a step has more than one backward pass.
        ranks: processes over which gradients are summed.
    """

    def __init__(
        self,
        group: int,
        parameters: Sequence[nn.Parameter],
        scratch: torch.Tensor,
        piece: int,
        accumulates: bool,
        ranks: int,
    ) -> None:
        self.group, self.parameters = group, list(parameters)
        self.is_low = parameters[0].dtype != torch.float32
        """The parameters are not their own masters."""
        self.is_summed = ranks > 1 or (accumulates and self.is_low)
        """Gradients are added up in a buffer of their own; autograd does it in place where they are float32 already."""
        self.gradients: list[torch.Tensor] = []
        """From ``begin`` to ``end``: the parameters' gradients, or the one buffer of their sums."""
        self._sums: torch.Tensor | None = None
        self._ends = list(accumulate(p.numel() for p in parameters))
        self.total, self.device = self._ends[-1], parameters[0].device
        self.slices = [
            self._slice(start, min(start + piece, self.total), scratch) for start in range(0, self.total, piece)
        ]

    def collect(self) -> None:
        """Add the parameters' gradients to the sums and free them."""
        first = self._sums is None
        if self._sums is None:
            self._sums = torch.empty(self.total, device=self.device)
        gradients = self._take()
        for part in self.slices:
            own = self._sums[part.start : part.stop]
            if first:
                own.copy_(part.gather(gradients))
            else:
                own.add_(part.gather(gradients))

    def begin(self) -> None:
        """Make ``gradients`` ready; a tensor that no gradient reached counts as zero."""
        if self.is_summed and self._sums is None:
            self._sums = torch.zeros(self.total, device=self.device)
        self.gradients = self._take() if self._sums is None else [self._sums]

    def gradient(self, part: GradientSlice) -> torch.Tensor:
        """Return the gradient of a slice in float32, [elements]; the next slice may overwrite it."""
        if self._sums is None:
            return part.gather(self.gradients)
        return self._sums[part.start : part.stop]

    def end(self) -> None:
        """Free the gradients."""
        self.gradients, self._sums = [], None

    def _take(self) -> list[torch.Tensor]:
        """Return the parameters' gradients, zeros where there is none, and take them from the parameters."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _slice(self, start: int, stop: int, scratch: torch.Tensor) -> GradientSlice:
        members = tuple(self._members(start, stop))
        own = scratch[: stop - start]
        shapes = []
        for index, inside in members:
            whole = self.parameters[index]
            shapes.append(whole.shape if inside is None else torch.Size([inside.stop - inside.start]))
        parts = own.split_with_sizes([shape.numel() for shape in shapes])
        upcast = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return GradientSlice(start, stop, members, own, upcast)

    def _members(self, start: int, stop: int) -> Iterator[tuple[int, slice | None]]:
        """Yield the tensors that reach into [start, stop), and which elements of each."""
        for index in range(bisect_right(self._ends, start), len(self._ends)):
            size = self.parameters[index].numel()
            begin = self._ends[index] - size
            if begin >= stop:
                return
            inside = slice(max(start - begin, 0), min(stop - begin, size))
            yield index, None if inside == slice(0, size) else inside


class Clipping:
    """The divisor of one step's gradient, and whether the step is to be taken at all.

    Args:
        norm: 2-norm of the whole gradient, a float32 scalar.
        max_norm: what it is clipped to; 0 does not clip.
    """

    def __init__(self, norm: torch.Tensor, max_norm: float) -> None:
        self.norm = norm
        self._max_norm = max_norm
        self.found_inf = (~norm.isfinite()).float()
        """1 where the norm is NaN or infinite, else 0: a scalar on the device."""
        self.divisor = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm else None
        """Divisor of the gradient, a scalar on the device; None does not divide."""

    @cached_property
    def factor(self) -> float | None:
        """Return what the gradient is multiplied by; None where the norm is not finite. Waits for the device."""
        found_inf, divisor = torch.stack(
            (self.found_inf, self.found_inf if self.divisor is None else self.divisor)
        ).tolist()
        if found_inf:
            return None
        return 1.0 if self.divisor is None else 1 / float(divisor)
