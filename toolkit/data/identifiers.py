"""Find and mask personal identifiers by patterns: numbers that one person has, telephones, e-mail addresses.

The formats are those of presidio-analyzer's recognisers for Korea, and of its e-mail and card recognisers. A checksum
is asked of cards alone: registration numbers issued since October 2020 have none. Numbers of many formats, as those of
bank accounts, are taken where a word before them says what they are. Names and addresses are not found.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from toolkit.tasks.printed_lists import PrintedListError, parse_printed_list

_DASH = r"[-\u2010-\u2015\u2212\uff0d]"
_GAP = rf"\s?{_DASH}?\s?"
_BIRTHDAY = r"(?<!\d)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_LABEL_END = r"(?:\s?(?:번호|No\.?|#))?\s?[:：=]?\s?(?:[가-힣A-Za-z]{1,8}\s)?"
"""What may stand between the word that says what a number is and the number, as in ``계좌번호: 국민 …``."""
_REGIONS = "서울|부산|대구|인천|광주|대전|울산|세종|경기|강원|충북|충남|전북|전남|경북|경남|제주"
_PATTERNS = {
    "EMAIL": r"(?<=[\w.+%-])@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}",  # the rest of it: _start_of_email
    "RESIDENT_NUMBER": rf"{_BIRTHDAY}{_GAP}[1-4]\d{{6}}(?!\d)",
    "FOREIGN_NUMBER": rf"{_BIRTHDAY}{_GAP}[5-8]\d{{6}}(?!\d)",
    "DRIVING_LICENCE": (
        rf"(?<!\d)\d{{2}}{_DASH}\d{{2}}{_DASH}\d{{6}}{_DASH}\d{{2}}(?!\d)"
        r"|(?<!\d)(?:1[1-9]|2[0-8]) \d{2} \d{6} \d{2}(?!\d)"
        rf"|(?:{_REGIONS})\s?\d{{2}}{_DASH}\d{{6}}{_DASH}\d{{2}}(?!\d)"
        rf"|(?:면허|licen[cs]e){_LABEL_END}(?P<licence>\d{{2}}[- ]?\d{{2}}[- ]?\d{{6}}[- ]?\d{{2}})(?!\d)"
    ),
    "CARD": r"(?<![\d-])(?:\d{4}[- ]?\d{4}[- ]?\d{4}[- ]?\d{4}|\d{4}[- ]?\d{6}[- ]?\d{5})(?![\d-])",
    "PASSPORT": (
        r"(?<![A-Za-z0-9])[MSROD](?:\d{3}[A-Z]\d{4}|\d{8})(?![A-Za-z0-9])"
        rf"|(?:여권|passport){_LABEL_END}(?P<passport>[A-Za-z]{{1,2}}\d{{7,8}})(?!\d)"
    ),
    "ACCOUNT": (
        rf"(?:계좌|입금|송금|은행|뱅크|농협|신협|수협|우체국|새마을금고|account){_LABEL_END}"
        r"(?P<account>\d{2,6}-\d{2,6}-\d{2,8}(?:-\d{1,6})?|\d{10,14})(?![\d-])"
    ),
    "PHONE": (
        r"(?<![\d-])(?:\+?82[- .]?\(?0?\)?|0)1[016-9][- .]?\d{3,4}[- .]?\d{4}(?![\d-])"
        r"|(?<![\d-])(?:\+?82[- .]?|0|\(0)(?:2|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70|50\d)(?:\)\s?|[- .]|\)-)\d{3,4}[- .]\d{4}"
        r"(?![\d-])"
        r"|(?<![\d.])\+[1-9]\d{0,2}(?:[ -]\(?\d{2,4}\)?){3,4}(?![\d-])"
        r"|\A\s*10[- .]?[2-9]\d{3}[- .]?\d{4}\s*\Z"  # a cell by itself, of which a spreadsheet has dropped the 0
    ),
    "HOSPITAL_NUMBER": (
        r"(?:병록|차트|환자|등록|진료|MRN|chart|patient ID)"
        rf"{_LABEL_END}(?P<hospital>[A-Za-z]?{_DASH}?\d{{5,12}})(?![\d-])"
    ),
}
"""Pattern of each kind; where it has a group of a name, the identifier is that group. Earlier kinds come first."""

KINDS = (*_PATTERNS, "IDENTIFIER")
"""Kinds of identifiers; the last is that of the user's patterns."""

