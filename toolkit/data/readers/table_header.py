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
    if records and len(records[0]) == 1:
        records = records[1:]  # a title
    alike = [len(record) == len(records[0]) for record in records[1:]]
    return bool(records) and names_columns(records[0]) and 2 * sum(alike) >= len(alike)


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
