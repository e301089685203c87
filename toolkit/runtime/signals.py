"""Record SIGTERM and SIGUSR1 from the start, to stop where all ranks can stop together.

The handler only records a signal. The run checks for it at points that every rank reaches, so that all stop after the
same step. A watcher thread runs beside the main one, which may wait in a collective for long: it forwards the signal to
the other ranks, exits if they never connect, and treats the death of the launcher as a signal, because a rank without
a launcher would go on unnoticed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from select import select
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that request a stop."""

STOPPED = 75
"""Exit code of a run that a signal stopped (EX_TEMPFAIL: start it again to go on)."""

_POLL_SECONDS = 0.5
"""How often the watcher checks that the launcher is alive."""

_CONNECT_GRACE_SECONDS = 5.0
"""After a signal, how long a rank waits for the others to connect. A launcher that ends the job because a rank failed
at import sends the same signal, and kills half a minute later."""


class StopRequested(Exception):
    """Ends a run that was asked to stop; every rank raises it at the same point."""


@dataclass
class _State:
    """Hold the signals received; process-wide, because a signal handler receives only the signal's number.

    ``World.any_stop_requested`` combines it over all ranks.
    """

    is_recording: bool = False
    reason: str | None = None
    """Why the run is to stop, as a phrase for the log; None if it is not."""
    requested_at: float = 0.0
    is_sigterm: bool = False
    """Whether SIGTERM was among the signals."""
    ranks_are_connected: bool = False
    """True also for a single rank."""
    relay: Callable[[str], None] | None = None
    """Function that sends the reason to the other ranks."""


_state = _State()


@contextmanager
def record_signals(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Record SIGTERM and SIGUSR1 in the body instead of dying from them; nested use does nothing."""
    global _state
    if _state.is_recording:
        yield
        return
    _state = _State(is_recording=True, ranks_are_connected=_world_size(environ) == 1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    former_handlers = {number: signal.signal(number, _handle_signal) for number in SIGNALS}
    former_wakeup_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch_for_stop, args=(reading, environ), name="frostline-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former_wakeup_fd)
        for number, handler in former_handlers.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")  # ends the watcher
        watcher.join()
        os.close(reading)
        os.close(writing)
        _state.is_recording = False


def stop_requested() -> bool:
    """Return True if this rank, or one that told it so, was asked to stop; ranks may differ for a moment."""
    return _state.reason is not None


def stop_reason() -> str:
    """Return why the run stops, as a phrase for the log."""
    return _state.reason or "a signal to another rank"


def request_stop(why: str, broadcast: bool = True) -> None:
    """Request a stop of this rank as a signal does, and of the others if ``broadcast``."""
    if _state.reason is None:
        _state.reason, _state.requested_at = why, time.monotonic()
    if broadcast and _state.relay is not None:
        _state.relay(why)


def mark_ranks_connected(relay: Callable[[str], None] | None = None) -> None:
    """Record that all ranks are connected, so that this one stops together with them.

    Args:
        relay: function that sends a reason to stop to the other ranks; called in the watcher thread.
    """
    _state.ranks_are_connected, _state.relay = True, relay
    if relay is not None and _state.reason is not None:
        relay(_state.reason)


def _handle_signal(number: int, frame: FrameType | None = None) -> None:
    """Record a signal and do nothing else, because the handler interrupts arbitrary code of the main thread."""
    request_stop(signal.Signals(number).name, broadcast=False)
    _state.is_sigterm |= number == signal.SIGTERM


def _watch_for_stop(reading: int, environ: Mapping[str, str]) -> None:
    """Forward signals and watch the launchers; the body of the watcher thread.

    Args:
        reading: pipe to which Python writes the number of each signal at once (``signal.set_wakeup_fd``), and
            ``record_signals`` a zero at its end.
        environ: environment, which names the launcher.
    """
    launchers = _launchers(environ)
    while True:
        ready, _, _ = select([reading], [], [], _POLL_SECONDS)
        received = os.read(reading, 64) if ready else b""
        for number in received:
            if number in SIGNALS:  # Python calls the handler only once a collective of the main thread returns
                _handle_signal(number)
                request_stop(signal.Signals(number).name)
        if 0 in received:
            return
        if launchers and _launchers(environ) != launchers:
            launchers = ()
            request_stop("the launcher has ended")
        is_overdue = time.monotonic() > _state.requested_at + _CONNECT_GRACE_SECONDS
        if _state.reason and not _state.ranks_are_connected and is_overdue:
            print(f"stopped by {_state.reason} before all ranks were there", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM if _state.is_sigterm else STOPPED)


def _world_size(environ: Mapping[str, str]) -> int:
    """Return the world size of the environment, 1 if it is invalid; ``toolkit.runtime.distributed`` reports that."""
    text = environ.get("WORLD_SIZE") or environ.get("SLURM_STEP_NUM_TASKS") or "1"
    return int(text) if text.isdigit() else 1


def _launchers(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Return the pids of the launcher processes that this rank must not outlive; they change once one has ended.

    torchrun and accelerate are the parent. deepspeed has a launcher process on each node as the parent, whose own
    parent is the command or the shell that ssh started. Any other parent may end before the run, such as the shell of
    a run that was started with nohup.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in environ:
        return (parent,)
    if "CROSS_RANK" not in environ:
        return ()
    try:
        return (parent, psutil.Process(parent).ppid())
    except psutil.Error:
        return (parent, 0)
