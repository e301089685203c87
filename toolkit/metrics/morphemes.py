"""Tokens for metrics of overlap: words, and of Korean text morphemes.

A Korean word carries particles, so that words of the same meaning rarely are the same; and ``rouge_score`` keeps a to z
and digits alone, so that two identical Korean sentences score 0.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from toolkit.metrics.overlap import Tokenise
from toolkit.runtime.errors import UsageError

_HANGUL = re.compile("[가-힣]")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"\w+")
_KOREAN_SHARE = 0.3
"""Share of Hangul among the letters of texts from which on they count as Korean."""

MISSING_KIWI = "rouge_l and token_f1 of Korean texts need morphemes: pip install kiwipiepy"


def tokenizer_for(texts: Sequence[str]) -> Tokenise | None:
    """Return what divides such texts into tokens: morphemes where they are Korean, else words.

    None where they are Korean and kiwipiepy is not installed.
    """
    if not is_korean(texts):
        return words
    return morphemes if importlib.util.find_spec("kiwipiepy") else None


def is_korean(texts: Sequence[str]) -> bool:
    """Return whether Hangul is much of the letters of some texts."""
    composed = [unicodedata.normalize("NFC", text) for text in texts]  # else a syllable is two or three letters
    letters = sum(len(_LETTER.findall(text)) for text in composed)
    return sum(len(_HANGUL.findall(text)) for text in composed) > _KOREAN_SHARE * letters


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def morphemes(text: str) -> list[str]:
    """Return the morphemes of a text by Kiwi, without punctuation; what is not Korean in lower case.

    Raises:
        UsageError: kiwipiepy is not installed.
    """
    tokens = kiwi().tokenize(unicodedata.normalize("NFC", text).casefold())
    return [token.form for token in tokens if not token.tag.startswith("S") or token.tag in ("SL", "SN", "SH")]


@cache
def kiwi() -> Any:
    """Load Kiwi and its model once, which takes about a second.

    Raises:
        UsageError: kiwipiepy is not installed.
    """
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        raise UsageError(MISSING_KIWI) from None
    return Kiwi()
