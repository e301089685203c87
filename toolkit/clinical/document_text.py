"""Sentences of a grounded document and what each of them cites.

A sentence cites passages as ``[P:SOP-AE-2/4.1]`` and fields of the case record as ``[NOTE]`` or ``[AE.AESTDTC]``; of
several records ``[AE2.AESTDTC]`` is the second. Citations stand before the sentence's full stop or right after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PASSAGE = re.compile(r"\[P:([^\]\s]+)\]")
FIELD = re.compile(r"\[([A-Z][A-Z_]*)(\d*)(?:\.([A-Z][A-Z0-9_]*))?\]")
CITATION = re.compile(rf"{PASSAGE.pattern}|{FIELD.pattern}")
_END = re.compile(r"(?<=[.!?。])((?:\s*\[[^\]\n]+\])*)\s+(?=\S)")
_LIST_MARK = re.compile(r"^(?:\(\d{1,2}\)|\d{1,2}[.)])\s+(?!\d{1,2}\.)")
_NO_END = re.compile(r"^\d+\.$|(?<!\d)\d{4}\.\s?\d{1,2}\.(?:\s?\d{1,2}\.)?$|(?:^|\s)(?:No|Dr|vs|e\.g|i\.e)\.$")
"""A full stop that ends no sentence: of a list, of a date such as 2026. 3. 5., of an abbreviation."""
_YEAR, _MONTH = re.compile(r"(?<!\d)\d{4}\.$"), re.compile(r"\d{1,2}\.")
"""A full stop after a year of such a date, and what follows it."""
_QUOTE_OVER_LINES = re.compile(r"“[^”\n]*\n[^”\n]+”")


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document."""

    number: int
    """From 1."""
    text: str
    """As it is written, with its citations."""
    is_heading: bool = False

    @property
    def bare(self) -> str:
        """The text without citations and marks of a list or heading."""
        return _LIST_MARK.sub("", re.sub(r"\s+", " ", CITATION.sub("", self.text)).strip(" #*-"))

    @property
    def passages(self) -> list[str]:
        """Ids of the passages that it cites, each once."""
        return list(dict.fromkeys(PASSAGE.findall(self.text)))

    @property
    def fields(self) -> list[str]:
        """Fields that it cites, each once, as they are written: ``AE2.AESTDTC``."""
        return list(dict.fromkeys(found[0][1:-1] for found in FIELD.finditer(self.text)))


def sentences(document: str) -> list[Sentence]:
    """Return the sentences of a document, in order; a line that begins with # is a heading."""
    found: list[tuple[str, bool]] = []
    for line in _QUOTE_OVER_LINES.sub(lambda quote: quote[0].replace("\n", " "), document).splitlines():
        line = line.strip()
        if line.startswith("#"):
            found.append((line, True))
        elif line:
            found += [(part, False) for part in _divided(line)]
    return [Sentence(number, text, heading) for number, (text, heading) in enumerate(found, start=1)]


def _divided(line: str) -> list[str]:
    parts, start = [], 0
    for end in _END.finditer(line):
        before = line[start : end.start()]
        is_year = _YEAR.search(before) and _MONTH.match(line, end.end())
        if not is_year and not _NO_END.search(before):
            parts.append(line[start : end.end(1)].strip())
            start = end.end()
    return [*parts, line[start:].strip()]


def citations(document: str) -> set[str]:
    """Return all that a document cites: ``P:`` and the id of a passage, or a field."""
    return {found[0][1:-1] for found in CITATION.finditer(document)}


def field_value(record: Mapping[str, Any], name: str) -> Any:
    """Return the value of a cited field such as ``NOTE``, ``AE.AESTDTC`` or ``AE2.AESTDTC``; None if there is none.

    Of several records without a number it is a list of their values.
    """
    match = FIELD.fullmatch(f"[{name}]")
    if match is None:
        return None
    column, number, key = match.groups()
    value = record.get(column + number) if key is None and column + number in record else record.get(column)
    if number and column + number not in record:
        value = value[int(number) - 1] if isinstance(value, Sequence) and 0 < int(number) <= len(value) else None
    if key is None:
        return value if value not in ("", [], {}) else None
    if isinstance(value, Mapping):
        return value.get(key) or None
    if isinstance(value, Sequence) and not isinstance(value, str):
        found = [one.get(key) for one in value if isinstance(one, Mapping) and one.get(key)]
        return found or None
    return None
