"""Rows of an Excel workbook: one sheet of it, with a header row."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any
from unicodedata import normalize

from toolkit.data.readers.content import Content
from toolkit.data.readers.row import ReadOptions, Row, plain_value
from toolkit.data.readers.sheet_marks import SheetMarks, marks_of, open_book, unescaped
from toolkit.data.readers.table import Record, table_rows
from toolkit.runtime.errors import DataError
from toolkit.runtime.printable import one_line

log = logging.getLogger("frostline")

_LARGEST_PART = 512 * 2**20
"""Largest part of a workbook in bytes, decompressed; its texts are held in memory."""
_TYPES = "[Content_Types].xml"
"""The part that every workbook has."""


def read_workbook(content: Content, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a sheet: the one that ``data.sheet`` names, else the first visible one that is not empty.

    Numbers and booleans stay what they are, dates become ISO text, blank cells are empty text.

    Raises:
        DataError: the workbook is damaged, too large or has no such sheet.
    """
    with content.seekable() as stream:
        book = _open(content.label, stream)
        try:
            sheet = _choose_sheet(content.label, book, options.sheet)
            records = _marks(content.label, sheet).completed(_records(content.label, sheet))
            yield from table_rows(content.label, records, may_be_short=True)
        finally:
            book.close()


def read_cells(label: str, stream: IO[bytes]) -> dict[str, list[tuple[int, Sequence[Any]]]]:
    """Return the rows that are not blank of every sheet, by its title: the row's number from 1, and its cells.

    A blank cell is None, and what a formula gave is its value. ``label`` names the file in messages.

    Raises:
        DataError: the workbook is damaged or too large.
    """
    book = _open(label, stream)
    try:
        found: dict[str, list[tuple[int, Sequence[Any]]]] = {}
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # some programs write wrong ones
            numbered = enumerate(sheet.iter_rows(values_only=True), start=1)
            found[sheet.title] = [
                (at, [unescaped(cell) if isinstance(cell, str) else cell for cell in row])
                for at, row in numbered
                if any(cell not in (None, "") for cell in row)
            ]
        return found
    except Exception as error:  # as in _open
        raise _damaged(label, error) from None
    finally:
        book.close()


def _open(label: str, stream: IO[bytes]) -> Any:
    """Open a workbook for reading values row by row."""
    _check_parts(label, stream)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about drawings, filters and styles, which are not read
            return open_book(stream)
    except Exception as error:  # openpyxl lets through what zip files, XML and its own parts raise
        raise _damaged(label, error) from None


def _marks(label: str, sheet: Any) -> SheetMarks:
    """Return the merged cells and formulas without a value of a sheet."""
    try:
        return marks_of(label, sheet)
    except Exception as error:  # as in _open
        raise _damaged(label, error) from None


def _records(label: str, sheet: Any) -> Iterator[Record]:
    """Yield the rows of a sheet, the first with number 0."""
    sheet.reset_dimensions()  # some programs write wrong ones
    rows = sheet.iter_rows(values_only=True)
    number = 0
    while True:
        try:
            cells = next(rows, None)
        except Exception as error:  # as in _open
            raise _damaged(label, error) from None
        if cells is None:
            return
        yield Record(number, [_value(cell) for cell in cells])
        number += 1


def _value(cell: Any) -> Any:
    """Return the value of a cell; a blank one is empty text."""
    if cell is None:
        return ""
    return unescaped(cell) if isinstance(cell, str) else plain_value(cell)


def _choose_sheet(label: str, book: Any, asked: str | None) -> Any:
    """Return the sheet to read, and log which if there are several."""
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    listed = ", ".join(sheets) or "none"
    if asked is not None:
        composed = normalize("NFC", asked)  # a Mac writes names decomposed
        found = [title for title in sheets if asked == title] or [
            title for title in sheets if normalize("NFC", title) == composed
        ]
        if len(found) != 1:
            number = "several such sheets" if found else "no such sheet"
            raise DataError(f"data.sheet is {asked!r}, but {label} has {number}; set it to one of: {listed}")
        return sheets[found[0]]
    visible = [sheet for sheet in sheets.values() if sheet.sheet_state == "visible"] or list(sheets.values())
    for sheet in visible:
        if any(any(cell != "" for cell in record.cells) for record in _records(label, sheet)):
            if len(sheets) > 1:
                log.info("%s has the sheets %s; %s is read, as data.sheet names none", label, listed, sheet.title)
            return sheet
    raise DataError(f"{label}: holds no rows; expected at least one in one of its sheets ({listed})")


def _check_parts(label: str, stream: IO[bytes]) -> None:
    """Raise DataError if the workbook is no zip file, or a part of it is too large to be held in memory."""
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(label, error) from None
    if _TYPES not in (names := [part.filename for part in parts]):
        raise DataError(
            f"{label}: is a zip archive ({', '.join(map(one_line, names[:3])) or 'empty'}) and no Excel workbook; end "
            "its name in .zip if it holds data files"
        )
    if large := [part for part in parts if part.file_size > _LARGEST_PART]:
        raise DataError(
            f"{label}: a part of it has {large[0].file_size:,} bytes, more than the {_LARGEST_PART:,} that are read of "
            "a workbook; save the sheet as CSV"
        )
    stream.seek(0)


def _damaged(label: str, error: BaseException) -> DataError:
    """Return the error for a workbook that cannot be read."""
    return DataError(f"{label}: not a readable Excel workbook ({error}); save it again as .xlsx, or the sheet as CSV")
