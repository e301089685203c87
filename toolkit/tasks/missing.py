"""Values that say that there is none: null, NaN, and the words that programs write for them into tables."""

from __future__ import annotations

import math
from typing import Any

_NEVER_TEXT = frozenset(
    {
        *("nan", "<na>", "\\n"),
        *("#n/a", "#ref!", "#name?", "#value!", "#div/0!", "#null!", "#num!", "#spill!", "#calc!", "#field!"),
    }
)
"""Words, in lower case, that are no text in any file: of pandas, of SQL (a backslash and N), of spreadsheets."""
_FIELD_WORDS = _NEVER_TEXT | {"none", "null"}
"""Words, in lower case, that stand for an empty field; 'None' may be an answer."""
_R_WORD = "NA"
"""What R writes for an empty field, in capitals; in a file that has real nulls it may be an answer."""
_LONGEST_CELL = 64
"""Characters from which the cell of a table is taken for text, whatever it holds between blanks."""


class MissingWord(str):
    """A word of a table, such as CSV, that may stand for an empty field; it is a text all the same."""

    __slots__ = ()


def is_missing(value: Any) -> bool:
    """Return whether a field is empty: null, or the NaN that tables have in place of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_never_text(text: str) -> bool:
    """Return whether a text is a word for a missing value that is no text in any file."""
    return text.strip().lower() in _NEVER_TEXT


def is_field_word(text: str) -> bool:
    """Return whether a text is a word that stands for an empty field."""
    text = text.strip()
    return text == _R_WORD or text.lower() in _FIELD_WORDS


def is_word_of_r(value: Any) -> bool:
    """Return whether a value is R's word for an empty field, out of a table."""
    return isinstance(value, MissingWord) and value.strip() == _R_WORD


def with_marked_word(cell: Any) -> Any:
    """Return the cell of a table, marked as a ``MissingWord`` if it may stand for an empty field."""
    is_short = isinstance(cell, str) and len(cell) < _LONGEST_CELL
    return MissingWord(cell) if is_short and is_field_word(cell) else cell
