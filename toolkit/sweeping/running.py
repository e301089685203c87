"""Run the trials of a sweep one after the other, each in a process of its own, and stop with what is kept."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.config.schema import RunConfig
from toolkit.runtime import signals
from toolkit.runtime.errors import ConfigError, UsageError
from toolkit.runtime.shipped import launch_script
from toolkit.runtime.signals import STOPPED
from toolkit.sweeping.inputs import require_same_inputs
from toolkit.sweeping.results import higher_is_better, outcomes
from toolkit.sweeping.trials import Sweep, Trial, prepare_run

log = logging.getLogger("frostline")

_POLL_SECONDS = 0.2

Start = Callable[[Trial], int]
"""Runs a trial, whose directory holds its recipe, to its end; returns its exit code."""


def run_trials(sweep: Sweep, start: Start) -> bool:
    """Run the trials that are not finished, that of the lowest frost line first; return False if a signal stopped it.

    A trial that fails is said, and the others go on. Started again, a sweep tries it again.
    """
    waiting = [trial for trial in sweep.in_running_order if not trial.is_done]
    if finished := len(sweep.trials) - len(waiting):
        log.info("sweep: %d of %d trials are finished already", finished, len(sweep.trials))
    return _run(sweep, waiting, start)


def run_search(sweep: Sweep, base: RunConfig, start: Start, score: Callable[[], bool]) -> bool:
    """Run trials that ``sweep.search`` chooses, one by one, until there are as many as it asks for.

    Return False if a signal stopped it. What a trial gave chooses the next, so ``score`` is called after each, and
    returns False for a signal, too. A failed one counts as a trial.
    """
    search = sweep.search
    assert search is not None
    while score():
        refused = [one["settings"] for one in sweep.refused if search.takes(one["settings"])]
        if len(sweep.trials) + len(refused) >= search.count:
            return True
        tried = [*outcomes(sweep), *((settings, None) for settings in refused)]
        settings = search.next_settings(tried, higher_is_better(sweep), base.train.seed)
        if settings is None:
            log.info("sweep: all settings that the search can find are tried, in %d trials", len(sweep.trials))
            return True
        try:
            trial = sweep.add(settings, base, "search")
        except ConfigError as error:
            log.warning("sweep: the search chose settings that do not go together: %s", "; ".join(error.faults))
            sweep.refused.append({"settings": settings, "faults": error.faults})
            sweep.save()
            continue
        if not _run(sweep, [trial], start):
            return False
    return False


def _run(sweep: Sweep, waiting: Sequence[Trial], start: Start) -> bool:
    """Run trials in turn; return False if a signal stopped them."""
    for at, trial in enumerate(waiting, start=1):
        if signals.stop_requested():
            return False
        line = "" if trial.boundary is None else f", frost line at block {trial.boundary}"
        log.info("sweep: trial %d (%s%s), %d of %d to run, into %s",
                 trial.number, trial.text, line, at, len(waiting), trial.directory)  # fmt: skip
        prepare_run(trial)
        begin = time.monotonic()
        code = start(trial)
        trial.seconds += time.monotonic() - begin
        trial.code, trial.result = None if code == STOPPED else code, {}
        trial.fault = None if code in (0, STOPPED) else f"failed with exit code {code}"
        sweep.save()
        if code == STOPPED:
            return False
        if trial.is_done:
            require_same_inputs(sweep, trial)
        if trial.fault:
            log.warning("sweep: trial %d %s, as it says above; the others go on", trial.number, trial.fault)
    return not signals.stop_requested()


def in_processes(launcher: Sequence[str], deepspeed: Path | None, runs: int) -> Start:
    """Return what trains a trial in a process of its own.

    Memory is measured by process, and one that runs out of it, or crashes, ends no other trial.

    Args:
        launcher: words before launch/train.py, as ``torchrun --nproc_per_node 2``; none start one process of Python.
        deepspeed: DeepSpeed JSON; None trains with torch alone.
        runs: number of runs that read the same rows, for ``--shared-by``.
    """
    command = [*(launcher or [sys.executable]), *_program(launcher)]
    more = ["--shared-by", str(runs), *(["--ds", str(deepspeed)] if deepspeed else [])]

    def start(trial: Trial) -> int:
        words = [*command, "--config", str(trial.directory / "config.yaml"), *more]
        try:
            process = subprocess.Popen(words)
        except OSError as error:
            raise UsageError(f"{words[0]} cannot be started ({error}); expected a launcher on the PATH") from None
        return _wait(process)

    return start


def _program(launcher: Sequence[str]) -> list[str]:
    """Return how Python or a launcher names the training script, in a checkout and in an installation."""
    script = launch_script("train")
    if script is not None:
        return [str(script)]
    return ["--module" if launcher and Path(launcher[0]).name == "deepspeed" else "-m", "toolkit.commands.train"]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a trial's process, and pass a request to stop on to it once; return its exit code.

    After a request to stop, a process that SIGTERM ended counts as stopped: a launcher ends so.
    """
    is_told = False
    try:
        while True:
            try:
                code = process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if signals.stop_requested() and not is_told:
                    is_told = True
                    process.send_signal(signal.SIGTERM)  # at Ctrl-C it has heard of it already
                continue
            return STOPPED if is_told and code != 0 else code
    finally:
        if process.poll() is None:  # an error here leaves no process behind
            process.terminate()
            process.wait()
