"""The read-ahead thread: order, bound, end."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

import pytest

from toolkit.runtime import background_loader
from toolkit.runtime.background_loader import BackgroundLoader


def test_keys_are_fetched_in_the_order_of_their_use() -> None:
    fetched: list[str] = []
    ahead = BackgroundLoader(fetched.append)
    ahead.request("abc")
    ahead.request("de")
    ahead.wait()
    ahead.stop()
    assert fetched == list("abcde")


def test_no_more_keys_wait_than_the_bound() -> None:
    gate, fetched = threading.Event(), []
    started = threading.Event()

    def fetch(key: str) -> None:
        started.set()
        gate.wait()
        fetched.append(key)

    ahead = BackgroundLoader(fetch, bound=3)
    ahead.request("a")
    started.wait()  # a is under way, none waits
    ahead.request("bcdefg")
    gate.set()
    ahead.wait()
    ahead.stop()
    assert fetched == list("abcd")


def test_stopping_forgets_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started, fetched = threading.Event(), threading.Event(), []

    def fetch(key: str) -> None:
        started.set()
        gate.wait()
        fetched.append(key)

    ahead = BackgroundLoader(fetch)
    ahead.request("abc")
    started.wait()
    shutdown = ahead._executor.shutdown

    def shut_down(cancel_futures: bool) -> None:
        shutdown(wait=False, cancel_futures=cancel_futures)
        gate.set()
        shutdown()

    monkeypatch.setattr(ahead._executor, "shutdown", shut_down)
    ahead.stop()
    assert fetched == ["a"]
    ahead.request("d")
    ahead.wait()
    assert fetched == ["a"]


def test_nothing_asked_starts_no_thread() -> None:
    before = threading.enumerate()
    ahead = BackgroundLoader(lambda key: None)
    ahead.request([])
    assert set(threading.enumerate()) <= set(before)
    ahead.stop()


def test_waiting_covers_the_key_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started, waited_for = threading.Event(), threading.Event(), []

    def fetch(key: str) -> None:
        started.set()
        gate.wait()

    def count_and_wait(futures: list[Future[None]]) -> None:
        waited_for.append(len(futures))
        gate.set()
        wait(futures)

    monkeypatch.setattr(background_loader, "wait", count_and_wait)
    ahead = BackgroundLoader(fetch)
    ahead.request("a")
    started.wait()
    ahead.request([])
    ahead.wait()
    gate.set()
    ahead.stop()
    assert waited_for == [1]
