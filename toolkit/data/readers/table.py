"""Rows of a table of cells, such as CSV and spreadsheets have: the header, blank rows and columns, rows that differ."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from toolkit.data.readers.row import Row, make_row
from toolkit.data.readers.table_header import MOST_TITLES, header_below_titles
from toolkit.runtime.errors import DataError
from toolkit.tasks.missing import with_marked_word

log = logging.getLogger("frostline")

Cells = Sequence[Any]
"""The cells of one record; a blank one is an empty string."""


class Record(NamedTuple):
    """One line of cells."""

    number: int
    """Position below the first line of the table; rows are named by it."""
    cells: Cells
    line: int | None = None
    """Line of the file in which it ends."""


@dataclass(frozen=True)
class BadCell:
    """A cell whose value is not known."""

    fault: str
    """What it holds, and what to do."""

    def __str__(self) -> str:
        """Return no text: it is no name of a column."""
        return ""


_LOOKED_AT = 50
"""Records at the front that are compared with the header."""
_LONGEST_NAME = 80
"""Longest name of a column in characters; a longer text is a value."""
_SENTENCE = re.compile(r"(?:\S+\s+){3,}\S*[.?!。？！]$")
_PRINTED = re.compile(r"""\s*(?:\[\s*['"\[{\]]|\{\s*['"])""")


@dataclass
class _Header:
    """The names of the columns, and which cells they name."""

    names: list[str]
    """Name of each column, blank for one that has none."""

    def __post_init__(self) -> None:
        counts = Counter(name for name in self.names if name)
        self.repeated = {name for name, count in counts.items() if count > 1}
        self.columns = [(number, name) for number, name in enumerate(self.names) if name]
        self.width = max((number for number, _ in self.columns), default=-1) + 1


def table_rows(label: str, records: Iterator[Record], may_be_short: bool = False) -> Iterator[Row]:
    """Yield a row for each record after the header that is not blank.

    ``records`` are those of the table, the header's first. If they ``may_be_short``, blank cells at their ends are left
    out.

    Raises:
        DataError: the header is missing, or names a column twice with different values.
    """
    filled = (record for record in records if not all(map(is_blank, record.cells)))
    beginning = _below_titles(label, list(itertools.islice(filled, MOST_TITLES)), may_be_short)
    if not beginning:
        return
    first, looked_at = beginning[0], beginning[1:]
    looked_at += itertools.islice(filled, _LOOKED_AT - len(looked_at))
    if bad := next((cell for cell in first.cells if isinstance(cell, BadCell)), None):
        raise DataError(f"{label}: has in its header {bad.fault}")
    header = _Header([str(cell).strip() for cell in first.cells])
    if reason := _why_no_header(first.cells, [record.cells for record in looked_at]):
        raise DataError(
            f"{label}: has no header: its first line {reason}. Put a line with the names of the columns above the rows"
        )
    skipped_unnamed = False
    for record in itertools.chain(looked_at, filled):
        if [str(cell).strip() for cell in record.cells] == header.names:
            log.warning("%s row %d repeats the header, and is left out", label, record.number)
            continue
        if may_be_short:
            blank = [""] * (header.width - len(record.cells))
            record = record._replace(cells=[*record.cells, *blank])
        row = _row(label, record, header)
        if not skipped_unnamed and row.fault is None and (unnamed := _unnamed(header, record.cells)):
            log.info("%s: column %d has no name, and is left out", label, unnamed)
            skipped_unnamed = True
        yield row


def _below_titles(label: str, records: list[Record], may_be_short: bool) -> list[Record]:
    """Return the first records of a table without the titles above its header."""
    cells = [record.cells for record in records]
    titles = header_below_titles(cells) or int(len(cells) > 1 and _is_title(cells[0], cells[1], may_be_short))
    if titles == 1:
        log.info("%s begins with a title, which is left out; the header is the next line", label)
    elif titles:
        log.info("%s begins with %d lines above its header, which are left out", label, titles)
    return records[titles:]


def _row(label: str, record: Record, header: _Header) -> Row:
    """Make the row of one record."""
    number, cells, line = record
    origin = f"{label} row {number}"
    if len(cells) < header.width or any(not is_blank(cell) for cell in cells[len(header.names) :]):
        found = f"it has {len(cells)}" + (f", up to line {line}" if line else "")
        expected = f"the {len(header.columns)} fields of the header line"
        title = ", or take away a title above the header" if len(header.columns) == 1 else ""
        return Row(origin, fault=f"has not {expected} ({found}); check its quotes and separators{title}")
    for at, name in header.columns:
        if isinstance(cells[at], BadCell):
            return Row(origin, fault=f"has in {name} {cells[at].fault}")
    values: dict[str, Any] = {}
    for at, name in header.columns:
        if name in header.repeated and values.setdefault(name, cells[at]) != cells[at]:
            raise DataError(
                f"{label}: the header line names {name} more than once, and the columns differ in row {number}; keep "
                "one column of each name"
            )
        values[name] = with_marked_word(cells[at])
    return make_row(origin, values)


def _unnamed(header: _Header, cells: Cells) -> int:
    """Return the number, from 1, of a column without a name whose cell is filled; 0 if there is none."""
    cells = cells[: len(header.names)]
    return next((at + 1 for at, cell in enumerate(cells) if not header.names[at] and not is_blank(cell)), 0)


def _is_title(first: Cells, second: Cells, may_be_short: bool) -> bool:
    """Return whether the first record is a title over the table: its first cell alone is filled, of several."""
    filled = [not is_blank(cell) for cell in first]
    return (
        (may_be_short or len(filled) > 1)
        and filled[0]
        and sum(filled) == 1
        and sum(not is_blank(cell) for cell in second) > 1
    )


def _why_no_header(first: Cells, rows: Sequence[Cells]) -> str | None:
    """Return what shows that the first record is a row and not the header; None if nothing does.

    A text that looks like a value shows it where the column's other cells do too: the columns of a survey have its
    questions as names. No text of the record is told: rows may be private.
    """
    for at, cell in enumerate(first):
        below = [row[at] for row in rows if at < len(row)]
        reason = _why_no_name(str(cell).strip())
        if reason and 2 * sum(_why_no_name(str(other).strip()) is not None for other in below) >= len(below):
            return reason
    same = [at for at, cell in enumerate(first) if any(at < len(row) and row[at] == cell != "" for row in rows)]
    different = sum(not is_blank(cell) for cell in first) - len(same)
    return "has values that stand in its columns below too" if same and different else None


def _why_no_name(text: str) -> str | None:
    """Return what shows that a text is a value and not the name of a column; None if nothing does."""
    if len(text) > _LONGEST_NAME:
        return f"has a text of {len(text)} characters"
    if "\n" in text:
        return "has a text of several lines"
    if _PRINTED.match(text):
        return "has a list or an object in it"
    return "has a sentence in it" if _SENTENCE.match(text) else None


def is_blank(cell: Any) -> bool:
    """Return whether a cell is empty, or holds blanks alone."""
    return cell is None or (isinstance(cell, str) and not cell.strip())