_BEFORE_AT = re.compile(r"[\w.+%-]")
"""A character of the part of an e-mail address before the ``@``."""
_PARTS = re.compile(r"""["']text["']\s*:""")
"""What a printed list of the parts of a message has."""
_MAY_HOLD_ONE = re.compile(r"\d\D{0,3}\d|@")
"""What every text with an identifier of ``_PATTERNS`` has."""


@dataclass(frozen=True)
class Identifier:
    """Locates an identifier in a text, with its kind; never holds the identifier itself."""

    kind: str
    start: int
    end: int


class IdentifierFinder:
    """Finds identifiers of all kinds, and of the user's own patterns."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._own = [re.compile(pattern) for pattern in patterns]
        self._kinds = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _PATTERNS.items()}

    def find(self, text: str) -> list[Identifier]:
        """Return the identifiers in a text in their order; none overlap."""
        patterns = [("IDENTIFIER", pattern) for pattern in self._own]
        if _MAY_HOLD_ONE.search(text):
            patterns += self._kinds.items()
        kept: list[Identifier] = []
        for kind, pattern in patterns:  # in order of kinds: the first that takes a place has it
            starts = [one.start for one in kept]
            found = list[Identifier]()
            for start, end in _spans(kind, pattern, text):
                before = bisect_left(starts, end) - 1
                if before < 0 or kept[before].end <= start:
                    found.append(Identifier(kind, start, end))
            kept = sorted(kept + found, key=lambda one: (one.start, one.end))
        return kept

    def mask(self, text: str) -> str:
        """Replace each identifier in a text by its kind in brackets, as ``[PHONE]``."""
        for identifier in reversed(self.find(text)):
            text = f"{text[: identifier.start]}[{identifier.kind}]{text[identifier.end :]}"
        return text

    def hide(self, value: str | None) -> str | None:
        """Return a value that rows are divided by; one with an identifier is masked, with a digest (see ``shown``)."""
        return f"{self.mask(value)}\0{digest(value)}" if value is not None and self.find(value) else value

    def count(self, values: Any) -> Counter[str]:
        """Count the identifiers in all texts and whole numbers of a row's values by kind."""
        found: Counter[str] = Counter()
        if isinstance(values, Mapping | list | tuple):
            items, across = (values.values(), []) if isinstance(values, Mapping) else self.part(values)
            for value in items:
                found.update(self.count(value))
            return found + Counter(identifier.kind for identifier in across)
        for text in texts_of(values):
            printed = printed_value(text)
            inside = Counter() if printed is None else self.count(printed)
            found += inside or Counter(identifier.kind for identifier in self.find(unicodedata.normalize("NFC", text)))
        return found

    def mask_values(self, values: Any) -> Any:
        """Return a row's values with the identifiers in them masked; keys and values without one stay as they are."""
        if isinstance(values, Mapping):
            return {key: self.mask_values(value) for key, value in values.items()}
        if isinstance(values, list | tuple):
            return [self.mask_values(value) for value in self.part(values, masked=True)[0]]
        return self._mask_text(str(values)) if _is_text(values) and self.count(values) else values

    def part(self, values: Sequence[Any], masked: bool = False) -> tuple[Sequence[Any], list[Identifier]]:
        """Return a list without the identifiers that lie across its items, and these; see ``_texts_of_parts``.

        Their places are those in the joined text. Other text keeps its place, unless they are to be ``masked``: then
        the kind stands in the item where an identifier begins.
        """
        texts = _texts_of_parts(values)
        if texts is None:
            return values, []
        ends = list(accumulate(map(len, texts)))
        begins = [0, *ends]
        items = [(one, bisect_right(ends, one.start), bisect_left(ends, one.end)) for one in self.find("".join(texts))]
        across = [one for one, first, last in items if first < last]
        for one, first, last in reversed(items):
            for at in range(first, last + 1) if first < last else ():
                start, end = max(one.start - begins[at], 0), min(one.end, ends[at]) - begins[at]
                if start < end:
                    kind = f"[{one.kind}]" if at == first else ""
                    texts[at] = texts[at][:start] + (kind if masked else "\0" * (end - start)) + texts[at][end:]
        return (
            [{**value, "text": text} for value, text in zip(values, texts, strict=True)] if across else values
        ), across

    def _mask_text(self, text: str) -> str:
        """Mask a text that has identifiers, also where a printed list or JSON in it has them behind escapes."""
        masked = self.mask(unicodedata.normalize("NFC", text))
        printed = printed_value(text)
        if printed is None or not self.count(printed):
            return masked
        again = printed_value(masked)
        if again is not None and not self.count(again):
            return masked
        return json.dumps(self.mask_values(printed), ensure_ascii=False)


