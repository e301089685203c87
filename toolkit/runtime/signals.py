"""Note SIGTERM and SIGUSR1 from the first moment on, to stop where all ranks can stop together.

A signal is only noted. The run asks at places that every rank reaches, so that all stop after the same step. A thread
watches beside the main one, which may sit in a collective for long: it passes the signal on to the other ranks, leaves
where no other rank can be waited for, and takes the death of the launcher for a signal: a rank without a launcher
would compute on, unseen.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from select import select
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks for a stop."""

STOPPED = 75
"""Exit code of a run that a signal stopped (EX_TEMPFAIL: start it again to go on)."""

_LOOK_SECONDS = 0.5
"""How often the launcher is looked for."""

_ALONE_SECONDS = 5.0
"""After a signal, how long a rank waits to meet the others. A launcher that ends the job for a rank that failed at
import sends the same signal, and waits half a minute before it kills."""


class StopRequested(Exception):
    """End a run that was asked to stop; every rank raises it at the same place."""


@dataclass
class _State:
    """Hold the signals received: process-wide, for the handler gets nothing but the number of the signal.

    ``World`` asks it, and joins the answers of all ranks.
    """

    listening: bool = False
    reason: str | None = None
    noted_at: float = 0.0
    by_term: bool = False
    """The signal was SIGTERM."""
    met: bool = False
    """The other ranks are there, or there are none."""
    relays: list[Callable[[str], None]] = field(default_factory=list)


_state = _State()


@contextmanager
def listening(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 instead of ending, in the body; entered again inside it does nothing."""
    global _state
    if _state.listening:
        yield
        return
    _state = _State(listening=True, met=_ranks(environ) == 1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, _noted) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    over = threading.Event()
    launchers = _launchers(environ)
    watcher = threading.Thread(target=_watch, args=(reading, launchers, over), name="frostline-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)
        _state.listening = False


def stop_requested() -> bool:
    """Return True if this process was asked to stop or heard that another was; ranks may differ for a moment."""
    return _state.reason is not None


def reason() -> str:
    """Return why it stops, as a phrase for the log."""
    return _state.reason or "a signal to another rank"


def request_stop(why: str, tell: bool = True) -> None:
    """Request a stop as a signal does.

    Args:
        why: as a phrase for the log.
        tell: pass it on to the other ranks.
    """
    if _state.reason is None:
        _state.reason, _state.noted_at = why, time.monotonic()
    for relay in _state.relays if tell else ():
        relay(why)


def ranks_connected(relay: Callable[[str], None] | None = None) -> None:
    """Note that the ranks have found one another.

    Args:
        relay: passes a reason to stop on to the other ranks; called from a thread.
    """
    _state.met = True
    if relay is not None:
        _state.relays.append(relay)
        if _state.reason is not None:
            relay(_state.reason)


def _noted(number: int, frame: FrameType | None) -> None:
    """Handle a signal: only note it, for it interrupts whatever the main thread is at."""
    if _state.reason is None:
        _state.reason, _state.noted_at = signal.Signals(number).name, time.monotonic()
    _state.by_term |= number == signal.SIGTERM


def _watch(reading: int, launchers: tuple[int, ...], over: threading.Event) -> None:
    while not over.is_set():
        ready, _, _ = select([reading], [], [], _LOOK_SECONDS)
        for number in os.read(reading, 64) if ready else b"":
            if number in SIGNALS:  # the handler itself may have to wait until a collective of the main thread is over
                _state.by_term |= number == signal.SIGTERM
                request_stop(signal.Signals(number).name)
        if launchers and _launchers_now(launchers) != launchers:
            launchers = ()
            request_stop("the launcher has ended")
        if _state.reason and not _state.met and time.monotonic() > _state.noted_at + _ALONE_SECONDS:
            _leave_alone()


def _leave_alone() -> None:
    """End the process: nothing is begun, and the other ranks do not come; SIGTERM may mean that they are gone."""
    print(f"stopped by {reason()} before all ranks were there", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM if _state.by_term else STOPPED)


def _ranks(environ: Mapping[str, str]) -> int:
    """Return the size of the world, as far as the environment tells; ``toolkit.runtime.distributed`` checks it."""
    text = environ.get("WORLD_SIZE") or environ.get("SLURM_STEP_NUM_TASKS") or "1"
    return int(text) if text.isdigit() else 1


def _launchers(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Return the processes that this rank must not outlive, from its parent up.

    torchrun and accelerate are the parent. deepspeed has a parent on each node, whose own parent is the command, or the
    shell that ssh began. Any other parent may go: a shell, say, of a run that was started with nohup.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return (os.getppid(),)
    if "CROSS_RANK" in environ:
        return _launchers_now((0, 0))
    return ()


def _launchers_now(known: tuple[int, ...]) -> tuple[int, ...]:
    """Return the processes that now stand where ``known`` stood."""
    parent = os.getppid()
    if len(known) == 1:
        return (parent,)
    try:
        return (parent, psutil.Process(parent).ppid())
    except psutil.Error:
        return (parent, 0)
