"""Rows of JSON: a row a line, a list of rows, rows by key, and what pandas and others write; the content decides."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from toolkit.data.readers.content import Content
from toolkit.data.readers.json_stream import JsonStream
from toolkit.data.readers.json_value import (
    LIST_FORMS,
    has_several_rows,
    is_keyed,
    place_of_entry,
    rows_of_value,
    short_key,
)
from toolkit.data.readers.row import (
    ReadOptions,
    Row,
    has_undecoded_bytes,
    make_row,
    undecoded_row,
    without_repeats,
)
from toolkit.data.readers.text import HEAD_BYTES, decoded_head, encoding_of, lines_of, open_text, whole_lines
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")

_LARGEST_VALUE = 2**30
"""Largest JSON file in characters that is one value and not read row by row: a wrapper, or one of columns."""


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
        return lines_by_name and not lines[0].startswith("[") and not has_several_rows(lines[0])
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
        for where, values, written in _values(stream, label, is_keyed(head)):
            if has_undecoded_bytes(written):
                yield undecoded_row(f"{label} {where}", encoding)
            elif written:
                yield make_row(f"{label} {where}", values)
            else:
                yield from rows_of_value(label, values, where)
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
                    f"{label}: the entry {short_key(key)} is a {type(values).__name__}, and those before it are "
                    f"objects; {LIST_FORMS}"
                )
            yield place_of_entry(key, number), values, written
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
