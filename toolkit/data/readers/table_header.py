"""Tell the line that names the columns of a table from prose and titles, and find tables that were printed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any

from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import SHIPPED, load_task
from toolkit.tasks.columns import loose, top_names

_LOOKED_AT = 20
"""Records that are looked at."""
MOST_TITLES = 6
"""Records among which the header is looked for."""
_SEPARATORS = ",;|\t^~¦§¬"
"""Characters that separate fields in files, detected or not."""
_RULE = re.compile(
    r"[ \t]*(?:[|+][ \t]*:?[-=]+:?[ \t]*(?:[|+][ \t]*:?[-=]+:?[ \t]*)*[|+]"
    r"|:?-{3,}:?(?:[ \t]*[|+][ \t]*:?-{3,}:?)+)[ \t]*"
)
"""The line of dashes below the header of a printed table, or above it: ``|---|:-:|``, ``---+---``, ``+---+``."""


def check_not_printed(label: str, head: str) -> None:
    """Raise DataError if a file begins with a table as Markdown, psql or MySQL print it, with a rule of dashes."""
    lines = islice((line for line in head.splitlines() if line.strip()), 2)
    if any(_RULE.fullmatch(line) for line in lines):
        raise DataError(
            f"{label}: is a table printed to be looked at, with a rule of dashes and padded cells, as Markdown and "
            "database shells print it; save the rows as CSV or JSON lines"
        )


def is_table(head: str, separator: str) -> bool:
    """Return whether a text begins with a header that names known columns, and goes on with records of its width."""
    records = first_records(head, separator)
    records = records[header_below_titles(records) :]
    alike = [len(record) == len(records[0]) for record in records[1:]]
    return bool(records) and names_columns(records[0]) and 2 * sum(alike) >= len(alike)


def header_below_titles(records: Sequence[Sequence[Any]]) -> int:
    """Return how many of the first records are titles above one that names known columns; 0 if none does.

    Titles have fewer filled cells than the header.
    """
    for at, record in enumerate(records[:MOST_TITLES]):
        if names_columns(record):
            return at if all(_filled(title) < _filled(record) for title in records[:at]) else 0
    return 0


def _filled(cells: Sequence[Any]) -> int:
    return sum(bool(str(cell).strip()) for cell in cells)


def check_separated(label: str, head: str, separator: str) -> None:
    """Raise DataError if a header came out as one column, and another character than ``separator`` divides it.

    That is one that divides it into names of known columns, or a usual separator that each of the first records has as
    often.
    """
    records = first_records(head, separator)
    if not records or len(records[0]) > 1 or header_below_titles(records):
        return
    texts = [separator.join(record) for record in records]
    for mark in dict.fromkeys(mark for mark in texts[0] if not (mark.isalnum() or mark in " _-'\"")):
        is_usual = mark in _SEPARATORS or not mark.isprintable()
        is_alike = len(texts) > 1 and all(text.count(mark) == texts[0].count(mark) for text in texts)
        if names_columns(texts[0].split(mark)) or (is_usual and is_alike):
            remedy = "take away the quotes around whole lines" if head[:1] == '"' else "set data.separator to it"
            raise DataError(
                f"{label}: has one column by the separator {separator!r}, and {mark!r} within its header; if that "
                f"separates the fields, {remedy}"
            )


def first_records(head: str, separator: str) -> list[list[str]]:
    """Return the first records of a text that are not blank; none if its quotes are no CSV."""
    try:
        reader = csv.reader(io.StringIO(head, newline=""), delimiter=separator)
        return [record for record in islice(reader, _LOOKED_AT) if any(cell.strip() for cell in record)]
    except csv.Error:
        return []


def names_columns(cells: Sequence[Any]) -> bool:
    """Return whether cells are names of columns, two or more of them known to the tasks, and none a sentence."""
    names = [loose(str(cell)) for cell in cells if str(cell).strip()]
    return len(names) == len(set(names)) and len(_known_names().intersection(names)) > 1


@cache
def _known_names() -> frozenset[str]:
    """Return the names of columns that the tasks that come with Frostline read, but for letters of options."""
    columns = [column for name in SHIPPED for column in load_task(name).spec.columns.values()]
    names = {loose(top) for column in columns for path in column.path for top in top_names(path)}
    return frozenset({*(name for name in names if len(name) > 1), "chosen", "rejected"})
