"""Cut a document by its own structure: 조, 항 and where they are long 호 of Korean rules, headings, paragraphs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from toolkit.retrieval.readers import DocumentLine

MOST_CHARACTERS = 600
"""A 항 or section that is longer is cut at its 호 or paragraphs, where it has such."""

_PART = re.compile(r"제\s*\d+\s*(?:편|장|절|관)(?=\s|\(|$)")
_ARTICLE = re.compile(r"제\s*(\d+)\s*조(?:\s*의\s*(\d+))?\s*(\([^()]*(?:\([^()]*\)[^()]*)*\))?(?=\s*$|\s+\S|(?<=\)).)")
"""An article's head; what follows a number without a title must be apart, or it is a reference such as 제4조에."""
_REFERENCE = re.compile(r"제\s*\d+\s*조(?:\s*의\s*\d+)?\s+(?![①-⑳삭(]|$)")
"""The beginning of a wrapped line such as 제4조 및 제5조에."""
_ANNEX = re.compile(
    r"(?:■.*)?[\[<(【]?\s*(별표|별지)\s*(?:제\s*)?(\d*)(?:\s*호)?(?:\s*의\s*(\d+))?\s*(?:호|서식)*\s*[\]>)】]?(?=\s|$)"
)
_SUPPLEMENT = re.compile(r"부\s*칙(?=\s|$|[<(\[])")
_CLAUSE = re.compile("[①-⑳]")
_ITEM = re.compile(r"(\d+)(?:의\s*(\d+))?\.\s+")
_NUMBERED = re.compile(r"(\d+(?:\.\d+)*)\.?\s+\S")
"""A heading that has its own number: ``4.1 Immediate reporting``."""


@dataclass
class Unit:
    """A part of a document before it has an id."""

    key: str
    """Place in short: ``4.1`` is 제4조제1항, ``4-2`` 제4조의2, ``별표4``; unique within a document."""
    place: str
    """Place for a reader."""
    page: int | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The lines as one text, without blanks at its ends."""
        return "\n".join(self.lines).strip()


def cut(lines: Sequence[DocumentLine]) -> list[Unit]:
    """Return the parts of a document that hold text, in order, each with a key of its own."""
    parts = [part for unit in _Cutter().units(lines) if unit.text for part in _shorter(unit)]
    seen: dict[str, int] = {}
    for part in parts:
        seen[part.key] = seen.get(part.key, 0) + 1
        if seen[part.key] > 1:
            part.key += f":{seen[part.key]}"
    return parts


class _Cutter:
    """Goes through the lines, and begins a unit at each head."""

    def __init__(self) -> None:
        self._headings: dict[int, str] = {}
        """Text of the headings that a line stands under, by level."""
        self._number = 0
        self._before = ""
        """What precedes the keys of articles: an annex or the supplement that holds them."""
        self._article, self._title = "", ""

    def units(self, lines: Sequence[DocumentLine]) -> list[Unit]:
        """Return a unit for each head, with the lines up to the next."""
        units = [Unit("0", "")]
        for line in lines:
            unit, rest = self._head(line)
            if unit is None and line.page and rest and not self._article and units[-1].page != line.page:
                unit = Unit(f"p{line.page}", self._place(f"p. {line.page}"), line.page)  # a PDF has no headings
            if unit is not None:
                units.append(unit)
            if rest and self._article and (clause := _CLAUSE.match(rest)):
                if unit is None or units[-1].lines:
                    units.append(self._clause(clause[0], line))
                else:
                    units[-1] = self._clause(clause[0], line)
            if rest or units[-1].lines:
                units[-1].lines.append(rest)
        return units

    def _head(self, line: DocumentLine) -> tuple[Unit | None, str]:
        """Return the unit that a line begins, if it begins one, and what of the line is text."""
        text = line.text.strip()
        if annex := _ANNEX.match(text):
            number = annex[2] + (f"-{annex[3]}" if annex[3] else "")
            self._before, self._article, self._headings = f"{annex[1]}{number}", "", {}
            return Unit(self._before, text, line.page), ""
        if _SUPPLEMENT.match(text):
            self._before, self._article, self._headings = "부칙", "", {}
            return Unit("부칙", text, line.page), ""
        if (article := _ARTICLE.match(text)) and not _REFERENCE.match(text):
            number = article[1] + (f"-{article[2]}" if article[2] else "")
            self._article = f"{self._before}/{number}" if self._before else number
            self._title = f"제{article[1]}조" + (f"의{article[2]}" if article[2] else "") + (article[3] or "")
            return Unit(self._article, self._place(self._title), line.page), text[article.end() :].strip()
        if part := _PART.match(text):
            self._article = ""
            self._set_heading(line.heading or 1 + "편장절관".index(part[0][-1]), text)
            return None, ""
        if line.heading:
            self._article, self._number = "", self._number + 1
            self._set_heading(line.heading, text)
            numbered = _NUMBERED.match(text)
            return Unit(numbered[1] if numbered else f"s{self._number}", self._place(""), line.page), ""
        return None, text

    def _set_heading(self, level: int, text: str) -> None:
        self._headings = {known: title for known, title in self._headings.items() if known < level} | {level: text}

    def _place(self, article: str) -> str:
        return " ".join(part for part in (*self._headings.values(), self._before, article) if part)

    def _clause(self, mark: str, line: DocumentLine) -> Unit:
        number = ord(mark) - ord("①") + 1
        return Unit(f"{self._article}.{number}", f"{self._place(self._title)} 제{number}항", line.page)


def _shorter(unit: Unit) -> Iterator[Unit]:
    """Yield a unit, or where it is long its 호, each after the words that lead to them, or else its paragraphs."""
    if len(unit.text) <= MOST_CHARACTERS:
        yield unit
        return
    starts = [at for at, line in enumerate(unit.lines) if _ITEM.match(line)]
    if len(starts) > 1:
        lead = [line for line in unit.lines[: starts[0]] if line]
        for start, end in zip(starts, [*starts[1:], len(unit.lines)], strict=True):
            match = _ITEM.match(unit.lines[start])
            assert match is not None
            number, of = match[1], f"의{match[2]}" if match[2] else ""
            key = f"{unit.key}.{number}" + (f"-{match[2]}" if of else "")
            yield Unit(key, f"{unit.place} 제{number}호{of}", unit.page, [*lead, *unit.lines[start:end]])
        return
    yield from _paragraphs(unit)


def _paragraphs(unit: Unit) -> Iterator[Unit]:
    """Yield the paragraphs of a unit, as many together as are no longer than ``MOST_CHARACTERS``."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", unit.text):
        if held and sum(map(len, held)) + len(paragraph) > MOST_CHARACTERS:
            yield Unit(unit.key, unit.place, unit.page, ["\n\n".join(held)])
            held = []
        held.append(paragraph)
    yield Unit(unit.key, unit.place, unit.page, ["\n\n".join(held)])
