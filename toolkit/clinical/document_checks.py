"""Check a grounded document against its passages and its case record; each finding names its sentence and rule.

    citation    a cited passage is one of those that the row brings
    field       a cited field is in the case record, with a value
    in_force    the version of a cited passage is in force on the document's date (DOCUMENT_DATE, else NOTE_DATE)
    quote       what stands in quotation marks stands so, blanks aside, in a cited passage or the case record
    number, date, drug, code
                stand in a passage that the sentence cites or in the case record; a number with its unit
    deadline    a date by which something is due is a date of the case record and a span of a cited passage later
    subject     the only subject named is the row's
    uncited     a sentence with one of the above cites something

What the rules cannot see: whether a passage *implies* a sentence, a flipped *not*, a right number in a wrong place,
and names of drugs that are no known ones (``drug_names.yaml``). That is for a person.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.clinical.case_record import CaseRecord, texts_of
from toolkit.clinical.document_facts import (
    TIME,
    Date,
    Number,
    alike,
    codes_in,
    dates_in,
    drugs_in,
    is_same_kind,
    later,
    months_in,
    numbers_in,
    plain,
    quotes_in,
    spans_in,
    squeezed,
    whole_dates,
)  # fmt: skip
from toolkit.clinical.document_text import Sentence, citations, field_value, sentences
from toolkit.clinical.verification import Violation
from toolkit.retrieval.passages import Passage

_DUE = re.compile(r"까지|기한|마감|이내에?\s*제출|\bby\b|\bdue\b|\bdeadline\b|no later than|\bbefore\b", re.IGNORECASE)
_SINCE = re.compile(r"부터\s*$")
"""What makes 까지 the end of a period rather than a due date."""
_AFTER_DUE = re.compile(r"\s*(?:\([^)]*\))?\s*까지")
_BEFORE_DUE = re.compile(
    r"(?:기한|마감)(?:일)?[은이]?\s*$|(?:\bby|\bdue(?: on| by)?|\bdeadline(?: is| of)?|\bno later than)\s*$",
    re.IGNORECASE,
)


def check_answer(answer: str, row: Mapping[str, Any]) -> list[Violation]:
    """Return what a document breaks, sentence by sentence; see the module."""
    case = CaseRecord.of(row)
    if not answer.strip():
        return [Violation(None, "", "uncited", "", "expected a document")]
    return [
        Violation(None, f"sentence {sentence.number}", rule, value, message)
        for sentence in sentences(answer)
        for rule, value, message in _broken(sentence, case)
    ]


def _broken(sentence: Sentence, case: CaseRecord) -> Iterator[tuple[str, str, str]]:
    """Yield rule, value and message of each fault of a sentence."""
    yield from _subject(sentence, case)
    if sentence.is_heading:
        return
    cited = [case.passages[name] for name in sentence.passages if name in case.passages]
    yield from _citations(sentence, case)
    facts = _Facts(sentence.bare)
    if not facts.any:
        return
    if not sentence.passages and not sentence.fields:
        yield "uncited", sentence.bare[:80], "expected a citation after a sentence with facts, as [P:ID] or [FIELD]"
    yield from facts.unsupported(case, cited)
    yield from _deadlines(sentence, facts, case, cited)


def _subject(sentence: Sentence, case: CaseRecord) -> Iterator[tuple[str, str, str]]:
    subject = str(case.values.get("USUBJID") or "")
    prefix, _, number = subject.rpartition("-")
    if not prefix or not number:
        return
    like = [rf"{re.escape(prefix)}-[A-Za-z0-9]+"]
    if "-" in prefix:  # another study's; A-1 has the shape of other codes
        like.append(re.sub(r"\d", r"\\d", re.sub(r"[A-Za-z]+", "[A-Za-z]+", re.escape(subject))))
    for found in re.findall(rf"(?<![\w-])(?:{'|'.join(like)})(?!\d)", sentence.text):
        if found != subject:
            yield "subject", found, f"expected {subject}, the row's subject"


def _citations(sentence: Sentence, case: CaseRecord) -> Iterator[tuple[str, str, str]]:
    for name in sentence.passages:
        passage = case.passages.get(name)
        if passage is None:
            yield "citation", name, f"expected one of {', '.join(case.passages) or 'no passages'}"
        elif case.day is not None and not passage.in_force(case.day.isoformat()):
            version = f"{passage.since} ~ {passage.until}"
            yield "in_force", name, f"expected a version in force on {case.day}; this one is of {version}"
    for name in sentence.fields:
        if field_value(case.values, name) is None:
            yield "field", name, f"expected a field with a value, of {', '.join(case.values)}"


class _Facts:
    """Holds what of a sentence can be compared."""

    def __init__(self, text: str) -> None:
        self.text = text = plain(text)
        self.quotes, self.drugs, self.codes = quotes_in(text), drugs_in(text), codes_in(text)
        self.dates, self.months, self.numbers = dates_in(text)[0], months_in(text), numbers_in(text)

    @property
    def any(self) -> bool:
        """Return whether there is something to compare."""
        return bool(self.quotes or self.drugs or self.codes or self.dates or self.months or self.numbers)

    def unsupported(self, case: CaseRecord, cited: Sequence[Passage]) -> Iterator[tuple[str, str, str]]:
        """Yield the facts that stand in neither the cited passages nor the case record; dates that may be due later."""
        of_passages = "\n".join(f"{passage.place}\n{passage.text}" for passage in cited)
        texts = "\n".join(passage.text for passage in cited)
        sources = f"{case.text}\n{of_passages}"
        where = "in a cited passage or the case record"
        for quote in self.quotes:
            if squeezed(quote) not in squeezed(sources):
                yield "quote", quote[:80], f"expected the same words {where}"
        for written in self._numbers(sources, numbers_in(f"{case.text}\n{texts}", ones=True)):
            yield "number", written, f"expected it {where}"
        for name, written in self.drugs.items():
            if name not in drugs_in(sources) and squeezed(written) not in squeezed(sources):
                yield "drug", written, f"expected it {where}"
        for code in sorted(self.codes - codes_in(sources)):
            if code not in sources:
                yield "code", code, f"expected it {where}"
        months = {(day.year, day.month) for day in case.dates} | months_in(sources).keys() | case.months
        for month, written in self.months.items():
            if month not in months:
                yield "date", written, f"expected it {where}"
        known_dates = case.dates | whole_dates(of_passages)
        due = {day for base in case.dates for day in _due_days(base, cited)}
        for date in self.dates:
            if not date.is_one_of(known_dates) and not date.is_one_of(due):
                yield (
                    "date",
                    date.written,
                    f"expected it {where}, or a span of a cited passage after a date of the case",
                )

    def _numbers(self, sources: str, texts: Sequence[Number]) -> Iterator[str]:
        """Yield the numbers that are not in the sources; one with a unit must be in their texts, headings aside.

        Notes leave units out: 38.6 may be 38.6 ℃, but not where the sources have it with another unit of temperature,
        and no span of time.
        """
        values = {value for value, _, _ in numbers_in(sources, ones=True)}
        units = {one for value, unit, _ in texts for one in alike(value, unit)}
        for value, unit, written in self.numbers:
            is_bare = (value, "") in units and unit not in TIME
            is_other = any(one == value and is_same_kind(unit, other) for one, other in units)
            if (value, unit) not in units and (value not in values if not unit else not is_bare or is_other):
                yield written


def _deadlines(
    sentence: Sentence, facts: _Facts, case: CaseRecord, cited: Sequence[Passage]
) -> Iterator[tuple[str, str, str]]:
    """Yield the due dates that are none which the cited passages give; from the dates of cited fields if there are."""
    if not _DUE.search(facts.text) or not any(spans_in(passage.text) for passage in cited):
        return
    values = [field_value(case.values, name) for name in sentence.fields]
    bases = {day for text in texts_of(values) for day in whole_dates(text)} or case.dates
    due = {day for base in bases for day in _due_days(base, cited)}
    stated = [date for date in facts.dates if _is_due(facts.text, date)]
    for date in stated:
        if not date.is_one_of(due):
            shown = ", ".join(sorted(map(str, due))[:6])
            yield "deadline", date.written, f"expected one of {shown}, by the spans of {', '.join(sentence.passages)}"


def _is_due(text: str, date: Date) -> bool:
    """Return whether a date stands beside a word that makes it a due date."""
    at = text.find(date.written)
    before, after = text[:at], text[at + len(date.written) :]
    ends_period = _SINCE.search(before) is not None
    return bool((_AFTER_DUE.match(after) and not ends_period) or _BEFORE_DUE.search(before))


def _due_days(base: datetime.date, cited: Sequence[Passage]) -> Iterator[datetime.date]:
    for passage in cited:
        for number, unit in spans_in(passage.text):
            yield later(base, number, unit)


def unverified(answer: str, row: Mapping[str, Any]) -> dict[int, list[str]]:
    """Return what is to be said of each sentence that is not verified, by number: faults, or that it cites nothing."""
    said: dict[int, list[str]] = {}
    for violation in check_answer(answer, row):
        number = int(violation.field.removeprefix("sentence ") or 0)
        said.setdefault(number, []).append(f"{violation.rule}: {violation.value}")
    for sentence in sentences(answer):
        if not sentence.is_heading and not sentence.passages and not sentence.fields:
            said.setdefault(sentence.number, []).append("uncited")
    return {number: list(dict.fromkeys(texts)) for number, texts in said.items()}


@dataclass(frozen=True)
class CitationScore:
    """Citations of documents beside those of their references, over all documents."""

    cited: int
    """Citations of the documents; of one document each counts once."""
    expected: int
    """Citations of the references."""
    right: int
    """Citations that both have."""

    @property
    def precision(self) -> float:
        """Share of the citations that the references have; NaN without any."""
        return self.right / self.cited if self.cited else float("nan")

    @property
    def recall(self) -> float:
        """Share of the references' citations that the documents have; NaN without any."""
        return self.right / self.expected if self.expected else float("nan")


def score_citations(answers: Sequence[str], references: Sequence[str]) -> CitationScore:
    """Compare what documents cite with what their references cite, whatever their words."""
    pairs = [(citations(answer), citations(other)) for answer, other in zip(answers, references, strict=True)]
    return CitationScore(
        sum(len(ours) for ours, _ in pairs), sum(len(theirs) for _, theirs in pairs),
        sum(len(ours & theirs) for ours, theirs in pairs),
    )  # fmt: skip
