"""Page-locked host memory, which a GPU copies from and to while the host goes on.

A copy from ordinary, pageable memory holds the host up and reaches a sixth of the speed. Page-locking may be refused,
by a limit (``ulimit -l``) or for want of memory: then copies go on from pageable memory, and a warning says so once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from toolkit.runtime.free_memory import RESERVE
from toolkit.runtime.host_memory import available_host_bytes

log = logging.getLogger("frostline")

_ALIGNMENT = 512
"""Bytes at whose multiples tensors begin in a block, as in torch's allocator of GPU memory."""
_LARGEST_BLOCK = 2**33
"""Bytes of the largest block that an arena asks for, unless one tensor needs more."""
_warned = threading.Event()
"""Set once a refusal was logged."""


def allocate(nbytes: int) -> torch.Tensor | None:
    """Return ``nbytes`` uninitialised bytes of page-locked memory; None if it is refused, which is logged once."""
    available = available_host_bytes()
    if nbytes + RESERVE > available:  # locked pages are taken at once: the kernel would kill a process for them
        _warn_once(f"{nbytes / 2**20:,.0f} MiB are too much for the {available / 2**20:,.0f} MiB that are free")
        return None
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _warn_once(" ".join(str(error).split())[:120])
        return None


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Return a page-locked copy of ``tensor``; itself if that is refused, which is logged once."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        _warn_once(" ".join(str(error).split())[:120])
        return tensor


class Arena:
    """Hands out page-locked memory for tensors of ``total`` bytes in all, counted by ``aligned``.

    torch rounds what it locks up to a power of two. So blocks of such sizes are asked for, and many tensors share one.
    """

    def __init__(self, total: int) -> None:
        self._left = total
        self._block = torch.empty(0, dtype=torch.uint8)
        self._is_refused = False

    def take(self, nbytes: int) -> torch.Tensor | None:
        """Return ``nbytes`` uninitialised bytes; None if page-locked memory was refused, now or before."""
        size = aligned(nbytes)
        if len(self._block) < size and not self._is_refused:
            most = min(max(self._left, 1), _LARGEST_BLOCK)
            block = allocate(max(1 << (most.bit_length() - 1), 1 << (size - 1).bit_length()))
            self._is_refused = block is None
            self._block = self._block if block is None else block
        if self._is_refused:
            return None
        taken, self._block = self._block[:nbytes], self._block[size:]
        self._left -= size
        return taken


def aligned(nbytes: int) -> int:
    """Return ``nbytes`` rounded up to where the next tensor may begin."""
    return -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Arriving:
    """A tensor on the device whose content a side stream copies, and the event after which it is there."""

    tensor: torch.Tensor
    event: torch.cuda.Event

    def wait(self) -> torch.Tensor:
        """Return the tensor for use on the current stream, which waits for the copy; the host does not."""
        stream = torch.cuda.current_stream(self.tensor.device)
        stream.wait_event(self.event)
        self.tensor.record_stream(stream)  # its memory is not reused before this stream is done with it
        return self.tensor


class StagedCopies:
    """Copies to a GPU through a fixed number of page-locked buffers, on a stream of its own; for one thread.

    A buffer is filled again only once the copy out of it is done. It grows to the largest copy, in powers of two.
    """

    def __init__(self, device: torch.device, buffers: int = 2) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._count = buffers
        self.free()

    def free(self) -> None:
        """Free the buffers; no copy out of them may be under way. The next copies make new ones."""
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * self._count
        self._copied: list[torch.cuda.Event | None] = [None] * self._count
        self._turn = 0

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[torch.Tensor], object]) -> Arriving:
        """Start to copy a new tensor to the device, whose content ``fill`` writes into the host tensor it is given."""
        with torch.cuda.stream(self.stream):
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        return Arriving(tensor, self.into(tensor, fill))

    def into(self, target: torch.Tensor, fill: Callable[[torch.Tensor], object]) -> torch.cuda.Event:
        """Start to copy into a contiguous ``target`` on the device; return the event after which it is there."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        if len(self._buffers[turn]) < target.nbytes:
            size = 1 << (target.nbytes - 1).bit_length()
            buffer = allocate(size)
            self._buffers[turn] = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer
        host = self._buffers[turn][: target.nbytes].view(target.dtype).view(target.shape)
        fill(host)
        with torch.cuda.stream(self.stream):
            target.copy_(host, non_blocking=True)
        event: torch.cuda.Event = self.stream.record_event()
        self._copied[turn] = event
        return event


def staged_copies(device: torch.device) -> StagedCopies | None:
    """Return the way of copies to ``device``; None if that is the host, where nothing is copied."""
    return StagedCopies(device) if device.type == "cuda" else None


def _warn_once(reason: str) -> None:
    """Log the first refusal of this process; later ones have the same consequence."""
    if not _warned.is_set():
        _warned.set()
        log.warning(
            "no page-locked memory (%s): copies between host and GPU go on from pageable memory, which is slower; free "
            "host memory or raise ulimit -l",
            reason,
        )
