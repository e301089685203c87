"""Write a grounded document as Markdown or .docx: sources numbered, unverified sentences marked, use for research."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.clinical import RESEARCH_USE
from toolkit.clinical.case_record import CaseRecord
from toolkit.clinical.document_checks import unverified
from toolkit.clinical.document_text import CITATION, Sentence, field_value, sentences
from toolkit.runtime.errors import UsageError
from toolkit.runtime.printable import printable

_WORDS = {
    "ko": {
        "sources": "근거", "case": "증례 기록", "unverified": "확인되지 않음", "absent": "주어지지 않은 근거",
        "open": "기계로 확인하지 않은 것: 근거가 문장을 뒷받침하는지(함의), 부정이 뒤집혔는지, "
        "알려지지 않은 약 이름. 사람이 읽어야 합니다.",
    },
    "en": {
        "sources": "Sources", "case": "case record", "unverified": "not verified",
        "absent": "not among the passages given",
        "open": "Not checked by machine: whether a source implies its sentence, a flipped negation, unknown names of "
        "drugs. A person has to read it.",
    },
}  # fmt: skip
MISSING_DOCX = 'a .docx needs python-docx: pip install python-docx (pip install -e ".[corpus]")'
_MOST_SHOWN = 200
Section = tuple[str, Sequence[str]]
"""A heading, and the items of the list below it."""


@dataclass(frozen=True)
class _Part:
    """A sentence as it is shown."""

    text: str
    heading: int
    """Level of a heading, from 1; 0 for a sentence."""
    faults: str
    """What is not verified; empty if all is."""


@dataclass(frozen=True)
class GroundedDocument:
    """A document beside its row, ready to be written."""

    parts: tuple[_Part, ...]
    sources: tuple[str, ...]
    """What each number in the text stands for, from 1."""
    words: Mapping[str, str]
    research: str

    @classmethod
    def of(cls, answer: str, row: Mapping[str, Any]) -> GroundedDocument:
        """Number the citations of an answer in the order of their first use, and check its sentences."""
        language = "en" if row.get("LANGUAGE") == "en" else "ko"
        words, case, said = _WORDS[language], CaseRecord.of(row), unverified(answer, row)
        numbers: dict[str, int] = {}

        def number(match: Any) -> str:
            return f"[{numbers.setdefault(match[0][1:-1], len(numbers) + 1)}]"

        parts = []
        for sentence in sentences(answer):
            shown = CITATION.sub(number, sentence.text)
            parts.append(
                _Part(_shown(shown.lstrip("# ")), _level(sentence), _shown("; ".join(said.get(sentence.number, []))))
            )
        sources = tuple(_shown(_source(name, case, words)) for name in numbers)
        return cls(tuple(parts), sources, words, RESEARCH_USE[language])

    def markdown(self, before: Sequence[Section] = ()) -> str:
        """Return it as Markdown, after other sections; what stands in it for marks of Markdown is the answer's own."""
        lines = [f"> {self.research}", ""]
        for heading, items in before:
            lines += [
                f"## {heading}",
                "",
                *("- " + _shown(item).replace("\n", "\n  ") for item in items),
                *([""] if items else []),
            ]
        for part in self.parts:
            mark = f" **⚠ {self.words['unverified']}: {part.faults}**" if part.faults else ""
            lines += [("#" * part.heading + " " if part.heading else "") + part.text + mark, ""]
        lines += [f"## {self.words['sources']}", ""]
        lines += [f"{number}. {source}" for number, source in enumerate(self.sources, start=1)]
        return "\n".join([*lines, "", f"> {self.words['open']}", ""])

    def docx(self, before: Sequence[Section] = ()) -> bytes:
        """Return it as the content of a .docx file, after other sections; unverified sentences are highlighted.

        Raises:
            UsageError: python-docx is not installed.
        """
        try:
            from docx import Document
            from docx.enum.text import WD_COLOR_INDEX
        except ImportError:
            raise UsageError(MISSING_DOCX) from None
        document = Document()
        document.add_paragraph().add_run(self.research).italic = True
        for heading, items in before:
            document.add_heading(heading, 2)
            for item in items:
                document.add_paragraph(_shown(item), "List Bullet")
        for part in self.parts:
            if part.heading:
                document.add_heading(part.text, part.heading)
                continue
            paragraph = document.add_paragraph()
            run = paragraph.add_run(part.text)
            if part.faults:
                run.font.highlight_color = WD_COLOR_INDEX.YELLOW
                paragraph.add_run(f" ⚠ {self.words['unverified']}: {part.faults}").bold = True
        document.add_heading(self.words["sources"], 2)
        for number, source in enumerate(self.sources, start=1):
            document.add_paragraph(f"[{number}] {source}")
        document.add_paragraph().add_run(self.words["open"]).italic = True
        content = io.BytesIO()
        document.save(content)
        return content.getvalue()


def _shown(text: str) -> str:
    """Return a text without what XML cannot hold."""
    return printable(text).translate({0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD})


def _level(sentence: Sentence) -> int:
    marks = len(sentence.text) - len(sentence.text.lstrip("#"))
    return min(marks, 6) if sentence.is_heading else 0


def _source(name: str, case: CaseRecord, words: Mapping[str, str]) -> str:
    """Return what a citation stands for: place and version of a passage with its beginning, or a field's value."""
    if name.startswith("P:"):
        passage = case.passages.get(name[2:])
        if passage is None:
            return f"{name}: {words['absent']}"
        version = f" ({passage.since} ~ {passage.until})".replace(" )", ")") if passage.since else ""
        return f"{name}: {passage.place}{version}: {_short(passage.text)}"
    value = field_value(case.values, name)
    return f"{words['case']} {name}: {words['absent'] if value is None else _short(str(value))}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + " …"
