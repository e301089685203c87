"""A background thread that is told what will be wanted next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

_BOUND = 1024


class BackgroundLoader:
    """Calls ``fetch`` for one key after another; sleeps on a condition while there is none."""

    def __init__(self, fetch: Callable[[str], None], bound: int = _BOUND) -> None:
        """
        Args:
            fetch: called in the thread; must not raise.
            bound: keys that may wait; more are not taken.
        """  # noqa: D205, D212
        self._fetch = fetch
        self._bound = bound
        self._pending: deque[str] = deque()
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self, keys: Iterable[str]) -> None:
        """Queue keys in the order of their use. Those beyond the bound are left to whoever reads them."""
        with self._changed:
            if self._closed:
                return
            for key in keys:
                if len(self._pending) >= self._bound:
                    break
                self._pending.append(key)
            if self._pending and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="activation read-ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Return once nothing is queued or under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending and not self._busy)

    def stop(self) -> None:
        """Forget what is queued and end the thread after the key under way; a second call does nothing."""
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    return
                key = self._pending.popleft()
                self._busy = True
            try:
                self._fetch(key)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
