"""Write a rating sheet as an Excel workbook: instructions, and a row for each question."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.evaluation.rating.wording import Wording

CELL_UNITS = 32_767
"""Longest text of a cell in Excel, in UTF-16 code units."""
_TALLEST_ROW, _LINE_HEIGHT = 409, 15
"""In points: Excel's highest row, and a line of its default font."""
_TEXT_WIDTHS = 30, 40, 50, 60, 80, 100
"""Widths of a text's column in characters; the first is taken in which nine of ten texts are seen as a whole."""
_SHORT_WIDTHS = {"number": 6, "preference": 10, "comment": 24}
_RATING_WIDTH = 10
_UNSTORABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""What XML 1.0 cannot hold."""


@dataclass(frozen=True)
class SheetForm:
    """Holds what all sheets of one key have in common."""

    columns: Mapping[str, str]
    """Headers by column, in order."""
    criteria: Sequence[str]
    scale: tuple[int, int]
    wording: Wording

    def fill(self, text: str) -> str:
        """Fill in what texts of the wording leave open."""
        low, high = self.scale
        return text.format(
            low=low, high=high, tie=self.wording.tie, ratings=self.wording.ratings,
            preference=self.columns["preference"],
        )  # fmt: skip


def fits_cell(text: str) -> bool:
    """Return whether a cell can hold all of a text."""
    return _units(_storable(text)) <= CELL_UNITS


def cell_text(text: str, cut: str) -> str:
    """Return a text as a cell can hold it.

    Control characters become their visible signs (U+2400 …), halves of surrogate pairs U+FFFD. What looks like an
    escape of Excel's, as ``_x0041_``, is escaped. A text that is too long is cut, and ends with ``cut``.
    """
    text = _storable(text)
    if _units(text) <= CELL_UNITS:
        return text
    room = CELL_UNITS - len(cut) - 10  # of a blank and the count
    kept = len(text.encode("utf-16-le")[: 2 * room].decode("utf-16-le", "ignore"))
    return f"{text[:kept]} {cut.format(count=f'{len(text) - kept:,}')}"


def workbook_of(rows: Sequence[Mapping[str, str]], form: SheetForm, sheet_id: str) -> bytes:
    """Return the workbook of one rater: ``rows`` are the texts of each row by column, as ``cell_text`` makes them."""
    import openpyxl

    book = openpyxl.Workbook()
    book.properties.creator = "Frostline"
    book.properties.title = form.wording.title
    _write_instructions(book.active, form, sheet_id, any(row.get("reference") for row in rows))
    _write_ratings(book.create_sheet(form.wording.ratings), rows, form)
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def _write_instructions(sheet: Any, form: SheetForm, sheet_id: str, has_references: bool) -> None:
    from openpyxl.styles import Alignment, Font

    wording = form.wording
    sheet.title = wording.instructions
    steps = [*wording.steps, *[wording.reference] * has_references]
    lines = [(wording.title, ""), *((str(at), form.fill(step)) for at, step in enumerate(steps, start=1))]
    lines += [("", ""), (wording.criterion, "")]
    lines += [wording.criteria.get(name, (name, "")) for name in form.criteria]
    lines += [("", ""), (wording.id, sheet_id)]
    for number, line in enumerate(lines, start=1):
        for column, text in enumerate(line, start=1):
            cell = sheet.cell(number, column)
            _put_text(cell, text)
            cell.alignment = Alignment(wrap_text=True, vertical="top", horizontal="left")
        if line[0] in (wording.title, wording.criterion):
            sheet.cell(number, 1).alignment = Alignment(vertical="top")
            sheet.cell(number, 1).font = Font(bold=True, size=14)
        sheet.row_dimensions[number].height = _LINE_HEIGHT * max(1.4, _lines(line[1], 95))
    sheet.column_dimensions["A"].width, sheet.column_dimensions["B"].width = 18, 100
    sheet.sheet_view.showGridLines = False
    _set_up_print(sheet)


def _write_ratings(sheet: Any, rows: Sequence[Mapping[str, str]], form: SheetForm) -> None:
    from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
    from openpyxl.utils import get_column_letter

    thin = Side(style="thin", color="BFBFBF")
    border = Border(left=thin, right=thin, top=thin, bottom=thin)
    head, blank = (PatternFill("solid", fgColor=color) for color in ("D9E2EC", "FFF9E5"))
    widths = {name: _width(name, rows) for name in form.columns}
    for column, (name, header) in enumerate(form.columns.items(), start=1):
        sheet.column_dimensions[get_column_letter(column)].width = widths[name]
        is_text = name in rows[0] or name == "comment"
        alignment = Alignment(wrap_text=True, vertical="top", horizontal="left" if is_text else "center")
        for number in range(1, len(rows) + 2):
            cell = sheet.cell(number, column)
            cell.border = border
            cell.alignment = alignment
            if number == 1:
                _put_text(cell, header)
                cell.font, cell.fill = Font(bold=True), head
            elif name == "number":
                cell.value = number - 1
            elif name in rows[0]:
                _put_text(cell, rows[number - 2][name])
            else:
                cell.fill = blank
    sheet.row_dimensions[1].height = _LINE_HEIGHT * max(
        _lines(text, widths[name]) for name, text in form.columns.items()
    )
    for number, row in enumerate(rows, start=2):
        height = _LINE_HEIGHT * max(_lines(text, widths[name]) for name, text in row.items())
        sheet.row_dimensions[number].height = min(_TALLEST_ROW, height)
    _add_validation(sheet, len(rows), form)
    sheet.freeze_panes = "C2"
    sheet.print_title_rows = "1:1"
    _set_up_print(sheet)


def _add_validation(sheet: Any, rows: int, form: SheetForm) -> None:
    """Let Excel and LibreOffice refuse what is no rating."""
    from openpyxl.utils import get_column_letter
    from openpyxl.worksheet.datavalidation import DataValidation

    low, high = form.scale
    wording = form.wording
    whole = DataValidation(type="whole", operator="between", formula1=str(low), formula2=str(high), allow_blank=True)
    choice = DataValidation(type="list", formula1=f'"1,2,{wording.tie}"', allow_blank=True)
    whole.error, choice.error = form.fill(wording.bad_rating), form.fill(wording.bad_preference)
    for validation in (whole, choice):
        validation.showErrorMessage = True
        sheet.add_data_validation(validation)
    for column, name in enumerate(form.columns, start=1):
        letter = get_column_letter(column)
        if name == "preference" or "/" in name:
            (choice if name == "preference" else whole).add(f"{letter}2:{letter}{rows + 1}")


def _put_text(cell: Any, text: str) -> None:
    """Put a text that stays one, whatever it begins with: no formula, error or number, also once a rater edits it."""
    cell.value = text
    cell.data_type = "s"
    cell.quotePrefix = text[:1] in tuple("=+-@#'")


def _set_up_print(sheet: Any) -> None:
    """Print on A3 across, as wide as a page; A4 would halve the letters."""
    sheet.page_setup.orientation, sheet.page_setup.paperSize = "landscape", sheet.PAPERSIZE_A3
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    sheet.page_setup.fitToWidth, sheet.page_setup.fitToHeight = 1, 0
    sheet.page_margins.left = sheet.page_margins.right = 0.4
    sheet.oddFooter.center.text = "&P / &N"


def _width(name: str, rows: Sequence[Mapping[str, str]]) -> int:
    """Return the width of a column in characters; both answers have the same."""
    if name not in rows[0]:
        return _SHORT_WIDTHS.get(name, _RATING_WIDTH)
    names = ("answer_1", "answer_2") if name.startswith("answer") else (name,)
    texts = [row[one] for row in rows for one in names]
    for width in _TEXT_WIDTHS:
        if 10 * sum(_lines(text, width) > _TALLEST_ROW // _LINE_HEIGHT for text in texts) <= len(texts):
            return width
    return _TEXT_WIDTHS[-1]


def _lines(text: str, width: int) -> int:
    """Estimate the lines that a text takes in a column; Korean letters are two wide."""
    wide = [sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in line) for line in text.split("\n")]
    return sum(max(1, math.ceil(1.1 * of_line / width)) for of_line in wide)


def _storable(text: str) -> str:
    """Replace what a workbook cannot hold, or reads as something else."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _UNSTORABLE.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd", text)
    return re.sub("_(?=x[0-9A-Fa-f]{4}_)", "_x005F_", text)


def _units(text: str) -> int:
    return len(text) + sum(one > "\uffff" for one in text)
