"""The read-ahead thread: order, bound, end."""

from __future__ import annotations

import threading

from toolkit.runtime.background_loader import BackgroundLoader


def test_keys_are_fetched_in_the_order_of_their_use() -> None:
    fetched: list[str] = []
    ahead = BackgroundLoader(fetched.append)
    ahead.ask("abc")
    ahead.ask("de")
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
    ahead.ask("a")
    started.wait()  # a is under way, none waits
    ahead.ask("bcdefg")
    gate.set()
    ahead.wait()
    ahead.stop()
    assert fetched == list("abcd")


def test_stopping_forgets_what_waits() -> None:
    gate, started, fetched = threading.Event(), threading.Event(), []

    def fetch(key: str) -> None:
        started.set()
        gate.wait()
        fetched.append(key)

    ahead = BackgroundLoader(fetch)
    ahead.ask("abc")
    started.wait()
    stopper = threading.Thread(target=ahead.stop)
    stopper.start()
    with ahead._changed:
        ahead._changed.wait_for(lambda: ahead._closed)
    gate.set()
    stopper.join()
    assert fetched == ["a"]
    ahead.ask("d")
    ahead.wait()
    assert fetched == ["a"]


def test_nothing_asked_starts_no_thread() -> None:
    ahead = BackgroundLoader(lambda key: None)
    ahead.ask([])
    assert ahead._thread is None
    ahead.stop()
