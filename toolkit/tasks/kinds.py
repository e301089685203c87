"""Find a column's value in a row, and read it as its kind says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.tasks.column_spec import ColumnSpec
from toolkit.tasks.columns import MISSING, check_inside, find, match
from toolkit.tasks.leaks import require_none_inside
from toolkit.tasks.missing import MissingWord, is_missing
from toolkit.tasks.row_values import RowValues, unprinted
from toolkit.tasks.sample import RowFaultError


def first_value(values: Mapping[str, Any], column: ColumnSpec) -> tuple[str, Any]:
    """Return the first path of a column that a row has, and its value; the first of all and MISSING if it has none."""
    found = ((path, find(values, path)) for path in column.path)
    return next((one for one in found if one[1] is not MISSING), (column.path[0], MISSING))


def is_empty(value: Any) -> bool:
    """Return whether a row has nothing in a column: no such column, null, or empty text."""
    return value is MISSING or value == "" or is_missing(value)


def is_left_out(column: ColumnSpec, value: Any) -> bool:
    """Return whether a column's default takes the place of what a row has there.

    A word for an empty field is no value of a column that may be missing; an answer that is one of several may be one.
    """
    is_blank = column.kind == "text" and isinstance(value, str) and not value.strip()
    is_word = column.kind != "choice" and isinstance(value, MissingWord)
    return value is MISSING or (column.may_be_missing and (is_blank or is_word or is_missing(value)))


def check_found(
    values: Mapping[str, Any], column: ColumnSpec, path: str, value: Any, leaks: Sequence[str] = ()
) -> None:
    """Check what ``first_value`` found before it is read.

    Raises:
        RowFaultError: a path of texts leads to nothing within what the row has there; or the value is an object that
            holds one of ``leaks``.
    """
    if value is MISSING and column.kind == "texts":
        check_inside(values, column.path)
    elif value is not MISSING and column.kind != "texts":  # which take one list out of an object
        require_none_inside(value, leaks, shown_path(values, path))


def shown_path(values: Mapping[str, Any], path: str) -> str:
    """Return a path with the first name as the row has it."""
    first = path.partition(".")[0].removesuffix("[]").strip()
    own = match([str(key) for key in values], first) if "," not in path else None
    return path if own is None else own + path.strip()[len(first) :]


def read_kind(column: ColumnSpec, value: Any, shown: str, name: str, reader: RowValues) -> Any:
    """Return a value as the column's kind says; ``shown`` is its name in the row, ``name`` in the task.

    Raises:
        RowFaultError: it is not of this kind.
    """
    if column.kind == "text":
        return reader.text(value, shown)
    if column.kind == "texts":
        return list(reader.texts(value, shown, name))
    if column.kind == "options":
        return list(reader.options(value, shown))
    if column.kind == "pairs":
        pairs = unprinted(value, shown)
        if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise RowFaultError(f"has no pairs in {shown}; expected a list of [question, answer]")
        return [(reader.text(question, shown), reader.text(answer, shown)) for question, answer in pairs]
    if column.kind == "raw":
        reader.text(value, shown)  # for its faults; blanks around it stay
    return reader.clean(value, shown) if isinstance(value, str) else value


def empty_value(column: ColumnSpec) -> Any:
    """Return what a column without a default is where a row lacks it."""
    return [] if column.kind in ("texts", "pairs", "options", "messages") else ""
