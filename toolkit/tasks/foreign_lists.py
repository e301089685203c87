"""Recognise lists that other languages and libraries printed: their texts cannot be told apart for certain."""

from __future__ import annotations

import re

_PANDAS_SERIES = re.compile(r"\A\s*0 {2,}\S[\s\S]*\n(?:Name: .*, )?dtype: \S+(?:\nCategories .*)?\s*\Z")
"""A whole column as pandas prints it."""
_POLARS = re.compile(r"\s*shape: \([\d_, ]+\)\s*(?:Series:|┌)")
_CALL = re.compile(r"""\s*([A-Za-z_][\w.:]*[\[({])\s*(?=['"])|\s*((?:c|list)\()\s*[\w.`]+\s*=\s*(?=['"])""")
"""Start of a call or typed list of texts: ``c("a", "b")`` and ``c(x = "a")`` of R, ``List("a", "b")``, ``Any["a"]``."""
_PIECE = re.compile(
    r"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<open>[\[({])|(?P<close>[\])}])"""
    r"""|(?P<between>[^'"\[\](){}]+)|(?P<cut>['"])""",
    re.S,
)
"""A quoted text, a bracket, or what stands between them; a quote where no text matches lacks its closing quote."""
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_COMMA, _COMMA_AND_NAME = re.compile(r"\s*,\s*"), re.compile(r"\s*,\s*(?:[\w.`]+\s*=\s*)?")
_TYPOGRAPHIC_START = re.compile("\\s*[\\[({]\\s*[“‘„«]")
_TYPOGRAPHIC_COMMA = re.compile("[”’“»]\\s*,\\s*[“‘„«]")


def foreign_form(text: str) -> str | None:
    """Return how another language or library printed a list, as the end of a message; None if none did.

    A sentence that begins so, as ``c("a", "b") makes a vector.``, is ordinary text.
    """
    if _PANDAS_SERIES.search(text):
        return "is a printed pandas Series, which shortens long texts"
    if _POLARS.match(text):
        return "is a printed polars Series or table, which shortens long texts"
    if _TYPOGRAPHIC_START.match(text) and _TYPOGRAPHIC_COMMA.search(text):
        has_end = ends_as_a_list(text, "”’“»")
        return "has typographic quotes around its texts" if has_end or not _has_closing(text) else None
    call = _CALL.match(text)
    if call and _is_list_of_texts(text, call):
        name = call[1] or call[2]
        return f"is printed as {name}…{_CLOSING[name[-1]]}"
    return None


def ends_as_a_list(text: str, quotes: str) -> bool:
    """Return True if a text ends in closing brackets behind a quote, or behind the ``dtype=…`` that numpy prints."""
    text = text.rstrip()
    inside = text.rstrip("])}")
    if inside == text:
        return False
    inside = inside.rstrip().removesuffix(",").rstrip()
    _, named, kind = inside.rpartition("dtype=")
    return inside.endswith(tuple(quotes)) or (named != "" and len(kind.split()) == 1 and not kind[0].isspace())


def _is_list_of_texts(text: str, call: re.Match[str]) -> bool:
    """Return whether a call has several texts side by side, and nothing but another one follows it."""
    comma = _COMMA_AND_NAME if call[1] in (None, "c(", "list(") else _COMMA
    depth, texts, is_separated, after_text = 1, 0, False, ""
    for piece in _PIECE.finditer(text, call.end()):
        if piece["cut"]:
            break
        depth += (piece["open"] is not None) - (piece["close"] is not None)
        if depth == 0:
            rest = text[piece.end() :].strip()
            return is_separated and (not rest or rest[0] in ",;|")
        if piece["text"]:
            texts += 1
            is_separated = is_separated or (texts > 1 and comma.fullmatch(after_text) is not None)
        after_text = piece["between"] or ""
    return texts > 0 and after_text.lstrip().startswith(",") and not _has_closing(text)


def _has_closing(text: str) -> bool:
    return any(mark in text for mark in "])}")
