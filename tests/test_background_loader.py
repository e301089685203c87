"""The background loader: order, bound, end."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

import pytest

from toolkit.runtime import background_loader
from toolkit.runtime.background_loader import BackgroundLoader


class BlockedLoads:
    """A load function that waits for ``gate``, and a note of what it loaded."""

    def __init__(self) -> None:
        self.gate, self.started = threading.Event(), threading.Event()
        self.loaded: list[str] = []

    def __call__(self, key: str) -> None:
        self.started.set()
        self.gate.wait()
        self.loaded.append(key)


@pytest.fixture
def loads() -> BlockedLoads:
    return BlockedLoads()


def test_keys_are_loaded_in_the_order_of_their_use(loads: BlockedLoads) -> None:
    loads.gate.set()
    loader = BackgroundLoader(loads)
    loader.request("abc")
    loader.request("de")
    loader.wait()
    loader.stop()
    assert loads.loaded == list("abcde")


def test_no_more_keys_wait_than_the_bound(loads: BlockedLoads) -> None:
    loader = BackgroundLoader(loads, bound=3)
    loader.request("a")
    loads.started.wait()  # a is under way, none waits
    loader.request("bcdefg")
    loads.gate.set()
    loader.wait()
    loader.stop()
    assert loads.loaded == list("abcd")


def test_stopping_forgets_what_waits(loads: BlockedLoads, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = BackgroundLoader(loads)
    loader.request("abc")
    loads.started.wait()
    shutdown = loader._executor.shutdown

    def shut_down(cancel_futures: bool) -> None:
        shutdown(wait=False, cancel_futures=cancel_futures)
        loads.gate.set()
        shutdown()

    monkeypatch.setattr(loader._executor, "shutdown", shut_down)
    loader.stop()
    assert loads.loaded == ["a"]
    loader.request("d")
    loader.wait()
    assert loads.loaded == ["a"]


def test_an_empty_request_starts_no_thread(loads: BlockedLoads) -> None:
    before = threading.enumerate()
    loader = BackgroundLoader(loads)
    loader.request([])
    assert set(threading.enumerate()) <= set(before)
    loader.stop()


def test_waiting_covers_the_key_under_way(loads: BlockedLoads, monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for: list[int] = []

    def count_and_wait(futures: list[Future[None]]) -> None:
        waited_for.append(len(futures))
        loads.gate.set()
        wait(futures)

    monkeypatch.setattr(background_loader, "wait", count_and_wait)
    loader = BackgroundLoader(loads)
    loader.request("a")
    loads.started.wait()
    loader.request([])
    loader.wait()
    loads.gate.set()
    loader.stop()
    assert waited_for == [1]
