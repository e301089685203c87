"""Rows of plain text: a row a line, with the line as its column ``text``."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

from toolkit.data.readers.content import Content
from toolkit.data.readers.delimited import detect_separator, read_delimited
from toolkit.data.readers.json_rows import read_json
from toolkit.data.readers.row import ReadOptions, Row, has_undecoded_bytes, make_row, undecoded_row
from toolkit.data.readers.table_header import check_not_printed, is_table
from toolkit.data.readers.text import decoded_head, encoding_of, lines_of, open_text, whole_lines

log = logging.getLogger("frostline")

TEXT = "text"
"""Column of the rows of a plain text, as ``load_dataset("text")`` names it."""


_JSON_ROW = re.compile(r'(?:\[\s*)*\{\s*"[^"\n]{1,80}"\s*:')
"""How rows begin that are JSON."""


def read_text(content: Content, options: ReadOptions) -> Iterator[Row]:
    """Yield a row for each line that is not blank, unless the text is a table or JSON called ``.txt``.

    A table has a separator that ``data.separator`` names, or as many tabs in each line, as Excel's "Unicode Text", or a
    header that names known columns. The blanks before a line stay, as they may be those of code.

    Raises:
        DataError: it is a printed table, or cannot be read as what it is.
    """
    encoding = encoding_of(content, options.encoding, by_line=False, log_it=False)
    head = decoded_head(content, encoding).lstrip("\ufeff \r\n")
    check_not_printed(content.label, head)
    if options.separator is not None or _is_tabbed(head):
        yield from read_delimited(content, options)
    elif _is_json(head):
        log.info("%s is read as JSON, by its content", content.label)
        yield from read_json(content, options)
    elif is_table(head, detect_separator(head)):
        log.info("%s is read as CSV, by its content", content.label)
        yield from read_delimited(content, options)
    else:
        encoding_of(content, options.encoding, by_line=False)
        with open_text(content, encoding, None) as text:
            for number, line in enumerate(lines_of(text, content.label), start=1):
                origin = f"{content.label} line {number}"
                if has_undecoded_bytes(line):
                    yield undecoded_row(origin, encoding)
                elif line.strip("\ufeff\x1a \t\n"):
                    yield make_row(origin, {TEXT: line.lstrip("\ufeff").rstrip("\x1a \t\n")})


def _is_json(head: str) -> bool:
    """Return whether a text is JSON from its beginning: an object, a list of them, or one after the other.

    Prose may begin with a bracket, and go on after it.
    """
    if head[:1] not in ("{", "["):
        return False
    try:
        value, end = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):  # cut off here, or broken, which reading it says
        return _JSON_ROW.match(head) is not None
    has_texts = any(isinstance(item, str | list | dict) for item in value)
    return has_texts and head[end:].lstrip()[:1] in ("", "{", "[", ",")


def _is_tabbed(head: str) -> bool:
    """Return whether the first lines of a text all have the same number of tabs, and these not to indent them alone."""
    lines = whole_lines(head)[:10]
    return len({line.count("\t") for line in lines}) == 1 and any("\t" in line.strip() for line in lines)
