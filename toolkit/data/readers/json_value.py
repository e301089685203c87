"""Rows of one JSON value that is no list: a row, rows by key, a list of rows beside other things, or columns."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.data.identifiers import IdentifierFinder
from toolkit.data.readers.row import Row, has_repeats, make_row
from toolkit.data.readers.text import HEAD_BYTES
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import fitting_task

log = logging.getLogger("frostline")

_WRAPPERS = ("data", "rows", "records", "examples", "items", "samples", "train")
"""Keys under which a list of rows stands beside others, such as a version."""
_ABOUT = frozenset({
    "version", "name", "title", "description", "license", "licence", "source", "url", "homepage", "citation",
    "author", "authors", "date", "created", "created_at", "updated", "updated_at", "split", "subset", "config",
    "configuration", "language", "lang", "type", "task", "format", "schema", "status", "next", "previous",
    "dataset",
})  # fmt: skip
"""Keys of texts about a list of rows that stands beside them."""
_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
"""Columns that hold a list of turns, which is no list of rows."""
_TURN_KEYS = frozenset({"role", "content", "from", "value", "name", "weight", "train", "tool_calls", "tool_call_id"})
"""Keys of the turns of a conversation, which is a column of a row and no list of rows."""
_TURN_PAIRS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""Keys that make an object a turn, whatever else it has."""
_FINDER = IdentifierFinder()
LIST_FORMS = 'expected a list of rows or an object of rows by key, as df.to_json(path, orient="records") writes'


def rows_of_value(label: str, value: Any, where: str) -> Iterator[Row]:
    """Yield the rows of one JSON value that is no list of them: a row, a wrapper, or columns as pandas writes them."""
    if not isinstance(value, dict):
        raise DataError(f"{label}: holds one {type(value).__name__}; {LIST_FORMS}")
    if not value:
        return
    if has_repeats(value):  # one of two lists of rows, or columns, is lost
        yield make_row(f"{label} {where}", value)
    elif _are_rows(list(value.values())):  # the first is longer than what was looked at
        for number, (key, row) in enumerate(value.items(), start=1):
            yield make_row(f"{label} {place_of_entry(key, number)}", row)
    elif (wrapper := _wrapper(label, value)) is not None:
        log.info("%s holds its rows under the key %s", label, short_key(wrapper))
        for number, row in enumerate(value[wrapper], start=1):
            yield make_row(f"{label} row {number}", row)
    elif (columns := _columns(label, value)) is not None:
        log.info("%s holds columns, as pandas writes them; they are read as rows", label)
        names = list(columns)
        for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
            yield make_row(f"{label} row {number}", dict(zip(names, cells, strict=True)))
    else:
        yield make_row(f"{label} {where}", value)


def _wrapper(label: str, value: Mapping[str, Any], is_line: bool = False) -> str | None:
    """Return the key under which an object has its list of rows; None if it has none, or is a row itself.

    Raises:
        DataError: it has several such lists; or it may as well be a row, and ``is_line`` does not say that it is one.
    """
    lists = [key for key, part in value.items() if _is_list_of_rows(part)]
    if len(lists) > 1 and len(lists) == len(value):
        raise DataError(
            f"{label}: holds several lists of rows ({', '.join(map(short_key, lists))}); save each as a file of its "
            f"own, such as {short_key(lists[0])}.jsonl"
        )
    if len(lists) != 1 or lists[0].lower() in _CONVERSATIONS:
        return None
    if len(value) == 1:
        return lists[0]
    others = [key for key in value if key != lists[0]]
    if lists[0].lower() not in _WRAPPERS or fitting_task(others) is not None:
        return None
    if texts := [key for key in others if isinstance(value[key], str) and key.lower() not in _ABOUT]:
        if is_line:
            return None
        raise DataError(
            f"{label}: is one object that has texts ({', '.join(map(short_key, texts))}) and a list of objects "
            f"({short_key(lists[0])}): one row, or many? Save a row as [{{…}}], and many as the list alone"
        )
    return lists[0]


def _is_list_of_rows(part: Any) -> bool:
    """Return whether a value is a list of objects that are no turns of a conversation."""
    if not isinstance(part, list) or not part or not all(isinstance(row, dict) for row in part):
        return False
    return not all(len(row) > 1 and _is_turn(row) for row in part)


