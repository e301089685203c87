"""Numbers in an answer that stand in neither its context nor its question: a sign of what a model made up."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from toolkit.metrics.metric import Metric, mean_metric

_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+")


def number_metrics(answers: Sequence[str], sources: Sequence[str]) -> list[Metric]:
    """Return the share of answers with a number that is not in their source (``unsupported_numbers``).

    ``sources`` are context and question of each answer. 1,200 is 1200, 0.50 is 0.5; digits of all scripts are alike.
    """
    pairs = zip(answers, sources, strict=True)
    made_up = [bool(numbers_in(answer) - numbers_in(source)) for answer, source in pairs]
    return [mean_metric("unsupported_numbers", np.array(made_up, float), higher_is_better=False)]


def numbers_in(text: str) -> frozenset[str]:
    """Return the numbers of a text, each in one spelling."""
    digits = "".join(str(unicodedata.digit(letter)) if letter.isdecimal() else letter for letter in text)
    return frozenset(_plain(number.replace(",", "")) for number in _NUMBER.findall(digits))


def _plain(number: str) -> str:
    whole, point, rest = number.partition(".")
    rest = rest.rstrip("0") if point else ""
    return (whole.lstrip("0") or "0") + (f".{rest}" if rest else "")
