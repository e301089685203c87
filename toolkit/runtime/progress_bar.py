"""How far a piece of work is: a bar on a terminal, and lines where the log goes into a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NoReturn, TypeVar

from tqdm import tqdm

log = logging.getLogger("frostline")

_TENTHS = 10
_SILENT_SECONDS, _BRIEF_SILENT_SECONDS, _LONGEST_SILENCE = 60.0, 10.0, 600.0
"""A log is silent so long at first, for work that takes long and for work that mostly takes a moment; then for a tenth
of the time that has passed, up to the last."""

Item = TypeVar("Item")


class ProgressBar:
    """Shows how much of a piece of work is done, on the rank whose log shows information; a context manager.

    On a terminal this is a bar. Elsewhere it is a line with each tenth of the work, and others where that takes long.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        done: int = 0,
        brief: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            what: the work, in a word or two.
            total: how many units there are.
            unit: one of them, in the singular.
            done: how many were done before.
            brief: it mostly takes a moment: there is no line but after 10 s of silence, and no bar in the first second.
            clock: seconds that have passed.
        """  # noqa: D205, D212
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._brief, self._clock = brief, clock
        self._began = self._said = clock()
        shown = total > done and log.isEnabledFor(logging.INFO)
        self._bar: tqdm[NoReturn] | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, file=sys.stderr,
                leave=None, delay=1.0 if brief else 0.0,
            )  # fmt: skip
        self._writes_lines = shown and self._bar is None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The work is over."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, by: int = 1, **values: str) -> None:
        """So much more is done.

        Args:
            by: units; what goes beyond the total does not count.
            **values: what is shown beside it, by name.
        """
        before, self._done = self._done, min(self._done + by, self._total)
        if self._bar is not None:
            if values:
                self._bar.set_postfix(values, refresh=False)
            self._bar.update(self._done - before)
        elif self._writes_lines and self._is_due(before):
            self._said = self._clock()
            log.info("%s", ", ".join([self._line(), *(f"{name} {value}" for name, value in values.items())]))

    def _is_due(self, before: int) -> bool:
        now = self._clock()
        at_first = _BRIEF_SILENT_SECONDS if self._brief else _SILENT_SECONDS
        is_long = now - self._said >= min(max(at_first, (now - self._began) / _TENTHS), _LONGEST_SILENCE)
        if self._brief:
            return is_long and self._done < self._total
        return is_long or self._done * _TENTHS // self._total > before * _TENTHS // self._total

    def _line(self) -> str:
        line = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}s"
        if self._done < self._total:
            a_unit = (self._clock() - self._began) / (self._done - self._first)
            line += f", about {_duration(a_unit * (self._total - self._done))} left"
        return line


def track(items: Sequence[Item], what: str, unit: str) -> Iterator[Item]:
    """``items`` as they are, with a brief progress bar meanwhile."""
    with ProgressBar(what, len(items), unit, brief=True) as bar:
        for item in items:
            yield item
            bar.advance()


class LogHandler(logging.Handler):
    """Writes the log above the bars of a terminal, not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; one that cannot be written is reported as by every other handler."""
        try:
            tqdm.write(f"{self.format(record)}\n", file=sys.stderr, end="")  # at once: ranks share the stream
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
