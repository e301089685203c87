"""Copy the weights of one block after the other to a GPU, each while the one before it computes.

Two buffers on the device take turns, each as large as the largest block. A copy into one waits, on the device, for the
block that computed from it last. So a pass holds two blocks, however far the host runs ahead of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from toolkit.runtime.page_locked import StagedCopies


class Streamed(Protocol):
    """Weights that are copied together."""

    @property
    def flat_bytes(self) -> int:
        """Return their bytes, laid out one after the other."""

    @property
    def flat(self) -> torch.Tensor | None:
        """Return them so laid out in page-locked memory; None if they are elsewhere."""

    def write_flat(self, out: torch.Tensor) -> None:
        """Write them so laid out into host memory."""


@dataclass(eq=False)
class _Buffer:
    """One of the two buffers, and the event after which nobody reads it; None if that is not recorded yet."""

    memory: torch.Tensor
    released: torch.cuda.Event | None = None


@dataclass(eq=False)
class _Coming:
    """Weights on their way into a buffer."""

    weights: Streamed
    buffer: _Buffer
    event: Future[torch.cuda.Event]
    """Becomes the event after which the weights are there."""


class BlockStream:
    """Streams blocks to ``device``; ``most_bytes`` returns the ``flat_bytes`` of the largest, asked once a pass.

    Page-locked weights are copied at once, others by a thread through page-locked buffers.
    """

    def __init__(self, device: torch.device, most_bytes: Callable[[], int]) -> None:
        self._device, self._most_bytes = device, most_bytes
        self._copies = StagedCopies(device)
        self._executor = ThreadPoolExecutor(1, "frostline-weights", lambda: torch.cuda.set_device(device))
        self._buffers: list[_Buffer] = []
        self._coming: _Coming | None = None
        self._in_use: _Buffer | None = None

    def start(self, weights: Streamed) -> None:
        """Start to copy ``weights`` into the buffer that does not compute; nothing if they are on their way."""
        if self._coming is not None:
            if self._coming.weights is weights:
                return
            self._coming.event.result()  # of a pass that an error ended: copies into a buffer keep their order
        if not self._buffers:
            size = self._most_bytes()
            self._buffers = [_Buffer(torch.empty(size, dtype=torch.uint8, device=self._device), None) for _ in range(2)]
        buffer = self._buffers[self._buffers[0] is self._in_use]
        # without an event of its own the buffer is new, or a pass ended by an error: wait for all that was issued
        free = buffer.released or torch.cuda.current_stream(self._device).record_event()
        buffer.released = None
        event: Future[torch.cuda.Event]
        if weights.flat is not None:
            event = Future()
            event.set_result(self._copy_locked(weights.flat, buffer, free))
        else:
            event = self._executor.submit(self._copy_staged, weights, buffer, free)
        self._coming = _Coming(weights, buffer, event)

    def take(self, weights: Streamed) -> torch.Tensor:
        """Return the weights' bytes on the device, for use on the current stream until ``release``."""
        self.start(weights)
        assert self._coming is not None
        coming, self._coming = self._coming, None
        torch.cuda.current_stream(self._device).wait_event(coming.event.result())
        self._in_use = coming.buffer
        return coming.buffer.memory[: weights.flat_bytes]

    def release(self) -> None:
        """End the use of what was taken last: its buffer is filled again once what was issued so far is done."""
        if self._in_use is not None:
            self._in_use.released = torch.cuda.current_stream(self._device).record_event()

    def end(self) -> None:
        """Free the buffers at the end of a pass, or after one that an error ended.

        The current stream has waited for all copies that were taken, so what comes on it next may use their memory.
        """
        if self._coming is not None:
            self._coming.buffer.memory.record_stream(self._copies.stream)
        self._buffers, self._coming, self._in_use = [], None, None

    def free_staging(self) -> None:
        """Free the page-locked buffers between two passes: blocks were moved, and may need others or none."""
        self._copies.stream.synchronize()
        self._copies.free()

    def _copy_locked(self, flat: torch.Tensor, buffer: _Buffer, free: torch.cuda.Event) -> torch.cuda.Event:
        """Start a copy from page-locked memory; return its event."""
        stream = self._copies.stream
        stream.wait_event(free)
        with torch.cuda.stream(stream):
            buffer.memory[: len(flat)].copy_(flat, non_blocking=True)
        event: torch.cuda.Event = stream.record_event()
        return event

    def _copy_staged(self, weights: Streamed, buffer: _Buffer, free: torch.cuda.Event) -> torch.cuda.Event:
        """Read the weights into a page-locked buffer and start the copy; return its event."""
        self._copies.stream.wait_event(free)
        return self._copies.into(buffer.memory[: weights.flat_bytes], weights.write_flat)


def block_stream(device: torch.device, most_bytes: Callable[[], int]) -> BlockStream | None:
    """Return the stream of blocks to ``device``; None if that is the host, where the weights are."""
    return BlockStream(device, most_bytes) if device.type == "cuda" else None
