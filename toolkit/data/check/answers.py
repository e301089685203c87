"""Find answers that nobody meant to teach, and the languages of a data set."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from toolkit.data.check.samples import CheckedSample, normalise

_PLACEHOLDER = re.compile(
    r"(?i)\W*(?:n\s?/?\s?a|none|null|nan|todo|tbd|fixme|test|asdf|xxx+|lorem ipsum.*|없음|모름|미정|미입력|해당\s?없음"
    r"|테스트|추후\s?작성|작성\s?예정)\W*"
)
_REFUSAL = re.compile(
    r"(?i)\bas an ai\b|\bai language model\b|i(?:'m| am) sorry,? but|i can(?:no|')t (?:assist|help|answer)"
    r"|AI\s?(?:언어\s?)?모델(?:로서|이라|이기)|죄송하지만|답변(?:해\s?드릴|드릴)\s?수\s?없"
)
_MARKUP = re.compile(
    r"(?i)</?(?:br|p|div|span|b|i|u|sup|sub|table|tr|td|ul|li|a|font)\b[^>\n]{0,80}>|&(?:nbsp|amp|lt|gt|quot);"
)
_MOJIBAKE = re.compile(r"�|[ÃÂìíëê][\x80-\xbf]|\x00|[\x01-\x08\x0b\x0c\x0e-\x1f]")
_LOOP = re.compile(r"(.{8,80}?)\1{2}", re.DOTALL)
_LOOKED_AT = 4000
"""Characters of an answer in which a loop is looked for."""
_LONG_ANSWER = 20
"""Letters from which an answer that several questions share is odd; shorter ones may be labels."""
_SHORT_FOR_LANGUAGE = 12
"""Letters below which a text's language is not guessed."""


def odd_answers(samples: Sequence[CheckedSample]) -> Iterator[tuple[CheckedSample, str]]:
    """Yield each sample whose answer is empty or suspicious, with the reason."""
    questions: dict[str, set[str]] = {}
    for sample in samples:
        if len(sample.answer_key) >= _LONG_ANSWER:
            questions.setdefault(sample.answer_key, set()).add(sample.question_key)
    for sample in samples:
        if reason := _oddity(sample):
            yield sample, reason
        elif (shared := len(questions.get(sample.answer_key, ()))) >= 3:
            yield sample, f"is the answer to {shared} questions"


def _oddity(sample: CheckedSample) -> str | None:
    """Return what is odd about an answer by itself; None if nothing is."""
    answer = sample.learned
    if not normalise(answer):
        return "has no letter and no digit"
    if _PLACEHOLDER.fullmatch(answer):
        return "is a placeholder"
    if _MOJIBAKE.search(answer):
        return "holds characters of a wrong decoding"
    if _REFUSAL.search(answer):
        return "refuses, or speaks as an AI model"
    if sample.answer_key == sample.question_key:
        return "repeats the question"
    if _LOOP.search(answer[:_LOOKED_AT]):
        return "repeats itself three times over"
    return "holds HTML" if _MARKUP.search(answer) else None


def can_tell_languages() -> bool:
    """Return whether py3langid is installed."""
    return importlib.util.find_spec("py3langid") is not None


def languages(texts: Sequence[str]) -> dict[str, int]:
    """Count texts by language, as ISO 639-1 codes, the most frequent first; ``short`` are those too short to tell."""
    import py3langid

    found = (
        str(py3langid.classify(text)[0]) if len(normalise(text)) >= _SHORT_FOR_LANGUAGE else "short" for text in texts
    )
    return dict(Counter(found).most_common())
