"""Limit how long a piece of Python code may run, such as a template that loops for ever."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def time_limit(seconds: float, reason: str) -> Iterator[None]:
    """Raise in the body after ``seconds`` of wall-clock time, with a message that begins with ``reason``.

    Works on the main thread of systems with SIGALRM, if nothing else uses that signal; otherwise it sets no limit. A
    single call into C, such as the product of a text and a huge number, is not cut short.

    Raises:
        TimeoutError: the limit passed.
    """
    can_use_alarm = (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    )
    if not can_use_alarm:
        yield
        return

    def raise_timeout(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{reason} ({seconds:g} s)")

    signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
