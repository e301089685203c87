"""Every visible phrase of a report, in English and in Korean, by the same keys."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from markupsafe import Markup

from toolkit.evaluation.plain_baseline import NAME as PLAIN
from toolkit.evaluation.scoring import MAJORITY, PRIOR
from toolkit.evaluation.sources import BASE
from toolkit.evaluation.trivial import ANOTHER_ANSWER, LAST_SENTENCE, NEAREST_TO_QUESTION, NEAREST_TO_REFERENCE
from toolkit.mask.audit import AuditRow
from toolkit.report.clean import clean
from toolkit.report.phrases_en import ENGLISH
from toolkit.report.phrases_ko import KOREAN

Language = Literal["en", "ko"]
PHRASES: dict[Language, dict[str, str]] = {"en": ENGLISH, "ko": KOREAN}

_VERDICTS = {
    "better": "verdict_better", "worse": "verdict_worse", "no difference shown": "verdict_none",
    "too few rows": "verdict_few",
}  # fmt: skip
_TRIVIAL = {
    f"{MAJORITY} of the training rows": "trivial_majority", f"{MAJORITY} of these rows": "trivial_majority_here",
    f"{PRIOR} of the training rows": "trivial_prior", f"{PRIOR} of these rows": "trivial_prior_here",
    f"{PLAIN} of the training rows": "trivial_plain",
    LAST_SENTENCE: "trivial_last", NEAREST_TO_QUESTION: "trivial_question", ANOTHER_ANSWER: "trivial_another",
    NEAREST_TO_REFERENCE: "trivial_oracle",
}  # fmt: skip
_RIGHT_TO_LEFT = {"R", "AL", "AN", "RLE", "RLO", "RLI", "LRE", "LRO", "LRI", "FSI", "PDF", "PDI"}


class Phrases:
    """The phrases of one language."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._phrases = PHRASES[language]

    def __call__(self, key: str, **values: object) -> Markup:
        """Return a phrase as HTML with values in it: escaped, and kept to the direction of their own letters."""
        return Markup(self._phrases[key]).format(**{name: _isolated(value) for name, value in values.items()})

    def plain(self, key: str, **values: object) -> str:
        """Return a phrase as text, for attributes and for text to copy."""
        return self._phrases[key].format(**values)

    def part(self, name: str) -> str:
        """Return a part of the model, as ``audit`` names it: ``blocks 0–1``."""
        kind, _, numbers = name.partition(" ")
        return f"{self._phrases[f'part_{kind}']} {numbers}".strip()

    def state(self, row: AuditRow) -> str:
        """Return whether a part trains."""
        if row.trained in (0, row.parameters):
            return self._phrases["state_trained" if row.trained else "state_frozen"]
        return self.plain("state_partly", share=f"{row.trained / row.parameters:.1%}")

    def named(self, name: str) -> str:
        """Return the name of the model that a run is compared with, as it stands in a sentence."""
        return self._phrases["its_base"] if name == BASE else self.model(name)

    def verdict(self, verdict: str | None) -> str:
        """Return what a difference shows."""
        return "" if verdict is None else self._phrases[_VERDICTS[verdict]]

    def model(self, name: str) -> str:
        """Return the name of a model, or of trivial answers, as the page calls it."""
        if name in _TRIVIAL:
            return self._phrases[_TRIVIAL[name]]
        if name == BASE:
            return self._phrases["model_base"]
        if name == f"{BASE}, prior-corrected":
            return self._phrases["model_corrected"]
        if shots := re.fullmatch(rf"{BASE}, (\d+) shots", name):
            return self.plain("model_shots", count=shots[1])
        return name


def _isolated(value: object) -> object:
    """Return text that a page can hold; in an element of its own if some of it runs from right to left."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    value = clean(value)
    if any(unicodedata.bidirectional(letter) in _RIGHT_TO_LEFT for letter in value):
        return Markup("<bdi>{}</bdi>").format(value)
    return value
