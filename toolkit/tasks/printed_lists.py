"""Parse lists that Python, numpy, pandas or JSON printed into a text field: exactly, or not at all.

A CSV file has no lists, so they are saved as text: ``['a', 'b']`` (Python), ``['a' 'b']`` (numpy, and so
pandas and ``Dataset.to_csv``), ``array(['a', 'b'], dtype=object)``, ``["a", "b"]`` (JSON), ``{'contexts': [...]}``.
Nothing is evaluated. Python would join ``'a' 'b'`` into one text; here they remain two.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from toolkit.tasks.foreign_lists import ends_as_a_list, foreign_form

_LIST_START = re.compile(
    r"""\s*(?:<[\w.]+(?:\ object\ at\ \w+)?[:>]\s*)?
    (?:[A-Za-z_][\w.]*\(\s*(?:(?:<class\ '[\w.]+'>|None),\s*)?|[\[({]\s*)*?[\[({]\s*
    (?:[bBuUrRfF]{0,2}['"] | (?:None|nan|NaN|True|False|\.\.\.)[\s,\])}] | (?:array|list|tuple|np\.\w+)\( | [\])}])""",
    re.X,
)
"""Start of a printed list or mapping; a text that starts otherwise is ordinary text."""

_TOKEN_PATTERN = re.compile(
    r"""(?P<blank>\s*) (?: (?P<text>[A-Za-z]?(?:'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*"))
    | (?P<name>[A-Za-z_][\w.]*) | (?P<gap>\.\.\.) | (?P<number>[-+]?\d[\w.+-]*) | (?P<mark>[\[\](){},:=])
    | (?P<end>\Z | ['"]) | (?P<other>.{1,20}) )""",
    re.X | re.S,
)
"""A token and the blanks before it. A quote where no text matches lacks its closing quote: the text was cut off."""
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.S)
_ESCAPED_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
"""The escapes that ``repr`` writes, besides numeric ones; any other shows that the text was not escaped."""

_LIST_CALLS = ("array", "list", "tuple", "str_")
"""Constructors that are printed around a list or text, as in ``array([...])`` and ``np.str_('a')``."""
_CONSTANTS = {"None": None, "null": None, "True": True, "False": False, "nan": float("nan"), "NaN": float("nan")}
_CLOSING_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_TRUNCATED_CELL_LENGTH = 32_000
"""A text this long may have been cut off by Excel, which keeps 32,767 characters of a cell."""
_SENTENCE_ENDS = ".?!。…"
_LONGEST_NAME = 40
"""Characters that a sentence quotes in brackets, as the names of groups; longer texts are items of a list."""
_MAX_DEPTH = 8
"""Deepest nesting of lists that is parsed."""


class PrintedListError(Exception):
    """A printed list cannot be parsed exactly; the message is a predicate, as 'a printed list that … was cut off'."""


@dataclass(eq=False)
class _ParseError(Exception):
    """The tokens are not a printed value."""

    reason: str
    is_cut_off: bool = False
    """The text ends before the value does."""
    is_word: bool = False
    """The unexpected token is a word after a blank, as in prose."""


def parse_printed_list(text: str) -> Any:
    """Return the list or dict that ``text`` is the printed form of, or ``text`` itself if it is ordinary text.

    A list that was printed, and then printed again as a JSON string, is parsed too.

    Raises:
        PrintedListError: the text is a printed list, but its items cannot be recovered exactly.
    """
    if text.lstrip()[:1] in ("[", "{", '"'):
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
            if isinstance(value, str):
                value = parse_printed_list(value)
            if not isinstance(value, str):
                return value
    if form := foreign_form(text):
        raise PrintedListError(form)
    if not _LIST_START.match(text):
        return text
    parser = _PrintedValueParser(text)
    try:
        value, trailing = parser.parse()
    except _ParseError as error:
        if _is_prose(text, error, parser.texts):
            return text
        raise PrintedListError(error.reason) from None
    if trailing:
        if parser.texts < 2 and trailing[0] not in ",;|[":  # prose that begins with a quotation in brackets
            return text
        if trailing[0].isalpha() and trailing[-1] in _SENTENCE_ENDS and parser.longest_text <= _LONGEST_NAME:
            return text
        raise PrintedListError(f"is followed by {trailing[:20]!r}")
    return text if isinstance(value, str) else value


def _is_prose(text: str, error: _ParseError, texts: int) -> bool:
    """Return True if a text that failed to parse is prose that begins like a list: ``["Aspirin" was given] and …``.

    ``texts`` counts the quoted texts that were parsed before the error.
    """
    if text.lstrip().startswith("<"):
        return False
    has_closing = any(mark in text for mark in "])}")
    if error.is_cut_off:
        return texts == 0 and has_closing and len(text) < _TRUNCATED_CELL_LENGTH
    is_separated = re.search(r"""['"]\s*,""", text) is not None
    if ends_as_a_list(text, "'\""):
        return error.is_word and not is_separated
    return not (is_separated and (text.rstrip()[-1:] in "])}" or not has_closing))


class _Token(NamedTuple):
    kind: str
    """Name of its group in ``_TOKEN_PATTERN``."""
    text: str
    after_blank: bool


@dataclass
class _PrintedValueParser:
    """A recursive-descent parser of one printed value."""

    text: str
    texts: int = 0
    """Quoted texts parsed so far."""
    longest_text: int = 0
    """Characters of the longest of them."""
    _tokens: list[_Token] = field(default_factory=list)
    _position: int = 0

    def parse(self) -> tuple[Any, str]:
        """Return the value, and the text after it."""
        depth, trailing = 0, ""
        for match in _TOKEN_PATTERN.finditer(self.text):
            kind = str(match.lastgroup)
            if kind == "end":
                break
            self._tokens.append(_Token(kind, match[kind], after_blank=bool(match["blank"])))
            if kind == "other":
                break
            if kind == "mark":
                depth += (match[kind] in _CLOSING_BRACKETS) - (match[kind] in _CLOSING_BRACKETS.values())
                if depth == 0:
                    trailing = self.text[match.end() :].strip()
                    break
        return self._parse_value(0), trailing

    def _peek(self) -> _Token:
        """Return the next token without consuming it; _ParseError at the end of the text."""
        if self._position == len(self._tokens):
            raise _ParseError("ends before it is closed: it was cut off", is_cut_off=True)
        return self._tokens[self._position]

    def _next(self) -> _Token:
        """Consume and return the next token."""
        token = self._peek()
        self._position += 1
        return token

    def _parse_value(self, depth: int) -> Any:
        """Parse a text, number, constant, list, mapping or call, ``depth`` levels deep."""
        kind, token, after_blank = self._next()
        if depth > _MAX_DEPTH:
            raise _ParseError(f"is nested more than {_MAX_DEPTH} times")
        if kind == "text":
            self.texts += 1
            self.longest_text = max(self.longest_text, len(token) - 2)
            return _unescape(token)
        if kind == "mark" and token in ("[", "("):
            return self._parse_sequence(token, depth)
        if kind == "mark" and token == "{":
            return self._parse_mapping(depth)
        if kind == "gap":
            raise _ParseError("was shortened with … when it was printed, so texts of it are lost")
        if kind == "number":
            return _number(token)
        if kind == "name" and self._peek().text == "(":
            return self._parse_call(token, depth)
        if kind == "name" and token.rpartition(".")[2] in _CONSTANTS:
            return _CONSTANTS[token.rpartition(".")[2]]
        raise _ParseError(f"has {token[:20]!r} where a text is expected", is_word=kind == "name" and after_blank)

    def _parse_sequence(self, opening: str, depth: int) -> Any:
        """Parse a list or tuple, whose items are separated all by commas, or all by blanks as numpy prints them."""
        items: list[Any] = []
        commas = blanks = 0
        while self._peek().text != _CLOSING_BRACKETS[opening]:
            if items:
                kind, token, after_blank = self._peek()
                if token == ",":
                    self._next()
                    commas += 1
                    if self._peek().text == _CLOSING_BRACKETS[opening]:
                        break
                elif not after_blank:
                    raise _ParseError(_unseparated(token))
                else:
                    blanks += kind in ("text", "mark", "gap")
            items.append(self._parse_value(depth + 1))
        self._next()
        if commas and blanks:
            raise _ParseError("separates some texts by commas and others by blanks")
        if opening == "(" and not commas:
            if len(items) > 1:
                raise _ParseError("has texts side by side in round brackets, which is one text to Python")
            return items[0] if items else []
        return items

    def _parse_mapping(self, depth: int) -> dict[str, Any]:
        """Parse a dict with text keys, after its opening brace."""
        mapping: dict[str, Any] = {}
        while self._peek().text != "}":
            key = self._parse_value(depth + 1)
            kind, token, after_blank = self._next()
            if token in (",", "}"):
                raise _ParseError("is a set, whose order is unknown")
            if token != ":" or not isinstance(key, str):
                raise _ParseError(f"has {token[:20]!r} after a key", is_word=kind == "name" and after_blank)
            mapping[key] = self._parse_value(depth + 1)
            if self._peek().text == ",":
                self._next()
            elif self._peek().text != "}":
                raise _ParseError(_unseparated(self._peek().text))
        self._next()
        return mapping

    def _parse_call(self, name: str, depth: int) -> Any:
        """Parse a call such as ``array([...], dtype=object)``, and ignore its keyword arguments."""
        if name.rpartition(".")[2] not in _LIST_CALLS:
            raise _ParseError(f"is printed as {name}(…)")
        self._next()
        value = self._parse_value(depth + 1)
        while self._peek().text != ")":
            for expected in (",", None, "=", None):
                if self._next().text != expected and expected is not None:
                    raise _ParseError(f"does not end {name}(…) as numpy does")
        self._next()
        return value


def _number(token: str) -> int | float:
    """Return the number that a token is; NaN for what only begins like one, such as a date without quotes."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(token)
    return float("nan")


def _unseparated(token: str) -> str:
    """Return the message for a token that follows a text without a separator."""
    return f"has {token[:20]!r} right behind a text; expected a comma or a blank, and quotes in a text escaped"


def _unescape(token: str) -> str:
    """Return the text of a string literal, given with its quotes and prefix."""
    if token[0] in "uU":
        token = token[1:]
    if token[0] not in "'\"":
        kind = "bytes" if token[0] in "bB" else f"a text with the prefix {token[0]}"
        raise _ParseError(f"holds {kind} in place of text")

    def unescaped(match: re.Match[str]) -> str:
        number = match[1] or match[2] or match[3]
        if number and int(number, 16) <= 0x10FFFF:
            return chr(int(number, 16))
        if match[4] not in _ESCAPED_CHARACTERS:
            raise _ParseError(f"has {match[0]!r} in a text, which no list is printed with: it is not escaped")
        return _ESCAPED_CHARACTERS[match[4]]

    return _ESCAPE.sub(unescaped, token[1:-1])
