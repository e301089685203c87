"""Rows of JSON: a row a line, a list of rows, rows by key, and what pandas and others write; the content decides."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.data.identifiers import IdentifierFinder
from toolkit.data.readers.content import Content
from toolkit.data.readers.json_stream import JsonStream
from toolkit.data.readers.row import (
    ReadOptions,
    Row,
    has_repeats,
    has_undecoded_bytes,
    make_row,
    undecoded_row,
    without_repeats,
)
from toolkit.data.readers.text import HEAD_BYTES, decoded_head, encoding_of, lines_of, open_text, whole_lines
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")

_WRAPPERS = ("data", "rows", "records", "examples", "items", "samples", "train")
"""Keys under which a list of rows stands beside others, such as a version."""
_TURN_KEYS = frozenset({"role", "content", "from", "value", "name", "weight", "train", "tool_calls", "tool_call_id"})
"""Keys of the turns of a conversation, which is a column of a row and no list of rows."""
_TURN_PAIRS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""Keys that make an object a turn, whatever else it has."""
_FINDER = IdentifierFinder()
_LARGEST_VALUE = 2**30
"""Largest JSON file in characters that is one value and not read row by row: a wrapper, or one of columns."""
_LIST_FORMS = 'expected a list of rows or an object of rows by key, as df.to_json(path, orient="records") writes'


