"""Flat float32 buffers for the state of many tensors, and the pieces in which they are updated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class TensorState:
    """What is kept of one trained tensor. Views: writing into them changes the optimizer's state."""

    master: torch.Tensor
    """Float32, in the tensor's shape; the parameter itself where that is float32."""
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    """Updates done: a float32 scalar that all tensors of a parameter group share."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a ``Flat``: whole tensors, and parts of those that lie across its ends. All lists hold views."""

    start: int
    stop: int
    """In elements of the flat buffers."""
    members: tuple[tuple[int, slice | None], ...]
    """Which tensors, and which of a tensor's elements; none is all."""
    scratch: torch.Tensor
    """Float32 [stop - start]."""
    upcast: list[torch.Tensor]
    """``scratch`` by members, in the shapes of their gradients."""
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

    def gather(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The members' gradients in float32, in ``scratch``."""
        own = [gradients[i] if part is None else gradients[i].view(-1)[part] for i, part in self.members]
        torch._foreach_copy_(self.upcast, own)
        return self.scratch

    def write_back(self) -> None:
        """Round the masters into the parameters."""
        if self.rounded:
            torch._foreach_copy_(self.rounded, self.exact)


class Flat:
    """Tensors of one parameter group that are all float32 or all low-precision, one after another."""

    def __init__(
        self,
        group: int,
        parameters: Sequence[nn.Parameter],
        scratch: torch.Tensor,
        piece: int,
        accumulates: bool,
        ranks: int,
    ) -> None:
        """
        Args:
            group: index of the parameter group.
            parameters: contiguous, on one device.
            scratch: float32, of at least ``piece`` elements or as many as all parameters have.
            piece: elements updated at once.
            accumulates: a step has more than one backward pass.
            ranks: processes over which gradients are summed.
        """  # noqa: D205, D212
        self.group, self.parameters = group, list(parameters)
        low = parameters[0].dtype != torch.float32
        self.is_summed = ranks > 1 or (accumulates and low)
        """Gradients are added up in a buffer of their own; autograd does it in place where they are float32 already."""
        self._ends = list(accumulate(p.numel() for p in parameters))
        self.gradients: list[torch.Tensor] = []
        """From ``begin`` to ``end``: the parameters' gradients, or the one buffer of their sums."""
        self._sums: torch.Tensor | None = None
        total, device = self._ends[-1], parameters[0].device
        self._exp_avg, self._exp_avg_sq = (torch.zeros(total, device=device) for _ in range(2))
        self._step = torch.zeros((), device=device)
        self._master = torch.empty(total, device=device) if low else None
        masters: Sequence[torch.Tensor] = self.parameters
        if self._master is not None:
            masters = self._views(self._master)
            torch._foreach_copy_(masters, [p.detach() for p in parameters])
        moments = zip(masters, self._views(self._exp_avg), self._views(self._exp_avg_sq), strict=True)
        self.states = [TensorState(*tensors, self._step) for tensors in moments]
        self.pieces = [self._piece(start, min(start + piece, total), scratch) for start in range(0, total, piece)]

    def collect(self) -> None:
        """Add the parameters' gradients to the sums and free them."""
        first = self._sums is None
        if self._sums is None:
            self._sums = torch.empty_like(self._exp_avg)
        gradients = self._take()
        for piece in self.pieces:
            stretch = self._sums[piece.start : piece.stop]
            if first:
                stretch.copy_(piece.gather(gradients))
            else:
                stretch.add_(piece.gather(gradients))

    def begin(self) -> None:
        """Make ``gradients`` ready; a tensor that no gradient reached counts as zero."""
        if self.is_summed and self._sums is None:
            self._sums = torch.zeros_like(self._exp_avg)
        self.gradients = self._take() if self._sums is None else [self._sums]

    def gradient(self, piece: Piece) -> torch.Tensor:
        """The gradient of a piece in float32, [elements]; may be overwritten by the next piece's."""
        if self._sums is None:
            return piece.gather(self.gradients)
        return self._sums[piece.start : piece.stop]

    def update(self, settings: dict[str, Any], scale: torch.Tensor | None, found_inf: torch.Tensor) -> None:
        """One step of AdamW on the gradient divided by ``scale``; none if ``found_inf`` is 1.

        The kernel is that of torch.optim.AdamW(fused=True), which torch 2.13 offers piece by piece under no public
        name. It also stores the divided gradient, into the scratch or the sums.
        """
        self._step += 1
        beta1, beta2 = settings["betas"]
        for piece in self.pieces:
            gradients = self.gradient(piece).split_with_sizes(piece.lengths)
            torch._fused_adamw_(
                piece.masters, gradients, piece.exp_avgs, piece.exp_avg_sqs, [], piece.steps, lr=settings["lr"],
                beta1=beta1, beta2=beta2, weight_decay=settings["weight_decay"], eps=settings["eps"],
                amsgrad=False, maximize=False, grad_scale=scale, found_inf=found_inf,
            )  # fmt: skip
            piece.write_back()
        self._step -= found_inf

    def end(self) -> None:
        """Free the gradients."""
        self.gradients, self._sums = [], None

    def _take(self) -> list[torch.Tensor]:
        """The parameters' gradients, which they lose; zeros where there is none."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        parts = buffer.split_with_sizes([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _piece(self, start: int, stop: int, scratch: torch.Tensor) -> Piece:
        members = tuple(self._members(start, stop))
        own = scratch[: stop - start]

        def cut(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            whole = [tensors[i].detach() for i, _ in members]
            return [t if part is None else t.view(-1)[part] for t, (_, part) in zip(whole, members, strict=True)]

        exact = cut([state.master for state in self.states])
        lengths = [tensor.numel() for tensor in exact]
        upcast = [part.view(t.shape) for part, t in zip(own.split_with_sizes(lengths), exact, strict=True)]
        moments = self._exp_avg[start:stop], self._exp_avg_sq[start:stop]
        if self._master is None:  # each of these masters lies elsewhere
            masters, rounded = [master.view(-1) for master in exact], []
        else:
            masters, rounded, lengths = [self._master[start:stop]], cut(self.parameters), [stop - start]
        exp_avgs, exp_avg_sqs = (list(moment.split_with_sizes(lengths)) for moment in moments)
        steps = [self._step] * len(lengths)
        return Piece(start, stop, members, own, upcast, lengths, masters, exp_avgs, exp_avg_sqs, steps, rounded, exact)

    def _members(self, start: int, stop: int) -> Iterator[tuple[int, slice | None]]:
        """The tensors that reach into [start, stop), and which part of each."""
        for index in range(bisect_right(self._ends, start), len(self._ends)):
            size = self.parameters[index].numel()
            begin = self._ends[index] - size
            if begin >= stop:
                return
            inside = slice(max(start - begin, 0), min(stop - begin, size))
            yield index, None if inside == slice(0, size) else inside
