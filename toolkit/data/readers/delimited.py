"""Rows of CSV and its kin: the separator is asked for or detected."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator

from toolkit.data.readers.content import Content
from toolkit.data.readers.row import ENCODING_ADVICE, ReadOptions, Row, has_undecoded_bytes, undecoded_row
from toolkit.data.readers.table import Record, table_rows
from toolkit.data.readers.table_header import check_not_printed, check_separated, first_records, header_below_titles
from toolkit.data.readers.text import LONGEST_LINE, decoded_head, encoding_of, lines_of, open_text
from toolkit.runtime.errors import DataError

SEPARATORS = (",", "\t", ";", "|")
"""Separators that are detected."""

log = logging.getLogger("frostline")

_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n")
"""Excel's own first line, which names the separator."""


def read_delimited(content: Content, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a file with a header line and a record a line, whose fields may be quoted.

    Raises:
        DataError: a quote is not closed or stands alone, the header is missing or one column that another character
            divides, or it is a printed table.
    """
    encoding = encoding_of(content, options.encoding, by_line=False)
    head = decoded_head(content, encoding).lstrip("\ufeff")
    check_not_printed(content.label, head)
    named = _SEPARATOR_LINE.match(head)
    separator = options.separator or (named[1] if named else detect_separator(head))
    if options.separator is None:
        check_separated(content.label, head, separator)
    usual = "\t" if content.suffix in (".tsv", ".tab") else ","
    if separator != usual and options.separator is None:
        shown = {"\t": "tabs"}.get(separator, repr(separator))
        log.info("%s is read with fields separated by %s; data.separator names another", content.label, shown)
    undecoded: list[Row] = []
    records = _records(content, encoding, separator, bool(named), undecoded)
    for row in table_rows(content.label, records):
        yield from undecoded
        undecoded.clear()
        yield row
    yield from undecoded


def _records(
    content: Content, encoding: str, separator: str, has_separator_line: bool, undecoded: list[Row]
) -> Iterator[Record]:
    """Yield each record, the header's with number 0.

    A record that is not text in the encoding is put into ``undecoded`` instead.
    """
    csv.field_size_limit(LONGEST_LINE)
    with open_text(content, encoding, "") as text:
        lines = lines_of(text, content.label)
        if has_separator_line:
            next(lines)
        reader = csv.reader((line.lstrip("\ufeff") if line[:1] == "\ufeff" else line for line in lines),
                            delimiter=separator, strict=True)  # fmt: skip
        number, begins = -1, 1
        try:
            for cells in reader:
                if not cells:
                    begins = reader.line_num + 1
                    continue
                number += 1
                begins = reader.line_num + 1
                if any(map(has_undecoded_bytes, cells)):
                    if number == 0:
                        raise DataError(f"{content.label}: the header line is not {encoding} text; {ENCODING_ADVICE}")
                    undecoded.append(undecoded_row(f"{content.label} row {number}", encoding))
                else:
                    yield Record(number, cells, reader.line_num + has_separator_line)
        except csv.Error as error:
            line = begins + has_separator_line
            where = f"line {line}" if "end of data" in str(error) or "limit" in str(error) else (
                f"line {reader.line_num + has_separator_line}"
            )  # fmt: skip
            raise DataError(f"{content.label}: not valid CSV near {where}: {_reason(str(error))}") from None


def detect_separator(head: str) -> str:
    """Return the separator that splits most of the first records into as many fields as the header, and most of them.

    Titles above a header of known columns do not count. A comma, if nothing separates.
    """
    best, best_score = ",", (0.0, 0)
    for separator in SEPARATORS:
        records = first_records(head, separator)
        counts = [len(record) for record in records[header_below_titles(records) :]]
        if len(counts) > 1 and len(head) > 2**16:
            counts.pop()  # cut off
        if not counts or counts[0] < 2:
            continue
        score = sum(count == counts[0] for count in counts) / len(counts), counts[0]
        if score > best_score:
            best, best_score = separator, score
    return best


def _reason(fault: str) -> str:
    """Return what is wrong, in the words of CSV files."""
    if "end of data" in fault:
        return "a quote that opens there is never closed (unexpected end of data)"
    if "limit" in fault:
        return f"a field is longer than {LONGEST_LINE:,} characters; check its quotes"
    if "expected after" in fault:
        return f"{fault}; a quote within a quoted field is written twice"
    return fault
