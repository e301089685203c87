"""Show progress: a bar on a terminal, and log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import NoReturn, TypeVar

from tqdm import tqdm

log = logging.getLogger("frostline")

_TENTHS = 10
_SILENT_SECONDS, _BRIEF_SILENT_SECONDS, _LONGEST_SILENCE = 60.0, 10.0, 600.0
"""Longest time between two lines at first, for long and for brief work. It grows to a tenth of the elapsed time, at
most the last value."""

Item = TypeVar("Item")


class ProgressBar:
    """Progress of a piece of work, shown on the rank that logs at level INFO; a context manager.

    On a terminal this is a bar. Elsewhere it is a log line at each tenth of the work, and more if a tenth takes long.
    Of ``brief`` work, which mostly takes a moment, a line appears only after 10 s and a bar after 1 s. ``name`` names
    the work in a word or two, ``unit`` one unit in the singular; ``done`` of the ``total`` were done in an earlier run.
    A ``total`` of None is not known: then lines appear by time alone.
    """

    def __init__(self, name: str, total: int | None, unit: str, done: int = 0, brief: bool = False) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done_at_start = self._done = done
        self._brief = brief
        self._started_at = self._logged_at = monotonic()
        shown = (total is None or total > done) and log.isEnabledFor(logging.INFO)
        self._bar: tqdm[NoReturn] | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True, file=sys.stderr,
                leave=None, delay=1.0 if brief else 0.0,
            )  # fmt: skip
        self._writes_lines = shown and self._bar is None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove or finish the bar."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, by: int = 1, **values: str) -> None:
        """Count ``by`` units as done, 0 or more as far as the total; show progress and ``values`` if a line is due."""
        before, self._done = self._done, self._done + by
        if self._total is not None:
            self._done = min(self._done, self._total)
        if self._bar is not None:
            if values:
                self._bar.set_postfix(values, refresh=False)
            self._bar.update(self._done - before)
        elif self._writes_lines and self._is_line_due(before):
            self._logged_at = monotonic()
            log.info("%s", ", ".join([self._progress_text(), *(f"{name} {value}" for name, value in values.items())]))

    def _is_line_due(self, before: int) -> bool:
        """Return True if the log was silent for long, or a tenth of the work was completed since ``before`` units."""
        now = monotonic()
        shortest = _BRIEF_SILENT_SECONDS if self._brief else _SILENT_SECONDS
        is_long = now - self._logged_at >= min(max(shortest, (now - self._started_at) / _TENTHS), _LONGEST_SILENCE)
        if self._total is None:
            return is_long
        if self._brief:
            return is_long and self._done < self._total
        return is_long or self._done * _TENTHS // self._total > before * _TENTHS // self._total

    def _progress_text(self) -> str:
        """Return how much is done, and an estimate of the time left."""
        if self._total is None:
            return f"{self._name}: {self._done:,} {self._unit}s"
        text = f"{self._name}: {self._done:,} of {self._total:,} {self._unit}s"
        if self._done_at_start < self._done < self._total:
            seconds_per_unit = (monotonic() - self._started_at) / (self._done - self._done_at_start)
            text += f", about {duration(seconds_per_unit * (self._total - self._done))} left"
        return text


def track(items: Iterable[Item], name: str, unit: str, total: int) -> Iterator[Item]:
    """Yield ``items``, of which there are ``total``, and show a progress bar for brief work meanwhile."""
    with ProgressBar(name, total, unit, brief=True) as bar:
        for item in items:
            yield item
            bar.advance()


class LogHandler(logging.Handler):
    """Log handler that writes above the progress bars of a terminal instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a failure is reported by ``handleError``, as in other handlers."""
        try:
            # text and newline in one write: ranks share the stream
            tqdm.write(f"{self.format(record)}\n", file=sys.stderr, end="")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def duration(seconds: float) -> str:
    """Format seconds in a readable unit: s, min or h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
