"""Ends code that runs too long, such as a template that loops for ever."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def time_limit(seconds: float, reason: str) -> Iterator[None]:
    """End the body after ``seconds`` of wall-clock time, wherever Python code of it runs by then.

    Works on the main thread of systems with SIGALRM, and not while something else uses that signal; else it does
    nothing. A single call into C, such as the product of a text and a huge number, is not cut short.

    Args:
        seconds: the limit.
        reason: of the error.

    Raises:
        TimeoutError: the limit passed.
    """
    free = (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    )
    if not free:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{reason} ({seconds:g} s)")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
