"""Make rating sheets: a workbook for each rater, and the key that tells which answer is whose."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.evaluation.rating.key import KeyRow, KeySheet, Language, RatingKey, digest
from toolkit.evaluation.rating.pairs import AnswerPair, pair_answers
from toolkit.evaluation.rating.wording import WORDINGS, column_headers
from toolkit.evaluation.rating.workbook import SheetForm, cell_text, fits_cell, workbook_of
from toolkit.runtime.errors import DataError


@dataclass(frozen=True)
class SheetOptions:
    """Says what rating sheets ask, of how many rows and raters."""

    rows: int = 50
    """Most rows of a sheet."""
    criteria: tuple[str, ...] = ("correct", "complete", "harmless", "fluent")
    scale: tuple[int, int] = (1, 5)
    """Lowest and highest rating."""
    raters: int = 2
    language: Language = "en"
    shows_reference: bool = False
    seed: int = 42


@dataclass(frozen=True)
class MadeSheets:
    """The sheets of all raters."""

    key: RatingKey
    workbooks: Mapping[str, bytes]
    """Content of each file, by its name."""
    rows: int
    """Rows of a sheet."""
    same: int
    """Rows that are left out because both answers are the same."""
    cut: int
    """Texts that were cut to fit into a cell."""


def make_sheets(first: Path, second: Path, options: SheetOptions) -> MadeSheets:
    """Draw rows from two files of answers, and make a workbook for each rater.

    All raters get the same rows, each in an order of their own. Answer 1 is that of ``first`` in half of a rater's
    rows; the second of two raters has the sides the other way round. The draw depends on the seed and on the content of
    both files, so that who knows the seed alone cannot compute the sides.

    Raises:
        DataError: the files do not match, all answers are the same, references are asked for and there are none, or two
            columns have one header.
        UsageError: both are one file.
    """
    pairs = pair_answers(first, second)
    different = [pair for pair in pairs if not pair.is_same]
    if not different:
        raise DataError(f"all {len(pairs)} rows have the same answer in {first} and {second}; nothing can be compared")
    if options.shows_reference and not any(pair.reference for pair in different):
        raise DataError(f"--show-reference: no row of {first} or {second} has a REFERENCE; leave it out")
    columns = column_headers(options.language, options.criteria, options.shows_reference)
    if len(set(columns.values())) < len(columns):
        raise DataError(f"--criteria {','.join(options.criteria)} gives two columns one header; name each once")
    contents = (hashlib.sha256(path.read_bytes()).digest() for path in (first, second))
    random = np.random.default_rng([options.seed, int.from_bytes(hashlib.sha256(b"".join(contents)).digest())])
    count = min(options.rows, len(different))
    drawn = [different[at] for at in sorted(random.choice(len(different), count, replace=False))]
    form = SheetForm(columns, options.criteria, options.scale, WORDINGS[options.language])
    sheets, workbooks = dict[str, KeySheet](), dict[str, bytes]()
    a_is_first = np.zeros(count, bool)
    for rater in range(1, options.raters + 1):
        a_is_first = random.permutation(_half(count, random)) if rater % 2 else ~a_is_first
        order = random.permutation(count).tolist()
        shown = [_cells(drawn[at], bool(a_is_first[at]), form) for at in order]
        rows = tuple(
            KeyRow(
                number, at + 1, drawn[at].id, bool(a_is_first[at]), {name: digest(text) for name, text in of.items()}
            )
            for number, (at, of) in enumerate(zip(order, shown, strict=True), start=1)
        )
        sheet_id, name = f"R-{secrets.token_hex(8)}", f"rater_{rater}.xlsx"
        sheets[sheet_id] = KeySheet(rater, name, rows)
        workbooks[name] = workbook_of(shown, form, sheet_id)
    key = RatingKey(str(first), str(second), options.language, options.criteria, options.scale, columns, sheets)
    cut = sum(not fits_cell(text) for pair in drawn for text in _texts(pair, True, form).values())
    return MadeSheets(key, workbooks, count, len(pairs) - len(different), cut)


def _half(count: int, random: np.random.Generator) -> np.ndarray:
    """Return [count] booleans, half of them true; of an odd count one more or less, by chance."""
    return np.asarray(np.arange(count) % 2 == random.integers(2))


def _texts(pair: AnswerPair, a_is_first: bool, form: SheetForm) -> dict[str, str]:
    """Return the texts of a row, by column."""
    answers = pair.answers if a_is_first else pair.answers[::-1]
    texts = {
        "question": pair.question, "contexts": "\n\n".join(pair.contexts), "reference": pair.reference,
        "answer_1": answers[0], "answer_2": answers[1],
    }  # fmt: skip
    return {name: text for name, text in texts.items() if name in form.columns}


def _cells(pair: AnswerPair, a_is_first: bool, form: SheetForm) -> dict[str, str]:
    """Return the texts of a row as cells hold them."""
    cells = {name: cell_text(text, form.wording.cut) for name, text in _texts(pair, a_is_first, form).items()}
    for name in ("answer_1", "answer_2"):
        cells[name] = cells[name] if cells[name].strip() else form.wording.no_answer
    return cells