def shown(value: str) -> str:
    """Return what ``hide`` gave as messages show it."""
    return value.partition("\0")[0]


def digest(text: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def texts_of(values: Any) -> Iterator[str]:
    """Yield all texts and whole numbers in a row's values, as text."""
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, list | tuple):
        if _is_text(values):
            yield str(values)
        return
    for value in values:
        yield from texts_of(value)


def printed_value(text: str) -> Any:
    """Return the list or object that a text is the printed form of, if it has escapes or parts; None if it is none.

    Behind an escape a pattern finds nothing: the n of a line break stands right before a number, and a word in Unicode
    escapes is no word. Between parts (``{'text': …}``) is what an identifier across them does not have.
    """
    if text.lstrip()[:1] not in ("[", "{", "(", '"', "a") or ("\\" not in text and not _PARTS.search(text)):
        return None
    try:
        value = parse_printed_list(text)
    except PrintedListError:
        return None
    return value if isinstance(value, Mapping | list) else None


def _texts_of_parts(values: Sequence[Any]) -> list[str] | None:
    """Return the texts of a message's content in parts, which are read as one text; None for other lists.

    A part has a type, or a text alone; options with labels are lists of texts too, and each is one of its own.
    """
    if len(values) < 2 or not all(
        isinstance(value, Mapping) and isinstance(value.get("text"), str) and ("type" in value or len(value) == 1)
        for value in values
    ):
        return None
    return [unicodedata.normalize("NFC", value["text"]) for value in values]


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _spans(kind: str, pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield where the identifiers of a kind are, in their order; none overlap."""
    last = 0
    for match in pattern.finditer(text):
        start, end = _span(match)
        if kind == "EMAIL":
            start = _start_of_email(text, start, last)
            if start == match.start():  # what stands before it belongs to the address before it
                continue
            last = end
        if _is_meant(kind, match[0]):
            yield start, end


def _start_of_email(text: str, at: int, first: int) -> int:
    """Return where the address with its ``@`` at a place begins, from ``first`` on.

    A pattern that begins with this part would be tried at each letter of a long word, up to its end.
    """
    start = at
    while start > first and _BEFORE_AT.match(text, start - 1):
        start -= 1
    return start


def _span(match: re.Match[str]) -> tuple[int, int]:
    """Return where the identifier is: the named group that took part in the match, else all of it."""
    named = [name for name, value in match.groupdict().items() if value is not None]
    return match.span(named[0]) if named else match.span()


def _is_meant(kind: str, text: str) -> bool:
    """Return whether what a pattern matched is an identifier: of card numbers, whether their check digit is right."""
    if kind != "CARD":
        return True
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [digit if at % 2 == 0 else sum(divmod(2 * digit, 10)) for at, digit in enumerate(reversed(digits))]
    return digits[0] in (2, 3, 4, 5, 6, 9) and sum(doubled) % 10 == 0
