"""Streams of a GPU that is not there: copies on a side stream happen as late as their events allow, and are counted."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from toolkit.activation_cache import read_ahead
from toolkit.frozen import weight_offload
from toolkit.frozen.block_stream import BlockStream
from toolkit.runtime import page_locked


class FakeEvent:
    """All work that a stream had when the event was recorded."""

    def __init__(self, gpu: FakeGpu, stream: FakeStream) -> None:
        self.gpu, self.stream, self.position = gpu, stream, stream.issued

    def synchronize(self) -> None:
        """The host waits."""
        self.gpu.counts["host waits"] += 1
        self.stream.run_until(self.position)


class FakeStream:
    """Work in order; that of the main stream, which computes, is done at once."""

    def __init__(self, gpu: FakeGpu, name: str = "side") -> None:
        self.gpu, self.name = gpu, name
        self.issued = 0
        self.waiting: list[tuple[int, Callable[[], object]]] = []
        self.seen: list[FakeEvent] = []

    def issue(self, work: Callable[[], object]) -> None:
        self.issued += 1
        self.waiting.append((self.issued, work))

    def run_until(self, position: int) -> None:
        with self.gpu.lock:
            while self.waiting and self.waiting[0][0] <= position:
                self.waiting.pop(0)[1]()

    def record_event(self, *_: Any) -> FakeEvent:
        return FakeEvent(self.gpu, self)

    def wait_event(self, event: FakeEvent) -> None:
        self.seen.append(event)
        self.gpu.counts[f"{self.name} waits"] += 1
        if self.name == "main":  # it computes now, so what it waits for is done now
            event.stream.run_until(event.position)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class FakeGpu:
    """Counts waits, page-locked buffers and recorded streams; ``current`` is the stream of a thread."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.pinned: list[int] = []
        self.refuses = False
        self.lock = threading.RLock()
        self.main = FakeStream(self, "main")
        self.local = threading.local()

    @property
    def current(self) -> FakeStream:
        return getattr(self.local, "stream", self.main)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.local.stream = self.current, stream
        try:
            yield
        finally:
            self.local.stream = before

    def allocate(self, nbytes: int) -> torch.Tensor | None:
        if self.refuses:
            page_locked._warn_once("a test refuses")
            return None
        self.pinned.append(nbytes)
        return torch.full((nbytes,), 0xAB, dtype=torch.uint8)


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Make torch believe in a GPU whose memory is the host's and whose streams are fake."""
    fake, copy = FakeGpu(), torch.Tensor.copy_

    def copy_late(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        stream = fake.current
        if stream is fake.main or not non_blocking:
            return copy(self, source)
        fake.counts["copies"] += 1
        stream.issue(lambda: copy(self, source))
        return self

    def record(self: torch.Tensor, stream: FakeStream) -> None:
        fake.counts["recorded"] += 1

    monkeypatch.setattr(torch.Tensor, "copy_", copy_late)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: FakeStream(fake))
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: fake.current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    monkeypatch.setattr(page_locked, "allocate", fake.allocate)
    monkeypatch.setattr(weight_offload, "block_stream", BlockStream)
    monkeypatch.setattr(read_ahead, "staged_copies", page_locked.StagedCopies)
    page_locked._warned.clear()
    return fake