def _columns(label: str, value: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """Return the cells of each column, if an object has them by column as pandas writes it; None if it has not.

    Raises:
        DataError: the columns have not the same rows.
    """
    parts = list(value.values())
    if set(value) >= {"columns", "data"} and all(isinstance(value[key], list) for key in ("columns", "data")):
        names, rows = [str(name) for name in value["columns"]], value["data"]
        if len(set(names)) == len(names) and all(isinstance(row, list) and len(row) == len(names) for row in rows):
            return {name: [row[number] for row in rows] for number, name in enumerate(names)}
        raise DataError(f"{label}: its rows have not the {len(names)} columns that it names; {LIST_FORMS}")
    if all(isinstance(part, dict) for part in parts):
        if any(part.keys() != parts[0].keys() for part in parts):
            raise DataError(f"{label}: holds columns that have not the same rows; {LIST_FORMS}")
        return {name: list(part.values()) for name, part in value.items()}
    if all(isinstance(part, list) for part in parts) and not any(_is_conversation(*one) for one in value.items()):
        if len({len(part) for part in parts}) == 1:
            return dict(value)
        raise DataError(f"{label}: holds lists of different lengths, so they are no columns; {LIST_FORMS}")
    return None


def _is_conversation(key: str, part: list[Any]) -> bool:
    """Return whether a list holds the turns of a conversation; ``key`` is its name."""
    are_objects = bool(part) and all(isinstance(turn, dict) for turn in part)
    return are_objects and (key.lower() in _CONVERSATIONS or all(map(_is_turn, part)))


def _is_turn(values: Mapping[str, Any]) -> bool:
    """Return whether an object is a turn of a conversation; it may have keys that nobody reads."""
    return values.keys() <= _TURN_KEYS or any(values.keys() >= pair for pair in _TURN_PAIRS)


def is_keyed(head: str) -> bool:
    """Return whether a text that begins with an object is one of rows by key, as PubMedQA is published.

    Its first entries are objects, and their keys are names: pandas writes columns, as objects whose keys are those of
    the rows.
    """
    decoder = json.JSONDecoder()
    at, values = 1, list[Any]()
    try:
        while len(values) < 2 and head[at:].lstrip()[:1] not in ("}", ""):
            at = head.index('"', at)
            _, at = decoder.raw_decode(head, at)
            at = head.index(":", at) + 1
            at += len(head[at:]) - len(head[at:].lstrip())
            value, at = decoder.raw_decode(head, at)
            values.append(value)
            at += len(head[at:]) - len(head[at:].lstrip())
            at += head[at : at + 1] == ","
    except (ValueError, RecursionError):
        return bool(values) and len(head) >= HEAD_BYTES // 4 and isinstance(values[0], dict) and not _by_row(values)
    return _are_rows(values)


def _are_rows(values: list[Any]) -> bool:
    """Return whether the entries of an object are rows, by the first two."""
    return bool(values) and all(isinstance(value, dict) for value in values) and not _by_row(values[:2])


def _by_row(values: list[dict[str, Any]]) -> bool:
    """Return whether objects are columns: their keys are numbered, or each has values of one type, of its own."""
    if all(value and len({re.sub("[0-9]+$", "#", key) for key in value}) == 1 and next(iter(value))[-1:].isdecimal()
           for value in values):  # fmt: skip
        return True
    types = [{type(part) for part in value.values()} for value in values]
    return len(types) == 2 and all(len(kinds) == 1 for kinds in types) and types[0] != types[1]


def has_several_rows(line: str) -> bool:
    """Return whether an object on one line holds rows, by key, in a list or by column, rather than being one."""
    try:
        value = json.loads(line)
        return (
            isinstance(value, dict)
            and bool(value)
            and (is_keyed(line) or _wrapper("", value, is_line=True) is not None or _columns("", value) is not None)
        )
    except (ValueError, RecursionError):
        return False
    except DataError:
        return True


def place_of_entry(key: str, number: int) -> str:
    """Return where a row of an object is: its key, or its number where the key is a personal identifier."""
    return f"entry {number}" if _FINDER.find(key) else f"key {short_key(key)}"


def short_key(key: str) -> str:
    """Return a key for a message, where a text of the rows could stand in its place."""
    key = _FINDER.mask(key)
    return key if len(key) <= 40 and key.isprintable() else f"{key[:40]!r}…"
