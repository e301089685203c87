"""Gradients that are summed over ranks in buckets while backward runs, as DistributedDataParallel does it.

Li et al., arXiv 2006.15704. That class itself would hand the sums back in the precision of the parameters: float32 sums
of bfloat16 gradients would be rounded before the update reads them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from toolkit.optim.gradients import copy_each
from toolkit.runtime.errors import ModelError

BUCKET_BYTES = 25 * 2**20
"""Most bytes of a bucket of several tensors; DistributedDataParallel has the same."""


class GradientBuckets:
    """Accumulates gradients over the passes of a step, and sums them over all ranks during the last one.

    A bucket is taken as soon as backward has reached all of its parameters: its gradients are freed, added to those of
    the passes before in float32, and in the last pass summed by an all-reduce that nobody waits for until ``wait``.
    Backward reaches the last parameters first, and so do the buckets. Every rank takes all buckets in this order, those
    that a pass did not reach at its end: ranks may differ in how many passes they have, and in what these reach.

    Args:
        parameters: trainable parameters in the model's order, all on one device.
        dtype: precision in which ranks exchange and sum gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buckets = [_Bucket(own) for own in _divide(parameters, BUCKET_BYTES // dtype.itemsize)]
        self._is_open = self._is_last = False
        self._next = 0
        """Number of buckets that the current pass has taken."""
        this = weakref.ref(self)  # parameters do not keep this object in memory
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_reach, this, index))  # type: ignore[no-untyped-call]
            for index, bucket in enumerate(self._buckets)
            for parameter in bucket.parameters
        ]

    @property
    def text(self) -> str:
        """Say for the log how gradients are summed."""
        return (
            f"gradients: summed over ranks in {str(self.dtype).removeprefix('torch.')}, in {len(self._buckets)} "
            "all-reduce(s) a step that begin while backward runs"
        )

    @contextmanager
    def collecting(self, is_last: bool) -> Iterator[None]:
        """Collect the gradients of the backward pass in the body; sum them over ranks if it ``is_last`` of its step.

        Raises:
            ModelError: the pass gave a tensor another gradient after its bucket had been taken.
        """
        self._is_last, self._next = is_last, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
        self._take(all_left=True)

    def wait(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return the summed gradient of each parameter, in its shape, and forget them; a GPU's host does not wait."""
        summed: dict[nn.Parameter, torch.Tensor] = {}
        for bucket in self._buckets:
            summed |= bucket.wait()
        return summed

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def reach(self, index: int) -> None:
        """Note that a parameter of a bucket has its whole gradient of this pass; take the buckets that are complete.

        Autograd calls it for each parameter when all places that use it have added to the gradient.
        """
        if not self._is_open:
            return
        bucket = self._buckets[index]
        bucket.missing -= 1
        if bucket.missing < 0:
            raise ModelError(
                "this model's backward pass gave a tensor another gradient after its sum over ranks had begun, as "
                "reentrant checkpointing within the model does; expected one for each tensor and pass. Turn that off, "
                "or train on one rank"
            )
        self._take()

    @torch.no_grad()
    def _take(self, all_left: bool = False) -> None:
        """Take buckets in their order, up to the first that misses gradients; with ``all_left`` every one."""
        while self._next < len(self._buckets) and (all_left or not self._buckets[self._next].missing):
            self._buckets[self._next].take(self.dtype, self._is_last)
            self._next += 1


class _Bucket:
    """Parameters whose gradients are summed by one all-reduce."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = 0
        """Parameters that the current backward pass has not reached."""
        self._sums: torch.Tensor | None = None
        """Flat gradients: float32 sums of the passes so far, then the sums over ranks; None before the first pass."""
        self._work: dist.Work | None = None

    def take(self, dtype: torch.dtype, is_last: bool) -> None:
        """Add the gradients of a pass to those before it and free them; after the last pass begin to sum over ranks."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if self._sums is None:
            self._sums = self._flatten(gradients, dtype if is_last else torch.float32)
        else:
            torch._foreach_add_(self._views(self._sums), gradients)
        del gradients
        if is_last:
            self._sums = self._sums.to(dtype)
            self._work = dist.all_reduce(self._sums, async_op=True)

    def wait(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return the gradient of each parameter when it is summed, and forget it."""
        assert self._work is not None, "no backward pass was the last of this step"
        assert self._sums is not None
        self._work.wait()
        summed = dict(zip(self.parameters, self._views(self._sums), strict=True))
        self._sums = self._work = None
        return summed

    def _flatten(self, gradients: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return gradients as one vector of ``dtype``; a single one that is contiguous and has it stays where it is."""
        if len(gradients) == 1 and gradients[0].dtype == dtype and gradients[0].is_contiguous():
            return gradients[0].view(-1)
        flat = torch.empty(sum(g.numel() for g in gradients), dtype=dtype, device=gradients[0].device)
        copy_each(self._views(flat), gradients)
        return flat

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the part of each parameter in a flat vector, in the parameter's shape."""
        parts = flat.split_with_sizes([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]


def _divide(parameters: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters of each bucket, from the last to the first: a single one, or up to ``most`` elements."""
    own: list[nn.Parameter] = []
    elements = 0
    for parameter in reversed(parameters):
        if own and elements + parameter.numel() > most:
            yield own
            own, elements = [], 0
        own.append(parameter)
        elements += parameter.numel()
    yield own


def _reach(this: weakref.ref[GradientBuckets], index: int, _: torch.Tensor) -> None:
    """Call ``reach`` of buckets that are still there, as the hook of a parameter."""
    if (buckets := this()) is not None:
        buckets.reach(index)
