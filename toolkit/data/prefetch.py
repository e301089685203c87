"""Make what comes next while the device is busy with what is now.

Building a batch, and later reading from a cache, takes the host's time, not the device's. A background thread does it a
few items ahead; the consumer finds them ready. Order and content are those of the source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from toolkit.data.batches import Batch

T = TypeVar("T")
_END: Any = object()


class Prefetcher(ExitStack):
    """Runs sources ahead of their consumers, each in a thread of its own, until the ``with`` block around it is left.

        with Prefetcher() as ahead:
            for batches in ahead(step_batches(...)):

    On leaving, for whatever reason, every thread has ended and every generator is closed.

    Args:
        ahead: items that are made before they are asked for, at least 1.
    """

    def __init__(self, ahead: int = 2) -> None:
        super().__init__()
        self._ahead = ahead

    def __call__(self, source: Iterable[T]) -> Iterator[T]:
        """Return the items of ``source`` in order; what it raises is raised here, after the items before it."""
        items = iter(source)
        if close := getattr(items, "close", None):
            self.callback(close)
        executor = ThreadPoolExecutor(1, thread_name_prefix="frostline-prefetch")
        self.callback(executor.shutdown, cancel_futures=True)
        made = deque(executor.submit(next, items, _END) for _ in range(self._ahead))
        return _consume(executor, items, made)


def _consume(executor: ThreadPoolExecutor, items: Iterator[T], made: deque[Future[T]]) -> Iterator[T]:
    while (item := made.popleft().result()) is not _END:
        made.append(executor.submit(next, items, _END))
        yield item
    executor.shutdown()


def on_device(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Yield the micro batches of each step on ``device``; a GPU copies them from page-locked memory without a wait."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: page-locked memory belongs to a GPU's context
    for micro_batches in steps:
        pinned = [batch.pin_memory() for batch in micro_batches] if device.type == "cuda" else micro_batches
        yield [batch.to(device) for batch in pinned]
