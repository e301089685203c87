"""What a sheet of a workbook says beside its values: merged cells, formulas without a value, escaped characters."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any
from xml.etree.ElementTree import iterparse
from xml.parsers import expat

from toolkit.data.readers.table import BadCell, Record, is_blank

log = logging.getLogger("frostline")

_ESCAPED = re.compile("_x([0-9A-Fa-f]{4})_")
"""How a workbook writes a character that XML does not take, such as the carriage return."""


def open_book(stream: IO[bytes]) -> Any:
    """Open a workbook for reading values row by row, with the texts of its cells as they are written (``unescaped``).

    As ``openpyxl.load_workbook`` does, which takes the marks of escaped underscores out of shared texts, so that what
    they protect could not be told from an escape.
    """
    from openpyxl.reader.excel import ExcelReader

    reader = ExcelReader(stream, read_only=True, data_only=True)
    reader.read_strings = partial(_read_strings, reader)
    reader.read()
    return reader.wb


def _read_strings(reader: Any) -> None:
    """Read the texts that the cells of a workbook share."""
    from openpyxl.cell.text import Text
    from openpyxl.xml.constants import SHARED_STRINGS, SHEET_MAIN_NS

    if (part := reader.package.find(SHARED_STRINGS)) is None:
        return
    with reader.archive.open(part.PartName[1:]) as source:
        for _, node in iterparse(source):
            if node.tag == f"{{{SHEET_MAIN_NS}}}si":
                reader.shared_strings.append(Text.from_tree(node).content)
                node.clear()


def unescaped(text: str) -> str:
    """Return a cell's text with its escapes decoded: ``_x000D_`` is a carriage return, ``_x005F_`` an underscore."""
    if "_x" not in text:
        return text
    decoded = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)
    return decoded.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")  # joins halves of one


@dataclass
class SheetMarks:
    """The merged cells of a sheet, and its formulas without a value."""

    label: str
    """The file, for messages."""
    merged: list[tuple[int, int, int]] = field(default_factory=list)
    """First row, last row and column, from 1, of each range of several rows: the column that has its value."""
    uncomputed: set[tuple[int, int]] = field(default_factory=set)
    """Row and column of each cell whose formula has no value."""
    _is_said: bool = field(default=False, init=False)

    def completed(self, records: Iterator[Record]) -> Iterator[Record]:
        """Yield records, with the value of merged cells in each of their rows below the header.

        A cell whose formula has no value becomes a ``BadCell``.
        """
        waiting = sorted(self.merged, reverse=True)
        merged: dict[int, tuple[int, Any]] = {}
        is_below_header = False
        for record in records:
            row, cells = record.number + 1, list(record.cells)
            for at in range(len(cells)) if self.uncomputed else ():
                if (row, at + 1) in self.uncomputed:
                    cells[at] = _uncomputed(row, at + 1)
            while waiting and waiting[-1][0] <= row:
                first, last, column = waiting.pop()
                if is_below_header and first == row and column <= len(cells):
                    merged[column] = last, cells[column - 1]
            merged = {column: (last, value) for column, (last, value) in merged.items() if last >= row}
            filled = sum(not is_blank(cell) for cell in cells)
            if filled:
                self._fill(cells, row, merged)
            is_below_header = is_below_header or filled > 1
            yield record._replace(cells=cells)

    def _fill(self, cells: list[Any], row: int, merged: Mapping[int, tuple[int, Any]]) -> None:
        """Put the values of merged cells into a row that has none in their columns."""
        for column, (_, value) in merged.items():
            cells += [""] * (column - len(cells))
            if is_blank(cells[column - 1]) and not is_blank(value):
                cells[column - 1] = value
                if not self._is_said:
                    log.info(
                        "%s: merged cells have their value in each of their rows, as in row %d", self.label, row - 1
                    )
                    self._is_said = True


def marks_of(label: str, sheet: Any) -> SheetMarks:
    """Read the marks of a sheet of a workbook, in a stream: merged cells are named after all rows.

    Raises:
        Exception: what zip files and XML raise.
    """
    marks = SheetMarks(label)
    with sheet._get_source() as source:  # openpyxl itself does not give them, for a sheet that is read row by row
        parser = expat.ParserCreate()
        handler = _Handler(parser, marks)
        parser.StartElementHandler, parser.EndElementHandler = handler.start, handler.end
        parser.ParseFile(source)
    return marks


class _Handler:
    """Collects the marks of a sheet from the elements of its XML."""

    def __init__(self, parser: expat.XMLParserType, marks: SheetMarks) -> None:
        self._parser, self._marks = parser, marks
        self._row = self._column = 0
        self._type: str | None = None
        self._has_formula = self._has_value = False

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        """Take note of the beginning of an element."""
        name = name.rpartition(":")[2]
        if name == "c":
            self._begin_cell(attributes)
        elif name == "row":
            self._row, self._column = int(float(attributes.get("r", self._row + 1))), 0
        elif name == "f":
            self._has_formula = True
        elif name == "v" and self._has_formula:
            self._parser.CharacterDataHandler = self._take_value
        elif name == "mergeCell":
            self._merge(attributes["ref"])

    def end(self, name: str) -> None:
        """Take note of the end of an element."""
        name = name.rpartition(":")[2]
        if name == "v":
            self._parser.CharacterDataHandler = None
        elif name == "c" and self._has_formula and not self._has_value and self._type != "str":  # which may be empty
            self._marks.uncomputed.add((self._row, self._column))

    def _begin_cell(self, attributes: Mapping[str, str]) -> None:
        from openpyxl.utils import coordinate_to_tuple

        self._has_formula = self._has_value = False
        self._type = attributes.get("t")
        self._column += 1
        if place := attributes.get("r"):
            self._row, self._column = coordinate_to_tuple(place)

    def _take_value(self, text: str) -> None:
        self._has_value = self._has_value or bool(text.strip())

    def _merge(self, place: str) -> None:
        from openpyxl.utils import range_boundaries

        column, first, _, last = range_boundaries(place)
        if last > first:
            self._marks.merged.append((first, last, column))


def _uncomputed(row: int, column: int) -> BadCell:
    from openpyxl.utils import get_column_letter

    return BadCell(
        f"a formula in {get_column_letter(column)}{row} whose value was never computed; open the workbook in Excel or "
        "LibreOffice and save it"
    )
