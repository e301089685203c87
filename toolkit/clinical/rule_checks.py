"""Checks of records that need more than one record: the note, its row, the dictionary, or the other records."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from toolkit.clinical.context import Context, Record, value
from toolkit.clinical.dates import PartialDate, parse_partial
from toolkit.clinical.durations import starts_of_durations
from toolkit.clinical.records import DICTIONARY_VERSION
from toolkit.clinical.relative_dates import find_dates
from toolkit.clinical.terms import Term

Places = list[tuple[int, str]]
"""Number of a record and the field that is wrong there."""

_DATES = ("AESTDTC", "AEENDTC")
_KOREAN_NEGATION = re.compile(
    r"(?:\s?(?:/|·|및|와|과|이나|나|하고)\s?[가-힣A-Za-z]{1,8}?){0,2}"
    r"(?:\s?(?:증상|소견|징후|호소|발생|반응|병력|여부))?(?:은|는|이|가|을|를|도|의)?\s?"
    r"(?:전혀\s?)?(?:없|안\s?(?:함|했|하|했음|보|생|나)|아니|부인|음성|\(-\)|\(−\)|[:=]?\s?(?:-|−|neg\b|N\b))"
)
_ENGLISH_NEGATION = re.compile(
    r"(?:\bno|\bnot|\bwithout|\bnegative for|\bno (?:signs?|evidence|history) of)(?: any| new| further| more)?"
    r"\s(?:[a-z -]{1,24}(?: or| nor|/)\s?){0,3}$"
    r"|(?:\bdenie[sd]|\bdenying|\bno complaints of)(?: any| new)?\s(?:[a-z -]{1,24}(?:,| or| nor| and|/)\s?){0,4}$",
    re.IGNORECASE,
)
_STUDY_DAY = re.compile(r"\bC\d+\s?D(?!1\b)\d+|\bD\s?\+?\s?(?!1\b)\d+\b|\bday\s?(?!1\b)\d+|\d+\s?일차", re.IGNORECASE)
"""Days of the study, whose dates a note alone does not tell."""


def unique_sequence(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the records whose AESEQ another of their subject has before them."""
    return _repeated(records, contexts, ("AESEQ",), "AESEQ")


