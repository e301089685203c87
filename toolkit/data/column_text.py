"""Read the value of one column of a row as text: what rows are drawn, grouped and divided by."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from toolkit.runtime.errors import DataError
from toolkit.tasks.columns import match
from toolkit.tasks.sample import RowFaultError


def column_text(values: Any, path: str) -> str | None:
    """Return as text what is at ``path`` of a row (``look_up``); None if there is nothing.

    Values that read the same are the same text: without blanks around them, in composed form (NFC), and 1.0 is 1, also
    as text: a table with gaps has whole numbers as floats.
    """
    value = look_up(values, path)
    if value is None or value != value:  # the latter is NaN
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str):
        return json.dumps(value, sort_keys=True, default=str)
    value = unicodedata.normalize("NFC", value).strip()
    return (value[:-2] if re.fullmatch(r"-?\d+\.0", value) else value) or None


def label_of(values: Mapping[str, Any], path: str) -> str | None:
    """Return the label of a row, ``column_text`` of ``data.oversample``.

    Raises:
        DataError: the row has no such column, or no plain value in it.
    """
    value = look_up(values, path)
    if value is None and _name(values, path) is None:
        raise DataError(
            f"data.oversample is {path!r}, but a row has no such column; it has {', '.join(map(str, values))[:300]}"
        )
    if isinstance(value, (list, dict)):
        raise DataError(f"data.oversample is {path!r}, but a row has a {type(value).__name__} there; expected a label")
    return column_text(values, path)


def look_up(values: Any, path: str) -> Any:
    """Return what is at ``path`` (``meta.patient``) in nested mappings, by names as ``match`` finds them, or None."""
    if not isinstance(values, Mapping):
        return None
    if (name := _name(values, path)) is not None:
        return values[name]
    first, _, rest = path.partition(".")
    return look_up(look_up(values, first), rest) if rest else None


def _name(values: Mapping[str, Any], wanted: str) -> str | None:
    """Return the column that is meant; None if there is none, or it is not clear which."""
    if wanted in values:
        return wanted
    with suppress(RowFaultError):
        return match([key for key in values if isinstance(key, str)], wanted)
    return None
