"""Numbers in an answer that stand in neither its context nor its question: a sign of what a model made up."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from toolkit.metrics.metric import Metric, check_rows, mean_metric

_RUN = re.compile(r"(?:(?<![\w.])\.)?\d(?:[.,]?\d)*")
"""Digits with the points and commas between them; a point before them is theirs in P=.05, and not after a word."""
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+")
_RAISED = re.compile("[⁰¹²³⁴-⁹₀-₉]+")
"""Digits above or below the line: 10⁵ is not 105, and CO₂ is CO2."""
_LIST_ITEM = re.compile(r"^\s*\(?\d{1,2}[.)]\s+", re.MULTILINE)
"""What numbers the lines of an answer, and says nothing."""


def number_metrics(answers: Sequence[str], sources: Sequence[str]) -> list[Metric]:
    """Return the share of answers with a number that is not in their source (``unsupported_numbers``).

    ``sources`` are context and question of each answer. 1,200 is 1200, 0.50 is 0.5, and digits of any script are
    digits. A number within a word counts in the answer as in the source: the 19 of COVID-19. Numbers of list items are
    left out. Words are not read as numbers: 2만 is 2, and 20,000 another number; nor is 12 % taken for 0.12.

    Raises:
        DataError: there are no rows, or other answers than sources.
    """
    return [mean_metric("unsupported_numbers", _unsupported(answers, sources) > 0, higher_is_better=False)]


def number_count(answers: Sequence[str], sources: Sequence[str]) -> Metric:
    """Return the mean count of different numbers in an answer that are not in its source (``unsupported_count``).

    Described, not judged: it says much the same as ``unsupported_numbers``, whose arguments and errors it shares.
    """
    return mean_metric("unsupported_count", _unsupported(answers, sources), higher_is_better=None)


def numbers_in(text: str) -> frozenset[str]:
    """Return the numbers of a text, each in one spelling."""
    text = unicodedata.normalize("NFKC", _RAISED.sub(r" \g<0>", text))  # full-width points and commas too
    digits = "".join(str(unicodedata.digit(letter)) if letter.isdecimal() else letter for letter in text)
    return frozenset(_plain(part) for run in _RUN.findall(digits) for part in _parts(run))


def _unsupported(answers: Sequence[str], sources: Sequence[str]) -> np.ndarray:
    """Return the count of unsupported numbers of each answer, [rows]."""
    check_rows(answers=answers, sources=sources)
    pairs = zip(answers, sources, strict=True)
    return np.array([len(numbers_in(_LIST_ITEM.sub("", answer)) - numbers_in(source)) for answer, source in pairs])


def _parts(run: str) -> list[str]:
    """Divide digits that are no one number, such as 1,2 or the date 2020.05.01."""
    if _NUMBER.fullmatch(run):
        return [run]
    pieces = [[piece] if _NUMBER.fullmatch(piece) else piece.split(".") for piece in run.split(",")]
    return [part for of_piece in pieces for part in of_piece if part]


def _plain(number: str) -> str:
    whole, point, rest = number.replace(",", "").partition(".")
    rest = rest.rstrip("0") if point else ""
    return (whole.lstrip("0") or "0") + (f".{rest}" if rest else "")
