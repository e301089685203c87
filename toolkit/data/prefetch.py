"""Prepare the next batches in a background thread while the device computes.

Building a batch, and reading hidden states from the cache, takes the host's time, not the device's. The thread
runs a few items ahead. Order and content are those of the source.
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
_EXHAUSTED: Any = object()
"""What ``next`` returns in the thread once a source has no more items."""


class Prefetcher(ExitStack):
    """Runs sources ahead of their consumers, each in a thread of its own, until the ``with`` block around it is left.

        with Prefetcher() as ahead:
            for batches in ahead(step_batches(...)):

    On leaving, for whatever reason, every thread has ended and every generator is closed. ``ahead`` is the number of
    items to make before they are requested, at least 1.
    """

    def __init__(self, ahead: int = 2) -> None:
        super().__init__()
        self._ahead = ahead

    def __call__(self, source: Iterable[T]) -> Iterator[T]:
        """Iterate over the items of ``source``, made in a thread; an exception of ``source`` is raised in its place."""
        items = iter(source)
        if close := getattr(items, "close", None):
            self.callback(close)
        executor = ThreadPoolExecutor(1, thread_name_prefix="frostline-prefetch")
        self.callback(executor.shutdown, cancel_futures=True)
        pending = deque(executor.submit(next, items, _EXHAUSTED) for _ in range(self._ahead))
        return _consume(executor, items, pending)


def _consume(executor: ThreadPoolExecutor, items: Iterator[T], pending: deque[Future[T]]) -> Iterator[T]:
    """Yield the items in order, and let the thread make one more for each."""
    while (item := pending.popleft().result()) is not _EXHAUSTED:
        pending.append(executor.submit(next, items, _EXHAUSTED))
        yield item
    executor.shutdown()


def on_device(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Yield the micro batches of each step on ``device``; a GPU copies them from page-locked memory without a wait."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: page-locked memory belongs to a GPU's context
    for micro_batches in steps:
        pinned = [batch.pin_memory() for batch in micro_batches] if device.type == "cuda" else micro_batches
        yield [batch.to(device) for batch in pinned]
