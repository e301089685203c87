"""Read the sheets that raters send back, as Excel and LibreOffice save them."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.data.readers.sheets import read_cells
from toolkit.evaluation.rating.key import SHEET_ID, KeyRow, KeySheet, RatingKey, digest
from toolkit.evaluation.rating.wording import TIE, WORDINGS
from toolkit.runtime.errors import DataError

_Tables = Mapping[str, list[tuple[int, Sequence[Any]]]]
Side = Literal["a", "tie", "b"]
SIDES: tuple[Side, ...] = ("a", "tie", "b")
_MOST_FAULTS = 20
"""Faults that a message lists."""


@dataclass(frozen=True)
class Judgement:
    """Holds what one rater says of a row."""

    row: KeyRow
    ratings: Mapping[str, tuple[int | None, int | None]]
    """Of A and of B, by criterion; None where the cell is blank."""
    preference: Side | None
    comment: str

    @property
    def is_rated(self) -> bool:
        """Return whether anything is rated."""
        return self.preference is not None or any(one is not None for both in self.ratings.values() for one in both)

    @property
    def is_complete(self) -> bool:
        """Return whether everything is rated."""
        return self.preference is not None and all(one is not None for both in self.ratings.values() for one in both)


@dataclass(frozen=True)
class FilledSheet:
    """The sheet of one rater, as it came back."""

    rater: int
    file: str
    rows: int
    """Rows that the sheet was made with; some may have been deleted."""
    judgements: Mapping[int, Judgement]
    """By the row's number that is the same for all raters."""

    @property
    def rated(self) -> int:
        """Return the number of rows of which anything is rated."""
        return sum(one.is_rated for one in self.judgements.values())

    @property
    def in_part(self) -> int:
        """Return the number of rows of which some things are rated and others not."""
        return sum(one.is_rated and not one.is_complete for one in self.judgements.values())


@dataclass(frozen=True)
class _Table:
    """The sheet of a workbook that has the ratings."""

    title: str
    places: Mapping[str, int]
    """Position of each column, by its name."""
    rows: Sequence[tuple[int, Sequence[Any]]]
    """Number and cells of each row below the headers."""


def read_sheets(paths: Sequence[Path], key: RatingKey) -> list[FilledSheet]:
    """Read the sheets of some raters, in the order of the raters.

    Raises:
        DataError: a file is no workbook, of another key or given twice, or cells hold what is no rating, or other texts
            than the sheet was made with; all such cells are named.
    """
    found, faults = dict[str, Path](), list[str]()
    sheets = []
    for path in paths:
        tables = _read_tables(path)
        sheet_id = _sheet_id(path, tables, key)
        if sheet_id in found:
            raise DataError(
                f"{found[sheet_id]} and {path} are both the sheet of rater {key.sheets[sheet_id].rater} "
                f"({sheet_id}); expected each sheet once"
            )
        found[sheet_id] = path
        reader = _SheetReader(path, _find_ratings(path, tables, key), key, faults)
        sheets.append(reader.read(key.sheets[sheet_id]))
    if faults:
        more = [f"… and {len(faults) - _MOST_FAULTS} more"] * (len(faults) > _MOST_FAULTS)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise DataError(
            "\n".join([f"{count} in the sheets:", *(f"  - {one}" for one in [*faults[:_MOST_FAULTS], *more])])
        )
    return sorted(sheets, key=lambda sheet: sheet.rater)


def _read_tables(path: Path) -> _Tables:
    """Return the rows of each sheet of a workbook that are not blank, by its title."""
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about validations in Excel's newer form, which are not read
            return read_cells(str(path), stream)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a rating sheet as .xlsx") from None


def _sheet_id(path: Path, tables: _Tables, key: RatingKey) -> str:
    """Return the id that stands in a workbook."""
    cells = {cell.strip() for rows in tables.values() for _, row in rows for cell in row if isinstance(cell, str)}
    ids = sorted(cell for cell in cells if SHEET_ID.fullmatch(cell))
    if len(ids) != 1:
        what = f"has several sheet ids ({', '.join(ids)})" if ids else "has no sheet id"
        raise DataError(
            f"{path} {what}; expected a workbook of rate.py make, with its sheet "
            f"{WORDINGS[key.language].instructions}, which holds the id"
        )
    if ids[0] not in key.sheets:
        raise DataError(
            f"{path} is the sheet {ids[0]}, which the key does not know; expected {', '.join(key.sheets)}: "
            "name the key.json that was made with it"
        )
    return ids[0]


