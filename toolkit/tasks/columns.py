"""Find the values of a row by their path, and match names of columns as people write them."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from toolkit.tasks.printed_lists import PrintedListError, parse_printed_list
from toolkit.tasks.sample import RowFaultError

MISSING: Any = object()
"""What ``find`` returns for a path that a row lacks."""


_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
"""Marks within a name that show nothing, as spreadsheets and web pages leave them."""


def loose(name: str) -> str:
    """Return a name without case, blanks around and within it, and the plural's s, for comparison.

    It is in composed form (NFC): a Mac writes the same name decomposed. Marks that show nothing are left out.
    """
    name = str(name)
    if not name.isascii():
        name = _UNSEEN.sub("", unicodedata.normalize("NFC", name))
    folded = "_".join(name.casefold().replace("-", "_").split())
    return folded[:-1] if folded.endswith("s") and len(folded) > 1 else folded


def match(names: Iterable[str], wanted: str) -> str | None:
    """Return that one of ``names`` which is ``wanted``: exactly, or loosely (``loose``); None if there is none.

    Raises:
        RowFaultError: several match loosely and none exactly.
    """
    names = list(names)
    if wanted in names:
        return wanted
    found = [name for name in names if loose(name) == loose(wanted)]
    if len(found) > 1:
        raise RowFaultError(
            f"has {' and '.join(map(repr, found))}, which may both be {wanted}; keep one, or name it in data.task"
        )
    return found[0] if found else None


def find(values: Any, path: str) -> Any:
    """Return the value at ``path`` of a row, or ``MISSING``.

    ``context.contexts`` goes into an object, ``choices.0`` into a list; ``passages[].text`` takes the texts of a list's
    objects, and ``A, B, C`` makes a list of those columns that are there.
    """
    if "," in path:
        found = [find(values, part.strip()) for part in path.split(",")]
        present = [value for value in found if value is not MISSING and value is not None]
        return present or MISSING
    part, _, rest = path.partition(".")
    each = part.endswith("[]")
    part = part.removesuffix("[]").strip()
    if isinstance(values, Mapping):
        name = match([str(key) for key in values], part)
        value = MISSING if name is None else values.get(name, MISSING)
    elif isinstance(values, Sequence) and not isinstance(values, str) and part.isdecimal():
        value = values[int(part)] if int(part) < len(values) else MISSING
    else:
        return MISSING
    if value is MISSING or not (rest or each):
        return value
    if isinstance(value, str):  # of a table, whose fields hold lists and objects printed
        with suppress(PrintedListError):
            value = parse_printed_list(value)
    if each:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return MISSING
        found = [find(one, rest) if rest else one for one in value]
        return MISSING if any(one is MISSING for one in found) else found
    return find(value, rest)


def find_each(values: Any, path: str) -> list[tuple[str, Any]]:
    """Return name and value of each column of a list (``A, B, C``); the value is None where a row has none."""
    found = [(part.strip(), find(values, part.strip())) for part in path.split(",")]
    return [(name, None if value is MISSING else value) for name, value in found]


def check_inside(values: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Raise RowFaultError if a row has something where a path begins, and the path leads to nothing in it."""
    for path in paths:
        top = top_names(path)[0]
        inside = find(values, top)
        is_empty = inside is MISSING or inside != inside or not inside  # NaN differs from itself
        if path.strip() == top or is_empty:
            continue
        first = inside[0] if isinstance(inside, list) else inside
        has = (
            f"an object with {', '.join(map(str, first))}"
            if isinstance(first, Mapping)
            else f"a {type(first).__name__}"
        )
        raise RowFaultError(f"has nothing at {path}: {top} has {has}; correct the path in data.task, or the row")


def top_names(path: str) -> list[str]:
    """Return the columns that a path begins in."""
    return [part.strip().partition(".")[0].removesuffix("[]") for part in path.split(",")]


def is_there(columns: Sequence[str], path: str) -> bool:
    """Return whether rows with these columns may have a value at ``path``, judged by its first part.

    Of a list of columns (``A, B, C``) two must be there.
    """
    names = top_names(path)
    found = [name for name in names if any(loose(column) == loose(name) for column in columns)]
    return len(found) >= min(2, len(names))


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate that is spelled most like ``name``; None if none is (by difflib's ratio, ``cutoff``)."""
    by_loose = {loose(candidate): candidate for candidate in candidates}
    wanted = loose(name)
    for key, candidate in by_loose.items():
        if len(wanted) > 3 and len(key) > 3 and (key in wanted or wanted in key):
            return candidate
    close = difflib.get_close_matches(wanted, by_loose, n=1, cutoff=cutoff)
    return by_loose[close[0]] if close else None
