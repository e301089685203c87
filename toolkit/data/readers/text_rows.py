"""Rows of plain text: a row a line, with the line as its column ``text``."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from toolkit.data.readers.content import Content
from toolkit.data.readers.delimited import read_delimited
from toolkit.data.readers.json_rows import has_row_a_line, read_json
from toolkit.data.readers.row import ReadOptions, Row, has_undecoded_bytes, make_row, undecoded_row
from toolkit.data.readers.text import decoded_head, encoding_of, lines_of, open_text, whole_lines

log = logging.getLogger("frostline")

TEXT = "text"
"""Column of the rows of a plain text, as ``load_dataset("text")`` names it."""


def read_text(content: Content, options: ReadOptions) -> Iterator[Row]:
    """Yield a row for each line that is not blank, unless the text is a table or JSON called ``.txt``.

    A table has a separator that ``data.separator`` names, or as many tabs in each line, as Excel's "Unicode Text".
    """
    encoding = encoding_of(content, options.encoding, by_line=False, log_it=False)
    head = decoded_head(content, encoding).lstrip("\ufeff \r\n")
    if options.separator is not None or _is_tabbed(head):
        yield from read_delimited(content, options)
    elif head.startswith("{") and has_row_a_line(head, False):
        yield from read_json(content, options)
    else:
        encoding_of(content, options.encoding, by_line=False)
        with open_text(content, encoding, None) as text:
            for number, line in enumerate(lines_of(text, content.label), start=1):
                origin = f"{content.label} line {number}"
                if has_undecoded_bytes(line):
                    yield undecoded_row(origin, encoding)
                elif line := line.strip("\ufeff\x1a \t\n"):
                    yield make_row(origin, {TEXT: line})


def _is_tabbed(head: str) -> bool:
    """Return whether the first lines of a text all have the same number of tabs, at least one."""
    counts = {line.count("\t") for line in whole_lines(head)[:10]}
    return len(counts) == 1 and counts != {0}
