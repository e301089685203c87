"""Load items ahead of their use in a background thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice


class BackgroundLoader:
    """Call ``load`` for one key after another in a background thread; it must not raise, as nobody reads its result.

    At most ``bound`` keys wait in the queue.
    """

    def __init__(self, load: Callable[[str], None], bound: int = 1024) -> None:
        self._load, self._bound = load, bound
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="frostline-loader")
        self._pending: list[Future[None]] = []

    def request(self, keys: Iterable[str]) -> None:
        """Queue keys in the order of their use; those beyond the bound are dropped, and their users load them."""
        self._pending = [future for future in self._pending if not future.done()]
        waiting = sum(not future.running() for future in self._pending)
        with suppress(RuntimeError):  # submit() after stop()
            for key in islice(keys, self._bound - waiting):
                self._pending.append(self._executor.submit(self._load, key))

    def wait(self) -> None:
        """Wait until every queued key is loaded."""
        wait(self._pending)

    def stop(self) -> None:
        """Cancel the queued keys and end the thread after the current one; a second call does nothing."""
        self._executor.shutdown(cancel_futures=True)