def _find_ratings(path: Path, tables: _Tables, key: RatingKey) -> _Table:
    """Return the sheet that has a row with all headers of the key; columns may have moved, and others be there too."""
    found = list[_Table]()
    most: tuple[str, list[str]] = ("", list(key.columns.values()))
    for title, rows in tables.items():
        for at, (_, row) in enumerate(rows):
            headers = [_text(cell) for cell in row]
            missing = [header for header in key.columns.values() if header not in headers]
            if not missing:
                if twice := [one for one in key.columns.values() if headers.count(one) > 1]:
                    raise DataError(f"{path}, sheet {title}: the header {twice[0]!r} stands twice; expected it once")
                places = {name: headers.index(header) for name, header in key.columns.items()}
                found.append(_Table(title, places, rows[at + 1 :]))
                break
            most = min(most, (title, missing), key=lambda one: len(one[1]))
    if len(found) > 1:
        titles = " and ".join(table.title for table in found)
        raise DataError(
            f"{path}: the sheets {titles} both have the headers of ratings; expected one, remove the others"
        )
    if found:
        return found[0]
    where = f"{path}, sheet {most[0]}" if most[0] else str(path)
    raise DataError(f"{where}: no column has the header {most[1][0]!r}; expected the headers it was made with")


class _SheetReader:
    """Reads the rows of one sheet; what is wrong is appended to ``faults``."""

    def __init__(self, path: Path, table: _Table, key: RatingKey, faults: list[str]) -> None:
        self._path, self._table, self._key, self._faults = path, table, key, faults
        self._ties = {TIE, WORDINGS[key.language].tie}

    def read(self, sheet: KeySheet) -> FilledSheet:
        """Read all rows."""
        known = {row.number: row for row in sheet.rows}
        places, judgements = dict[int, int](), dict[int, Judgement]()
        for at, cells in self._table.rows:
            values = {name: cells[place] if place < len(cells) else None for name, place in self._table.places.items()}
            if all(_is_blank(value) for value in values.values()):
                continue
            number = _whole(values["number"])
            if number not in known:
                text = f"{_text(values['number'])!r} is the number of no row; expected one from 1 to {len(known)}"
                self._fault(at, "number", text)
            elif number in places:
                self._fault(at, "number", f"row {number} stands here and in row {places[number]}; expected it once")
            else:
                places[number] = at
                judgements[known[number].row] = self._judgement(at, values, known[number])
        return FilledSheet(sheet.rater, str(self._path), len(known), judgements)

    def _judgement(self, at: int, values: Mapping[str, Any], row: KeyRow) -> Judgement:
        """Read one row, in the sheet's row ``at``."""
        for name, expected in row.digests.items():
            if digest(_text(values[name])) != expected:
                self._fault(at, name, f"the text is not the one of row {row.number} that was sent out; put it back")
        ratings = {}
        for criterion in self._key.criteria:
            one, two = (self._rating(at, f"{criterion}/{answer}", values) for answer in (1, 2))
            ratings[criterion] = (one, two) if row.a_is_first else (two, one)
        return Judgement(row, ratings, self._preference(at, values, row), _text(values["comment"]))

    def _rating(self, at: int, column: str, values: Mapping[str, Any]) -> int | None:
        value, (low, high) = values[column], self._key.scale
        if _is_blank(value):
            return None
        number = _whole(value)
        if number is None or not low <= number <= high:
            self._fault(at, column, f"{str(value)[:40]!r}; expected a whole number from {low} to {high}, or nothing")
            return None
        return number

    def _preference(self, at: int, values: Mapping[str, Any], row: KeyRow) -> Side | None:
        value = values["preference"]
        if _is_blank(value):
            return None
        if _text(value).lower() in self._ties:
            return "tie"
        number = _whole(value)
        if number not in (1, 2):
            expected = ", ".join(["1", "2", *sorted(self._ties)])
            self._fault(at, "preference", f"{str(value)[:40]!r}; expected {expected} or nothing")
            return None
        return "a" if (number == 1) == row.a_is_first else "b"

    def _fault(self, at: int, column: str, text: str) -> None:
        from openpyxl.utils import get_column_letter

        header = self._key.columns[column]
        cell = f"{get_column_letter(self._table.places[column] + 1)}{at}"
        self._faults.append(f"{self._path}, sheet {self._table.title}, cell {cell} ({header}): {text}")


def _is_blank(value: Any) -> bool:
    return value is None or not str(value).strip()


def _text(value: Any) -> str:
    """Return the text of a cell; a program may have made a number of it."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _whole(value: Any) -> int | None:
    """Return the whole number in a cell, as number or text, also in full-width digits; None if it holds none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(unicodedata.normalize("NFKC", value) if isinstance(value, str) else value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
