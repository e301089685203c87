"""Run a process to its end and know when each line of its files appeared, its memory and its time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    seconds: float
    """Wall-clock time from start to end, imports and loading included."""
    peak_bytes: int
    """Most resident memory it ever had (ru_maxrss)."""
    lines: dict[Path, list[tuple[float, str]]]
    """For each watched file, its lines with the time (``time.perf_counter``) at which each was seen."""


class _Tail:
    """Reads what was appended to a file since the last look, whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self._offset = path, list[tuple[float, str]](), 0

    def look(self) -> None:
        """Append new lines to ``lines`` with the present time."""
        if not self.path.exists() or self.path.stat().st_size == self._offset:
            return
        now = time.perf_counter()
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        if newline:
            self.lines += [(now, line) for line in whole.decode("utf-8", "replace").split("\n")]


def run_process(
    command: Sequence[str], log: Path, watched: Sequence[Path] = (), environment: Mapping[str, str] | None = None
) -> Finished:
    """Run ``command`` with its output in ``log``.

    This process should be small: Linux counts the memory of the parent at the time of the start as a lower bound of
    the child's ``ru_maxrss``.

    Args:
        command: program and arguments.
        log: gets stdout and stderr; it is watched too.
        watched: files whose lines are to be timed, to a hundredth of a second.
        environment: variables beside those of this process.
    """
    tails = [_Tail(log), *map(_Tail, watched)]
    started = time.perf_counter()
    with log.open("wb") as output:
        variables = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            while True:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                for tail in tails:
                    tail.look()
                if ended:
                    break
                time.sleep(_POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    return Finished(process.returncode, seconds, usage.ru_maxrss * 1024, {tail.path: tail.lines for tail in tails})
