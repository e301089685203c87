"""A row as it was read, with what makes it unusable whatever its columns mean."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.runtime.errors import DataError
from toolkit.runtime.printable import one_line

ID_COLUMNS = ("pubid", "pmid", "id")
"""Columns, in lower case, that may hold the number by which a list of ids names a row."""


@dataclass(frozen=True)
class Row:
    """One row of a file or Hub data set, not checked yet."""

    origin: str
    """File and row, for messages: ``answers.jsonl line 12``."""
    values: Any = None
    fault: str | None = None
    """Why the row could not be read; None if it could."""

    def __post_init__(self) -> None:
        """Escape control characters in what is shown of the row: its file and key are a stranger's."""
        object.__setattr__(self, "origin", one_line(self.origin))
        if self.fault is not None:
            object.__setattr__(self, "fault", one_line(self.fault))


@dataclass(frozen=True)
class ReadOptions:
    """Says what form files have, as far as the recipe tells; None leaves it to be detected."""

    encoding: str | None = None
    """Name of the text encoding, as Python's codecs have it."""
    separator: str | None = None
    """The character between the fields of a line."""
    sheet: str | None = None
    """Name of the sheet of a workbook."""

    @classmethod
    def of(cls, encoding: str | None, separator: str | None, sheet: str | None) -> ReadOptions:
        """Make the options of a command line, where a tab is written ``tab``.

        Raises:
            DataError: the separator is more than one character.
        """
        separator = "\t" if separator in ("tab", r"\t") else separator
        if separator is not None and len(separator) != 1:
            raise DataError(f"the separator is {separator!r}; expected one character, or tab")
        return cls(encoding, separator, sheet)


ENCODING_ADVICE = "save the file as UTF-8, or name its encoding in data.encoding"

_TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
"""What functions, and calls of them, are called in a row and in its messages."""

_NUL = "\0"
_REPEATED = "\0repeated"
"""Key by which ``without_repeats`` marks an object; no JSON that is read has it, as a NUL makes a row bad."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNDECODED = re.compile("[\udc80-\udcff]")
"""What ``errors="surrogateescape"`` makes of bytes that are not text."""


def make_row(origin: str, values: Any) -> Row:
    """Make a row of these values, or one with a fault: text that is no text, or nested too deeply."""
    try:
        text = json.dumps(values, ensure_ascii=False, skipkeys=True, default=str)
    except RecursionError:
        return Row(origin, fault="is nested too deeply; expected columns that hold text or lists of texts")
    if half := _SURROGATE.search(text):
        return Row(
            origin,
            fault=f"holds half of a character, the lone surrogate U+{ord(half[0]):04X}{_column_with(half[0], values)}, "
            "as text does that was cut inside an emoji; correct it",
        )
    if "\\u0000" in text and (name := _repeated(values)) is not None:
        return Row(origin, fault=f"names {name[:60]!r} twice, with different values; keep one of them")
    if "\\u0000" in text and _holds(_NUL, values):
        return Row(origin, fault=f"holds a NUL character{_column_with(_NUL, values)}, which no text has; remove it")
    return Row(origin, values)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object, marked for ``make_row`` if two of one name differ; an ``object_pairs_hook``.

    Python's own parser keeps the last of them without a word.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        differing = [name for name, value in pairs if value != values[name] and value == value]
        values |= {_REPEATED: differing[0]} if differing else {}
    return values


def has_repeats(values: Mapping[str, Any]) -> bool:
    """Return whether ``without_repeats`` marked this object."""
    return _REPEATED in values


def has_undecoded_bytes(text: str) -> bool:
    """Return whether a text that was decoded with ``surrogateescape`` holds bytes that could not be."""
    return not text.isascii() and _UNDECODED.search(text) is not None


def undecoded_row(origin: str, encoding: str) -> Row:
    """Return the row whose bytes are not text in the encoding of the file."""
    name = "UTF-8" if encoding.startswith("utf-8") else encoding
    return Row(origin, fault=f"is not {name} text; {ENCODING_ADVICE}")


def plain_value(value: Any) -> Any:
    """Return a value of a typed column as JSON has it: a date as ISO text, text that was stored as bytes as text."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return value.date().isoformat()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, (decimal.Decimal, datetime.timedelta)) else value


def without_filled(value: Any, is_within: bool = False) -> Any:
    """Return values of a typed table without the null keys in tools and their calls.

    Such a table has one set of keys for the objects of a column: each call has the arguments of all functions, and
    null in those that are not its own.
    """
    if isinstance(value, Mapping):
        return {
            key: without_filled(item, is_within or key in _TOOL_KEYS)
            for key, item in value.items()
            if item is not None or not is_within
        }
    return [without_filled(item, is_within) for item in value] if isinstance(value, list) else value


def _column_with(character: str, values: Any) -> str:
    """Return " in COLUMN" for the first column whose text holds ``character``; nothing if no column does."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if not _holds(character, name) and _holds(character, value):
                return f" in {name}"
    return ""


def _repeated(values: Any) -> str | None:
    """Return the first name that an object within ``values`` has twice, as ``without_repeats`` marked it."""
    if isinstance(values, Mapping):
        if _REPEATED in values:
            return str(values[_REPEATED])
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return None
    return next((name for name in map(_repeated, values) if name is not None), None)


def _holds(character: str, value: Any) -> bool:
    """Return whether a text within ``value`` holds ``character``."""
    if isinstance(value, str):
        return character in value
    if isinstance(value, Mapping):
        return any(_holds(character, part) for pair in value.items() for part in pair)
    return isinstance(value, (list, tuple)) and any(_holds(character, part) for part in value)