def read_json(content: Content, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a JSON file, whether it has a row a line or is one value.

    Raises:
        DataError: it is one value and cannot be parsed, or holds no rows in a known form.
    """
    lines_by_name = content.suffix in (".jsonl", ".ndjson")
    encoding = encoding_of(content, options.encoding, by_line=lines_by_name)
    head = decoded_head(content, encoding).lstrip("\ufeff \t\r\n")
    by_line = has_row_a_line(head, lines_by_name)
    if head and by_line != lines_by_name:
        log.info("%s is read as %s, by its content", content.label, "a row a line" if by_line else "one JSON value")
    if by_line:
        yield from _read_lines(content, encoding)
    else:
        yield from _read_value(content, encoding, head)


def has_row_a_line(head: str, lines_by_name: bool) -> bool:
    """Return whether a text that begins with ``head`` is JSON with a row a line, or one value.

    ``lines_by_name`` decides where the content does not: there is no whole line, or the first is no JSON.
    """
    lines = [_without_comma(line.strip()) for line in whole_lines(head)]
    if len(head) >= HEAD_BYTES // 4 and len(lines) > 1:
        lines.pop()  # cut off
    if not lines:
        return lines_by_name
    if len(lines) == 1:
        return lines_by_name and not lines[0].startswith("[") and not _has_several_rows(lines[0])
    if _is_json(lines[0]):
        return not lines[0].startswith("[") or all(line.startswith("[") for line in lines[1:])
    if not lines[0].startswith(("[", "{")):
        return lines_by_name
    return any(line.startswith("{") and _is_json(line) for line in lines[1:]) and not lines[0].startswith("[")


def _read_lines(content: Content, encoding: str) -> Iterator[Row]:
    """Yield a row for each line that is not blank; a line that is not JSON gives a row with a fault."""
    with open_text(content, encoding, None) as text:
        for number, line in enumerate(lines_of(text, content.label), start=1):
            origin = f"{content.label} line {number}"
            if not line.strip("\ufeff \t\n\x1e\x1a"):
                continue
            if has_undecoded_bytes(line):
                yield undecoded_row(origin, encoding)
                continue
            if "\0" in line:
                yield Row(origin, fault="holds a NUL character, which no text has; remove it")
                continue
            try:
                values = json.loads(line.strip("\ufeff\x1e"), object_pairs_hook=without_repeats)
            except (ValueError, RecursionError) as error:  # ValueError alone: a number of thousands of digits
                reason = f" ({error}); expected one object a line"
                if _is_json(_without_comma(line.strip())):
                    reason = ": a comma ends the line; remove it"
                yield Row(origin, fault=f"is not valid JSON{reason}")
            else:
                yield make_row(origin, values)


def _read_value(content: Content, encoding: str, head: str) -> Iterator[Row]:
    """Yield the rows of a file that is one JSON value, or several without lines of their own."""
    label = content.label
    with open_text(content, encoding, None) as text:
        stream = JsonStream(text, label)
        for where, values, written in _values(stream, label, _is_keyed(head)):
            if has_undecoded_bytes(written):
                yield undecoded_row(f"{label} {where}", encoding)
            elif written:
                yield make_row(f"{label} {where}", values)
            else:
                yield from _rows_of_value(label, values, where)
        if stream.peek():
            raise stream.fault("something follows the end of the rows")


def _values(stream: JsonStream, label: str, is_keyed: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield place, value and text of each row; of a single value that may hold several rows, an empty text."""
    if stream.peek() == "[":
        for number, (values, written) in enumerate(stream.elements(), start=1):
            yield f"row {number}", values, written
    elif stream.peek() == "{" and is_keyed:
        for number, (key, values, written) in enumerate(stream.entries(), start=1):
            if not isinstance(values, dict):
                raise DataError(
                    f"{label}: the entry {_short(key)} is a {type(values).__name__}, and those before it are objects; "
                    f"{_LIST_FORMS}"
                )
            yield _place(key, number), values, written
    elif stream.peek():
        where = f"line {stream.line}"
        value, written = stream.value(_LARGEST_VALUE)
        is_single = stream.peek() != "{" or not isinstance(value, dict)
        yield where, value, "" if is_single and not has_undecoded_bytes(written) else written
        on_line = 1
        while not is_single and stream.peek():
            before, where = where, f"line {stream.line}"
            on_line = on_line + 1 if where == before.partition(" value")[0] else 1
            where += f" value {on_line}" if on_line > 1 else ""
            yield where, *stream.value()


def _rows_of_value(label: str, value: Any, where: str) -> Iterator[Row]:
    """Yield the rows of one JSON value that is no list of them: a row, a wrapper, or columns as pandas writes them."""
    if not isinstance(value, dict):
        raise DataError(f"{label}: holds one {type(value).__name__}; {_LIST_FORMS}")
    if not value:
        return
    if has_repeats(value):  # one of two lists of rows, or columns, is lost
        yield make_row(f"{label} {where}", value)
    elif _are_rows(list(value.values())):  # the first is longer than what was looked at
        for number, (key, row) in enumerate(value.items(), start=1):
            yield make_row(f"{label} {_place(key, number)}", row)
    elif (wrapper := _wrapper(label, value)) is not None:
        log.info("%s holds its rows under the key %s", label, _short(wrapper))
        for number, row in enumerate(value[wrapper], start=1):
            yield make_row(f"{label} row {number}", row)
    elif (columns := _columns(label, value)) is not None:
        log.info("%s holds columns, as pandas writes them; they are read as rows", label)
        names = list(columns)
        for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
            yield make_row(f"{label} row {number}", dict(zip(names, cells, strict=True)))
    else:
        yield make_row(f"{label} {where}", value)


def _wrapper(label: str, value: Mapping[str, Any]) -> str | None:
    """Return the key under which an object has its list of rows; None if it has none.

    Raises:
        DataError: it has several such lists.
    """
    lists = [key for key, part in value.items() if _is_list_of_rows(part)]
    if len(lists) > 1 and len(lists) == len(value):
        raise DataError(
            f"{label}: holds several lists of rows ({', '.join(map(_short, lists))}); save each as a file of its own, "
            f"such as {_short(lists[0])}.jsonl"
        )
    if len(lists) == 1 and (len(value) == 1 or lists[0].lower() in _WRAPPERS):
        return lists[0]
    return None


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
        raise DataError(f"{label}: its rows have not the {len(names)} columns that it names; {_LIST_FORMS}")
    if all(isinstance(part, dict) for part in parts):
        if any(part.keys() != parts[0].keys() for part in parts):
            raise DataError(f"{label}: holds columns that have not the same rows; {_LIST_FORMS}")
        return {name: list(part.values()) for name, part in value.items()}
    if all(isinstance(part, list) for part in parts) and not any(_is_conversation(part) for part in parts):
        if len({len(part) for part in parts}) == 1:
            return dict(value)
        raise DataError(f"{label}: holds lists of different lengths, so they are no columns; {_LIST_FORMS}")
    return None


def _is_conversation(part: list[Any]) -> bool:
    """Return whether a list holds the turns of a conversation."""
    return bool(part) and all(isinstance(turn, dict) and _is_turn(turn) for turn in part)


def _is_turn(values: Mapping[str, Any]) -> bool:
    """Return whether an object is a turn of a conversation; it may have keys that nobody reads."""
    return values.keys() <= _TURN_KEYS or any(values.keys() >= pair for pair in _TURN_PAIRS)


def _is_keyed(head: str) -> bool:
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


def _has_several_rows(line: str) -> bool:
    """Return whether an object on one line holds rows, by key, in a list or by column, rather than being one."""
    try:
        value = json.loads(line)
        return (
            isinstance(value, dict)
            and bool(value)
            and (_is_keyed(line) or _wrapper("", value) is not None or _columns("", value) is not None)
        )
    except (ValueError, RecursionError):
        return False
    except DataError:
        return True


def _is_json(line: str) -> bool:
    """Return whether a line is a JSON value of its own."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _without_comma(line: str) -> str:
    """Return a line without the comma behind an object, which is no JSON and shows that each line was to be one."""
    return line[:-1].rstrip() if line.startswith("{") and line.endswith(",") else line


def _place(key: str, number: int) -> str:
    """Return where a row of an object is: its key, or its number where the key is a personal identifier."""
    return f"entry {number}" if _FINDER.find(key) else f"key {_short(key)}"


def _short(key: str) -> str:
    """Return a key for a message, where a text of the rows could stand in its place."""
    key = _FINDER.mask(key)
    return key if len(key) <= 40 and key.isprintable() else f"{key[:40]!r}…"
