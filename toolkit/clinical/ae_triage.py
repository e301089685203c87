"""Adverse event notes: check what a model says of seriousness, causality and expectedness, and compute what follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from toolkit.clinical import RESEARCH_USE
from toolkit.clinical.dates import PartialDate, parse_partial
from toolkit.clinical.reporting import clock_source, reporting_clock, site_questions
from toolkit.clinical.verification import Violation

FIELDS = {
    "event": None,
    "serious": ("Y", "N", "U"),
    "criteria": ("AESDTH", "AESLIFE", "AESHOSP", "AESDISAB", "AESCONG", "AESMIE"),
    "causality": ("RELATED", "NOT RELATED", "UNKNOWN"),
    "expectedness": ("EXPECTED", "UNEXPECTED", "UNKNOWN"),
    "listed": None,
    "onset": None,
    "outcome": (
        "RECOVERED/RESOLVED", "RECOVERING/RESOLVING", "NOT RECOVERED/NOT RESOLVED", "RECOVERED/RESOLVED WITH SEQUELAE",
        "FATAL", "UNKNOWN",
    ),
    "action": (
        "DOSE NOT CHANGED", "DOSE REDUCED", "DRUG INTERRUPTED", "DRUG WITHDRAWN", "NOT APPLICABLE", "UNKNOWN",
    ),
}  # fmt: skip
"""Fields of an answer with the values that each may have; None for free ones. Outcome and action are CDISC's terms."""


def complete(answer: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what follows from an answer: its fields, the reporting clock and the questions to the site.

    An answer that is no JSON object has no fields, and so asks for all of them.

    Args:
        answer: what the model gave.
        row: columns of the note: AWARE_DATE, REPORTED_DATE, REFERENCE, LANGUAGE.

    Raises:
        DataError: a date of the row is none.
    """
    fields = _fields(answer) or {}
    language = str(row.get("LANGUAGE") or "en")
    return {
        "FIELDS": fields,
        "CLOCK": {**reporting_clock(fields, row, language).as_dict(), "source": clock_source()},
        "QUESTIONS": [asdict(question) for question in site_questions(fields, row, language)],
        "NOTICE": RESEARCH_USE.get(language, RESEARCH_USE["en"]),
    }


def assessed(answer: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a note: the answer, what follows from it (``complete``), and what it breaks."""
    broken = [violation.as_dict() for violation in check_answer(answer, row)]
    return {"ANSWER": answer, **complete(answer, row), "VIOLATIONS": broken}


def check_answer(answer: str, row: Mapping[str, Any]) -> list[Violation]:
    """Return what an answer of the task ``ae_triage`` breaks, against its note and reference text.

    Rules AT01 to AT10 are of our own. Whether a reading of the note is right is not among them.
    """
    fields = _fields(answer)
    if fields is None:
        return [Violation(None, "", "AT01", answer[:60], "expected a JSON object")]
    found = [
        Violation(None, name, "AT02", str(fields.get(name)), f"expected one of {', '.join(allowed)}")
        for name, allowed in FIELDS.items()
        if allowed is not None and not _is_among(fields.get(name), allowed, several=name == "criteria")
    ]
    return [*found, *_against_itself(fields), *_against_sources(fields, row), *_of_dates(fields, row)]


def _against_itself(fields: Mapping[str, Any]) -> list[Violation]:
    """Return the fields that contradict each other."""
    criteria = fields.get("criteria") if isinstance(fields.get("criteria"), list) else []
    found = []
    if (fields.get("serious") == "Y") != bool(criteria):
        found.append(
            Violation(None, "serious", "AT03", str(fields.get("serious")), f"criteria are {criteria}: Y goes with one")
        )
    if (fields.get("outcome") == "FATAL") != ("AESDTH" in (criteria or ())):
        found.append(
            Violation(None, "outcome", "AT04", str(fields.get("outcome")), "FATAL goes with the criterion AESDTH")
        )
    return found


def _against_sources(fields: Mapping[str, Any], row: Mapping[str, Any]) -> list[Violation]:
    """Return what does not stand in the note or in the reference text."""
    note, reference = str(row.get("NOTE") or ""), str(row.get("REFERENCE") or "")
    event, listed, expected = fields.get("event"), fields.get("listed"), fields.get("expectedness")
    found = []
    if not isinstance(event, str) or not event.strip() or event not in note:
        found.append(Violation(None, "event", "AT05", str(event), "expected words of the note, as they stand there"))
    if not reference and expected != "UNKNOWN":
        found.append(Violation(None, "expectedness", "AT06", str(expected), "no reference text: expected UNKNOWN"))
    if listed is not None and (not isinstance(listed, str) or not listed or listed not in reference):
        found.append(Violation(None, "listed", "AT07", str(listed), "expected words of the reference text, or null"))
    if (expected == "EXPECTED") != (listed is not None):
        message = "EXPECTED goes with the listed term, and with no other value does one"
        found.append(Violation(None, "expectedness", "AT08", str(expected), message))
    return found


def _of_dates(fields: Mapping[str, Any], row: Mapping[str, Any]) -> list[Violation]:
    """Return what is wrong with the onset."""
    onset = fields.get("onset")
    if onset is None:
        return []
    begun = _date(onset)
    if begun is None:
        return [Violation(None, "onset", "AT09", str(onset), "expected a date as far as known, as 2026-03, or null")]
    columns = [(name, _date(row.get(name))) for name in ("NOTE_DATE", "AWARE_DATE")]
    return [
        Violation(None, "onset", "AT10", str(onset), f"expected no day after {name} {other}")
        for name, other in columns
        if other is not None and begun.is_after(other)
    ]


def _date(value: Any) -> PartialDate | None:
    """Return a date as far as it is known; None for what is none."""
    try:
        return parse_partial(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _is_among(value: Any, allowed: tuple[str, ...], several: bool) -> bool:
    if several:
        return isinstance(value, list) and all(one in allowed for one in value) and len(set(value)) == len(value)
    return value in allowed


def _fields(answer: str) -> dict[str, Any] | None:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
