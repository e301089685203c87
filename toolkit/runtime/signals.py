"""Record signals that ask a run to stop from its start, to stop where all ranks can stop together.

The handler only records a signal. The run checks for it at points that every rank reaches, so that all stop after the
same step. A watcher thread runs beside the main one, which may wait in a collective for long: it forwards the signal to
the other ranks, exits if they never connect, and treats the death of the launcher as a signal, because a rank without
a launcher would go on unnoticed.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from select import select
from types import FrameType

import psutil

log = logging.getLogger("frostline")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Signals that request a stop: SIGHUP is that of a terminal that was closed, SIGINT that of Ctrl-C. These two stay
ignored if they were when the run began, as by nohup, or in the background of a script."""

STOPPED = 75
"""Exit code of a run that a signal stopped (EX_TEMPFAIL: start it again to go on)."""

_POLL_SECONDS = 0.5
"""How often the watcher checks that the launcher is alive."""

_CONNECT_GRACE_SECONDS = 5.0
"""After a signal, how long a rank waits for the others to connect. A launcher that ends the job because a rank failed
at import sends the same signal, and kills half a minute later."""


_SAME_INTERRUPT_SECONDS = 1.0
"""SIGINT that comes so soon after the first is the same Ctrl-C, which a launcher passes on to ranks that have it."""

_SAY_SECONDS = 10.0
"""Seconds after which a wait is said to be one."""

_LEAVE_SECONDS = 5.0
"""How long a rank that was asked to stop goes on waiting for something else, within ``waiting``."""


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
    report_failure: Callable[[str, int], None] | None = None
    """Function that tells the other ranks why this one exits, and its exit code."""
    interrupted_at: float = 0.0
    """When the first SIGINT came; 0 before."""
    waiting_for: str | None = None
    """What the main thread waits for, within ``waiting``."""


_state = _State()


@contextmanager
def record_signals(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Record ``SIGNALS`` in the body instead of dying from them; nested use does nothing."""
    global _state
    if _state.is_recording:
        yield
        return
    _state = _State(is_recording=True, ranks_are_connected=_world_size(environ) == 1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    former_handlers = {
        number: signal.signal(number, _handle_signal) for number in SIGNALS if not _stays_ignored(number)
    }
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
        _state.is_recording, _state.reason = False, None


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


def mark_ranks_connected(
    relay: Callable[[str], None] | None = None, report_failure: Callable[[str, int], None] | None = None
) -> None:
    """Record that all ranks are connected, so that this one stops together with them.

    Args:
        relay: function that sends a reason to stop to the other ranks; called in the watcher thread.
        report_failure: function that tells them why this rank exits, and its exit code; called there too.
    """
    _state.ranks_are_connected, _state.relay, _state.report_failure = True, relay, report_failure
    if relay is not None and _state.reason is not None:
        relay(_state.reason)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say after 10 s that the body waits for ``what``, which nothing here can hasten, and let a signal end it.

    Within ``record_signals`` a rank that is asked to stop, and still waits 5 s later, exits with ``STOPPED``: use it
    only where no work would be lost.
    """
    timer = threading.Timer(_SAY_SECONDS, log.warning, ("still waiting for %s, since %.0f s", what, _SAY_SECONDS))
    timer.daemon = True
    former, _state.waiting_for = _state.waiting_for, what
    timer.start()
    try:
        yield
    finally:
        _state.waiting_for = former
        timer.cancel()


def _stays_ignored(number: int) -> bool:
    return number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN


def _handle_signal(number: int, frame: FrameType | None = None) -> None:
    """Record a signal and do little else, because the handler interrupts arbitrary code of the main thread."""
    if number == signal.SIGHUP:
        _leave_closed_terminal()
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
            if number == signal.SIGINT:
                _note_interrupt(environ)
        if 0 in received:
            return
        if launchers and _launchers(environ) != launchers:
            launchers = ()
            request_stop("the launcher has ended")
        is_overdue = time.monotonic() > _state.requested_at + _CONNECT_GRACE_SECONDS
        if _state.reason and not _state.ranks_are_connected and is_overdue:
            print(f"stopped by {_state.reason} before all ranks were there", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM if _state.is_sigterm else STOPPED)
        _leave_wait()


def _leave_wait() -> None:
    """Exit if the main thread waits for something else although the run was asked to stop."""
    what = _state.waiting_for
    if not _state.reason or what is None or time.monotonic() < _state.requested_at + _LEAVE_SECONDS:
        return
    last_word = f"stopped by {_state.reason} while waiting for {what}; nothing is lost, start the same command again"
    print(last_word, file=sys.stderr, flush=True)
    if _state.report_failure is not None:
        _state.report_failure(last_word, STOPPED)
    os._exit(STOPPED)


def _note_interrupt(environ: Mapping[str, str]) -> None:
    """Say what the first Ctrl-C does; exit at the second one."""
    now = time.monotonic()
    if not _state.interrupted_at:
        _state.interrupted_at = now
        if environ.get("RANK", "0") == "0":
            print("\ninterrupted: the run stops after this step with a checkpoint; Ctrl-C again leaves at once",
                  file=sys.stderr, flush=True)  # fmt: skip
    elif now > _state.interrupted_at + _SAME_INTERRUPT_SECONDS:
        print("\ninterrupted twice: what was trained since the last checkpoint is lost", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)


def _leave_closed_terminal() -> None:
    """Let output to a terminal that is gone go nowhere: each write would raise an error, and end the run by that."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


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
