"""Make what comes next while the device is busy with what is now.

Building a batch, and later reading from a cache, takes the host's time, not the device's. A background thread does it a
few items ahead; the consumer finds them ready. Order and content are those of the source.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

import torch

from toolkit.data.batches import Batch

T = TypeVar("T")


class Prefetcher:
    """Runs sources ahead of their consumers, each in a thread of its own, until the ``with`` block around it is left.

        with Prefetcher() as ahead:
            for batches in ahead(step_batches(...)):

    On leaving, for whatever reason, every thread has ended: no item is made any more.
    """

    def __init__(self, ahead: int = 2) -> None:
        """
        Args:
            ahead: items that are made before they are asked for, at least 1.
        """  # noqa: D205, D212
        self._ahead = ahead
        self._running: list[_Lane[object]] = []

    def __call__(self, source: Iterable[T]) -> Iterator[T]:
        """The items of ``source`` in order; what it raises is raised here, after the items before it."""
        lane: _Lane[T] = _Lane(source, self._ahead)
        self._running = [other for other in self._running if other.is_alive]
        self._running.append(lane)  # type: ignore[arg-type]
        return lane

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self._running:
            lane.stop()
        self._running.clear()


class _Lane(Generic[T]):
    """One source, its thread, and the few items between it and the consumer."""

    def __init__(self, source: Iterable[T], ahead: int) -> None:
        self._source = source
        self._ahead = ahead
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = self._exhausted = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._make, name="frostline-prefetch", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def __iter__(self) -> _Lane[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._exhausted or self._stopped)
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def stop(self) -> None:
        """Wait until the item in the making is done, and drop it with the others."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _make(self) -> None:
        try:
            for item in self._source:
                if not self._hand_over(item):
                    return
        except BaseException as error:  # whatever it is, it is the consumer's
            self._error = error
        finally:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()

    def _hand_over(self, item: T) -> bool:
        """Wait for room and put ``item`` there; false if nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._ahead or self._stopped)
            if self._stopped:
                return False
            self._ready.append(item)
            self._changed.notify_all()
            return True


def on_device(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The micro batches of each step on ``device``; a GPU copies them from page-locked memory, and nobody waits."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: page-locked memory belongs to a GPU's context
    for micro_batches in steps:
        pinned = [batch.pin_memory() for batch in micro_batches] if device.type == "cuda" else micro_batches
        yield [batch.to(device) for batch in pinned]
