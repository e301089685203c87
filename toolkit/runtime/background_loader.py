"""A background thread that loads what will be needed next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice


class BackgroundLoader:
    """Calls ``load`` for one key after another in a background thread.

    Args:
        load: must not raise.
        bound: keys that may wait; more are not taken.
    """

    def __init__(self, load: Callable[[str], None], bound: int = 1024) -> None:
        self._load, self._bound = load, bound
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="frostline-loader")
        self._pending: list[Future[None]] = []

    def request(self, keys: Iterable[str]) -> None:
        """Queue keys in the order of their use. Those beyond the bound are left to whoever needs them."""
        self._pending = [future for future in self._pending if not future.done()]
        waiting = sum(not future.running() for future in self._pending)
        with suppress(RuntimeError):  # stopped
            for key in islice(keys, self._bound - waiting):
                self._pending.append(self._executor.submit(self._load, key))

    def wait(self) -> None:
        """Return once all that was queued is loaded."""
        wait(self._pending)

    def stop(self) -> None:
        """Drop what is queued and end the thread after the key under way; a second call does nothing."""
        self._executor.shutdown(cancel_futures=True)
