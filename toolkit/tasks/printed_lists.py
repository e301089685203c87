"""Lists that a table holds as text, the way Python, numpy, pandas or JSON print them: read exactly, or refused.

A CSV file has no lists, so whoever saves one prints them: ``['a', 'b']`` (Python), ``['a' 'b']`` (numpy, and so
pandas and ``Dataset.to_csv``), ``array(['a', 'b'], dtype=object)``, ``["a", "b"]`` (JSON), ``{'contexts': [...]}``.
Nothing is evaluated. Python would join ``'a' 'b'`` into one text; here two texts stay two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_OPENS = re.compile(
    r"""\s*(?:<[\w.]+[:>]\s*)?(?:[A-Za-z_][\w.]*\(\s*|[\[({]\s*)*?[\[({]\s*
    (?:[bBuU]?['"] | (?:None|nan|NaN|True|False|\.\.\.)[\s,\])}] | (?:array|list|tuple|np\.\w+)\( | [\])}])""",
    re.X,
)
"""How a printed list or mapping begins; a text that begins otherwise is none."""

_SERIES = re.compile(r"\A\s*0 {2,}\S[\s\S]*\n(?:Name: .*, )?dtype: \w+\s*\Z")
"""How pandas prints a column."""

_TOKEN = re.compile(
    r"""(?P<text>[A-Za-z]?(?:'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*"))
    | (?P<name>[A-Za-z_][\w.]*) | (?P<gap>\.\.\.) | (?P<number>[-+]?\d[\w.+-]*) | (?P<mark>[\[\](){},:=])""",
    re.X | re.S,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.S)
_PLAIN_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
"""All that ``repr`` writes beside numbers: ``\\a`` and the like come from a text that was not escaped."""

_WRAPPERS = ("array", "list", "tuple", "str_")
_WORDS = {"None": None, "null": None, "True": True, "False": False, "nan": float("nan"), "NaN": float("nan")}
_CLOSES = {"[": "]", "(": ")", "{": "}"}
_EXCEL_LIMIT = 32_000
"""Characters of a cell, of which Excel keeps 32,767."""
_DEEPEST = 8


class WrittenListError(Exception):
    """A printed list that cannot be read back exactly; the message completes 'a list that …'."""


@dataclass(eq=False)
class _StopReading(Exception):
    """Stops reading; says where and why."""

    reason: str
    is_cut_off: bool = False
    """The text ended too early."""
    is_word: bool = False
    """A word followed on a blank, as in prose."""


def read_written(text: str) -> Any:
    """Return the list or dict that ``text`` prints, once or twice over, or ``text`` itself where it prints none.

    Raises:
        WrittenListError: it prints one, but not so that every text in it is known.
    """
    if text.lstrip()[:1] in ("[", "{", '"'):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            if isinstance(found, (list, dict)):
                return found
            if isinstance(found, str) and not isinstance(again := read_written(found), str):
                return again
    if _SERIES.search(text):
        raise WrittenListError("is a printed pandas Series, which shortens long texts")
    if not _OPENS.match(text):
        return text
    reader = _Reader(text)
    try:
        value, rest = reader.read()
    except _StopReading as stop:
        if _is_prose(text, stop, reader.texts):
            return text
        raise WrittenListError(stop.reason) from None
    if rest:
        if reader.texts < 2 and rest[0] not in ",;|[":
            return text
        raise WrittenListError(f"is followed by {rest[:20]!r}")
    return text if isinstance(value, str) else value


def _is_prose(text: str, stop: _StopReading, texts: int) -> bool:
    """Return whether a text only begins like a list: ``["Aspirin" was given] and …``."""
    if text.lstrip().startswith("<"):
        return False
    has_closing = any(mark in text for mark in "])}")
    if stop.is_cut_off:
        return texts == 0 and has_closing and len(text) < _EXCEL_LIMIT
    is_separated = re.search(r"""['"]\s*,""", text) is not None
    if re.search(r"""(?:['"]|dtype=\S+)\s*,?\s*[\])}]+\s*$""", text):
        return stop.is_word and not is_separated
    return not (is_separated and (text.rstrip()[-1:] in "])}" or not has_closing))


@dataclass
class _Reader:
    """A recursive-descent reader of one printed value."""

    text: str
    texts: int = 0
    """Whole texts read so far."""
    _tokens: list[tuple[str, str, bool]] = field(default_factory=list)
    _at: int = 0

    def read(self) -> tuple[Any, str]:
        """Return the value, and what stands behind it."""
        depth, behind = 0, ""
        for kind, token, after_blank, end in _tokens(self.text):
            self._tokens.append((kind, token, after_blank))
            if kind == "mark":
                depth += (token in _CLOSES) - (token in _CLOSES.values())
                if depth == 0:
                    behind = self.text[end:].strip()
                    break
        return self._value(0), behind

    def _peek(self) -> tuple[str, str, bool]:
        if self._at == len(self._tokens):
            raise _StopReading("ends before it is closed: it was cut off", is_cut_off=True)
        return self._tokens[self._at]

    def _next(self) -> tuple[str, str, bool]:
        token = self._peek()
        self._at += 1
        return token

    def _value(self, depth: int) -> Any:
        kind, token, after_blank = self._next()
        if depth > _DEEPEST:
            raise _StopReading(f"is nested more than {_DEEPEST} times")
        if kind == "text":
            self.texts += 1
            return _unescape(token)
        if kind == "mark" and token in ("[", "("):
            return self._sequence(token, depth)
        if kind == "mark" and token == "{":
            return self._mapping(depth)
        if kind == "gap":
            raise _StopReading("was shortened with … when it was printed, so texts of it are lost")
        if kind == "number":
            return float("nan")  # a kind that is no text; which number does not matter
        if kind == "name" and self._peek()[1] == "(":
            return self._call(token, depth)
        if kind == "name" and token.rpartition(".")[2] in _WORDS:
            return _WORDS[token.rpartition(".")[2]]
        raise _StopReading(f"has {token[:20]!r} where a text is expected", is_word=kind == "name" and after_blank)

    def _sequence(self, opening: str, depth: int) -> Any:
        """Read a list or tuple; its texts are all separated by commas, or all by blanks as numpy does it."""
        items: list[Any] = []
        commas = blanks = 0
        while self._peek()[1] != _CLOSES[opening]:
            if items:
                kind, token, after_blank = self._peek()
                if token == ",":
                    self._next()
                    commas += 1
                    if self._peek()[1] == _CLOSES[opening]:
                        break
                elif not after_blank:
                    raise _StopReading(_behind(token))
                else:
                    blanks += kind in ("text", "mark", "gap")
            items.append(self._value(depth + 1))
        self._next()
        if commas and blanks:
            raise _StopReading("separates some texts by commas and others by blanks")
        if opening == "(" and not commas:
            if len(items) > 1:
                raise _StopReading("has texts side by side in round brackets, which is one text to Python")
            return items[0] if items else []
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self._peek()[1] != "}":
            key = self._value(depth + 1)
            kind, token, after_blank = self._next()
            if token in (",", "}"):
                raise _StopReading("is a set, whose order is unknown")
            if token != ":" or not isinstance(key, str):
                raise _StopReading(f"has {token[:20]!r} after a key", is_word=kind == "name" and after_blank)
            found[key] = self._value(depth + 1)
            if self._peek()[1] == ",":
                self._next()
            elif self._peek()[1] != "}":
                raise _StopReading(_behind(self._peek()[1]))
        self._next()
        return found

    def _call(self, name: str, depth: int) -> Any:
        """Read ``array([...], dtype=object)`` and the like."""
        if name.rpartition(".")[2] not in _WRAPPERS:
            raise _StopReading(f"is printed as {name}(…)")
        self._next()
        value = self._value(depth + 1)
        while self._peek()[1] != ")":
            for expected in (",", None, "=", None):
                if self._next()[1] != expected and expected is not None:
                    raise _StopReading(f"does not end {name}(…) as numpy does")
        self._next()
        return value


def _tokens(text: str) -> Iterator[tuple[str, str, bool, int]]:
    """Yield each token's kind, its text, whether a blank stands before it, and where it ends."""
    at = 0
    while at < len(text):
        after_blank = text[at].isspace()
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return
        match = _TOKEN.match(text, at)
        if match is None:
            if text[at] in "'\"":
                return  # a text without its closing quote: cut off
            yield "other", text[at : at + 20], after_blank, len(text)
            return
        at = match.end()
        yield str(match.lastgroup), match[0], after_blank, at


def _behind(token: str) -> str:
    return f"has {token[:20]!r} right behind a text; expected a comma or a blank, and quotes in a text escaped"


def _unescape(token: str) -> str:
    """Return the text that a printed one stands for, quotes and prefix included."""
    if token[0] in "uU":
        token = token[1:]
    if token[0] not in "'\"":
        kind = "bytes" if token[0] in "bB" else f"a text with the prefix {token[0]}"
        raise _StopReading(f"holds {kind} in place of text")

    def plain(match: re.Match[str]) -> str:
        number = match[1] or match[2] or match[3]
        if number and int(number, 16) <= 0x10FFFF:
            return chr(int(number, 16))
        if match[4] not in _PLAIN_ESCAPES:
            raise _StopReading(f"has {match[0]!r} in a text, which no list is printed with: it is not escaped")
        return _PLAIN_ESCAPES[match[4]]

    return _ESCAPE.sub(plain, token[1:-1])
