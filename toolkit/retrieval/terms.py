"""What of a text is searched for: the morphemes of Korean that carry meaning, and words in lower case otherwise."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from toolkit.metrics.morphemes import kiwi
from toolkit.runtime.errors import UsageError

_HANGUL = re.compile("[가-힣]")
_WORD = re.compile(r"\d+(?:\.\d+)*|[^\W\d_]+")
_WITHOUT_MEANING = ("J", "E", "S", "X", "VC", "VX")
"""Beginnings of Kiwi's tags of particles, endings, signs, affixes, copulas and auxiliary verbs."""
_KEPT = ("SL", "SN", "SH", "XR")
"""Tags that begin so all the same: foreign letters, numbers, Chinese characters, roots."""

MISSING_KIWI = 'retrieval of Korean texts needs morphemes: pip install kiwipiepy (pip install -e ".[retrieval]")'


def terms_of(texts: Sequence[str]) -> list[list[str]]:
    """Return the terms of each text, in order: morphemes where a text holds Hangul, else words.

    Particles and endings are left out. Korean texts are divided by Kiwi together, which uses all its threads.

    Raises:
        UsageError: a text is Korean and kiwipiepy is not installed.
    """
    folded = [unicodedata.normalize("NFC", text).casefold() for text in texts]
    is_korean = [_HANGUL.search(text) is not None for text in folded]
    found = (
        _morphemes([text for text, korean in zip(folded, is_korean, strict=True) if korean]) if any(is_korean) else ()
    )
    of_korean = iter(found)
    return [next(of_korean) if korean else _WORD.findall(text) for text, korean in zip(folded, is_korean, strict=True)]


def _morphemes(texts: Sequence[str]) -> Iterable[list[str]]:
    """Yield the morphemes of Korean texts that carry meaning."""
    if importlib.util.find_spec("kiwipiepy") is None:
        raise UsageError(MISSING_KIWI)
    for tokens in kiwi().tokenize(list(texts)):
        kept = [token for token in tokens if token.tag in _KEPT or not token.tag.startswith(_WITHOUT_MEANING)]
        yield [term for token in kept for term in _split(token)]


def _split(token: Any) -> list[str]:
    """Return a token's form; foreign words and numbers are divided as those of texts without Hangul."""
    return _WORD.findall(token.form) if token.tag in ("SL", "SN", "SH") or token.tag.startswith("W") else [token.form]