def positive_sequence(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the records whose AESEQ is no number from 1."""
    return [
        (at, "AESEQ")
        for at, record in enumerate(records)
        if (number := value(record, "AESEQ")) and not (number.isdecimal() and int(number) > 0)
    ]


def no_duplicate(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the records that have term, start and end of one before them, of one subject."""
    return _repeated(records, contexts, ("AETERM", "AESTDTC", "AEENDTC"), "AETERM")


def same_subject(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the records whose study or subject is another than that of the note's row."""
    return [
        (at, name)
        for at, (record, context) in enumerate(zip(records, contexts, strict=True))
        for name in ("STUDYID", "USUBJID")
        if value(record, name) and context.row.get(name) and value(record, name) != str(context.row[name])
    ]


def verbatim(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the records whose AETERM does not stand in the note, blanks and Unicode forms aside."""
    return [
        (at, "AETERM")
        for at, record, note in _with_note(records, contexts)
        if _plain(value(record, "AETERM")) not in _plain(note)
    ]


def not_negated(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the records whose AETERM the note negates wherever it stands.

    A negation is seen right after a Korean term (없음, 부인 …) or right before an English one (no, denies, without …);
    one farther away is not seen.
    """
    return [
        (at, "AETERM")
        for at, record, note in _with_note(records, contexts)
        if (found := _places(_plain(note), _plain(value(record, "AETERM"))))
        and all(_is_negated(_plain(note), *place) for place in found)
    ]


def not_after_note(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the dates that lie after that of the note."""
    return [
        (at, name)
        for at, (record, context) in enumerate(zip(records, contexts, strict=True))
        for name in _DATES
        if context.note_date and (own := _date(value(record, name))) is not None
        and own.is_after(parse_partial(context.note_date[:10]))
    ]  # fmt: skip


def date_in_note(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the dates that are neither in the note nor follow from it: from no date there, nor from the note's own.

    A date that is less complete than one of the note's counts as that one. So do both days on which something may have
    begun that lasts so many days. A note that names days of the study (C2D8) is not looked at.
    """
    found = []
    for at, (record, context) in enumerate(zip(records, contexts, strict=True)):
        if context.note is None or not context.note_date or _STUDY_DAY.search(context.note):
            continue
        mentions = find_dates(context.note, context.note_date)
        known = {context.note_date[:10], *(one for mention in mentions for one in (mention.value, mention.of_note))}
        known |= set(starts_of_durations(context.note, context.note_date))
        found += [(at, name) for name in _DATES if not _is_known(value(record, name).split("T")[0], known)]
    return found


def term_in_dictionary(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the terms that the dictionary does not have, or not any more."""
    return [(at, "AELLT") for at, record, term, _ in _coded(records, contexts)
            if value(record, "AELLT") and (term is None or not term.is_current)]  # fmt: skip


def term_code(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the codes of lowest level terms that are not those of their terms."""
    return [(at, "AELLTCD") for at, record, term, _ in _coded(records, contexts)
            if value(record, "AELLTCD") and (term is None or str(term.code) != value(record, "AELLTCD"))]  # fmt: skip


def preferred_term(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the preferred terms and their codes that do not follow from the lowest level term."""
    return _unlike(records, contexts, ("AEDECOD", "AEPTCD"))


def organ_class(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the system organ classes and their codes that are not the primary ones of the preferred term."""
    return _unlike(records, contexts, ("AEBODSYS", "AEBDSYCD", "AESOC", "AESOCCD"))


def dictionary_version(records: Sequence[Record], contexts: Sequence[Context]) -> Places:
    """Return the versions that are not the dictionary's."""
    return [(at, DICTIONARY_VERSION) for at, record, _, version in _coded(records, contexts)
            if value(record, DICTIONARY_VERSION) not in ("", version)]  # fmt: skip


CHECKS: dict[str, Callable[[Sequence[Record], Sequence[Context]], Places]] = {
    one.__name__: one
    for one in (
        unique_sequence, positive_sequence, no_duplicate, same_subject, verbatim, not_negated, not_after_note,
        date_in_note, term_in_dictionary, term_code, preferred_term, organ_class, dictionary_version,
    )
}  # fmt: skip
"""The checks by the name that ``rules.yaml`` gives them."""


def _repeated(
    records: Sequence[Record], contexts: Sequence[Context], names: Sequence[str], wrong: str
) -> Places:  # fmt: skip
    seen, found = set(), []
    for at, (record, context) in enumerate(zip(records, contexts, strict=True)):
        if not value(record, wrong):
            continue
        subject = [value(record, name) or str(context.row.get(name, "")) for name in ("STUDYID", "USUBJID")]
        key = (*subject, *(value(record, name) for name in names))
        if key in seen:
            found.append((at, wrong))
        seen.add(key)
    return found


def _unlike(records: Sequence[Record], contexts: Sequence[Context], names: Sequence[str]) -> Places:
    found = []
    for at, record, term, _ in _coded(records, contexts):
        if term is not None:
            expected = term.as_fields()
            found += [(at, name) for name in names if value(record, name) not in ("", str(expected[name]))]
    return found


def _coded(records: Sequence[Record], contexts: Sequence[Context]) -> Iterator[tuple[int, Record, Term | None, str]]:
    """Yield each record that a dictionary is known for, with the term of its AELLT, or else of its code."""
    for at, (record, context) in enumerate(zip(records, contexts, strict=True)):
        if context.dictionary is not None:
            name, code = value(record, "AELLT"), value(record, "AELLTCD")
            term = context.dictionary.find(name) if name else context.dictionary.of_code(code)
            yield at, record, term, context.dictionary.version


def _with_note(records: Sequence[Record], contexts: Sequence[Context]) -> Iterator[tuple[int, Record, str]]:
    for at, (record, context) in enumerate(zip(records, contexts, strict=True)):
        if context.note is not None and value(record, "AETERM"):
            yield at, record, context.note


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _places(note: str, term: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(re.escape(term), note)]


def _is_negated(note: str, start: int, end: int) -> bool:
    return bool(_KOREAN_NEGATION.match(note, end) or _ENGLISH_NEGATION.search(note[:start]))


def _date(text: str) -> PartialDate | None:
    try:
        return parse_partial(text)
    except ValueError:
        return None


def _is_known(text: str, known: set[str]) -> bool:
    """Return whether a date is one of those known, or less complete than one.

    So is what cannot be told: no date, which is another rule's matter, and one that lacks a part in its middle.
    """
    return _date(text) is None or "--" in text or any(one == text or one.startswith(f"{text}-") for one in known)
