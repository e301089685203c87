"""Read ``metrics.jsonl`` as the log that it is: lines that are no rows of a run are kept and counted, and stop nothing.

A power cut leaves NUL bytes, a kill a part of a line, people leave blank lines and notes in whatever encoding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import open_regular

METRICS_FILE = "metrics.jsonl"
"""What a run logs, in its directory."""
_NUMBERS = frozenset({"loss", "learning_rate", "peak_memory_gib", "epoch", "seconds", "trained_parameters"})
"""Keys of a row whose values are read again as numbers."""


@dataclass(frozen=True)
class LogLine:
    """One line of the log."""

    content: bytes
    """As it is in the file, without the line break."""
    row: dict[str, Any] | None
    """What a run wrote; None for a line that is something else."""
    is_whole: bool
    """False for a last line without a line break, which a killed process leaves."""

    @property
    def is_unreadable(self) -> bool:
        """True for a line that is neither a row nor blank."""
        return self.row is None and bool(self.content.strip())


def read_log(path: Path) -> Iterator[LogLine]:
    """Yield the lines of a log; none of a missing one.

    Raises:
        OSError: it cannot be read.
        UsageError: it is no regular file, such as a directory, or a FIFO, which could wait for ever.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        return
    except (IsADirectoryError, ValueError) as error:
        raise UsageError(f"{path} is no log of a run ({error}); expected a regular file: move it away") from None
    *whole, last = content.split(b"\n")
    for line in whole:
        yield LogLine(line, row_of(line), is_whole=True)
    if last:
        yield LogLine(last, row_of(last), is_whole=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, in the order of its lines; raises as ``read_log``."""
    return rows_of(read_log(path))


def rows_of(lines: Iterable[LogLine]) -> list[dict[str, Any]]:
    """Return the rows among lines that are whole."""
    return [line.row for line in lines if line.row is not None and line.is_whole]


def row_of(line: bytes) -> dict[str, Any] | None:
    """Return a row: an object with the number of a step, whose values that are read again are of their kinds."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(_is_readable(name, value) for name, value in row.items()) else None


def number(value: Any) -> float:
    """Return a number of a row, which has null where one is not finite."""
    return math.nan if value is None else float(value)


def _is_readable(name: str, value: Any) -> bool:
    """Return whether a value of a row is a number, where a number belongs there, or null."""
    if name in _NUMBERS or name.startswith("eval_"):
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and _is_small(value))
    return True


def _is_small(value: float) -> bool:
    """Return whether a number fits a float; an integer of 400 digits does not."""
    try:
        float(value)
    except OverflowError:
        return False
    return True
