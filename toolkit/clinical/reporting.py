"""Compute what follows from the fields of an adverse event: by when a sponsor reports it, and what to ask the site.

No model writes these: rules are data (``reporting.yaml``), days are counted by the calendar. Day 0 is that on which the
sponsor became aware, so that 7 days from 4 March end on 11 March. Weekends and holidays count and move nothing: a
later date that a law may allow is not taken. To be checked against the law in force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.config import yaml_text
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import read_regular

OWN_RULES = Path(__file__).with_name("reporting.yaml")
MISSING = (None, "", "UNKNOWN", "U")
"""Values of a field that nothing is known by."""
_EXCLUDING = (
    ("serious", "N", "not_serious"),
    ("causality", "NOT RELATED", "not_related"),
    ("expectedness", "EXPECTED", "expected"),
)
"""Fields that decide: each with the value of an event that is not reported, and the reason that says so."""


@dataclass(frozen=True)
class ReportingClock:
    """By when a sponsor reports an event."""

    days: int | None
    """Days of the period; None if the event is not reported in one of these."""
    is_provisional: bool
    """True if a field that decides is not known: the event is then counted as what would have to be reported."""
    reasons: tuple[str, ...]
    """What of the fields decided."""
    day_0: str | None = None
    """Day on which the sponsor became aware, ISO 8601; None if the row has none, and then no date follows."""
    due: str | None = None
    """Last day of the period."""
    follow_up_due: str | None = None
    """Last day for the details: from the first report if the row has its date, else as if it were made on ``due``."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {**asdict(self), "reasons": list(self.reasons)}


@dataclass(frozen=True)
class SiteQuestion:
    """A question to the site."""

    id: str
    field: str
    """The field that is missing; empty if the question follows from a value."""
    text: str


@cache
def _rules(path: Path = OWN_RULES) -> Mapping[str, Any]:
    values = yaml_text.load(read_regular(path, yaml_text.MOST_BYTES))
    assert isinstance(values, Mapping)
    return values


def clock_source() -> str:
    """Return where the periods come from, and that they are to be checked."""
    clock = _rules()["clock"]
    return f"{clock['source']}. Looked up on {clock['checked']}; check it against the law in force."


def reporting_clock(fields: Mapping[str, Any], row: Mapping[str, Any], language: str = "en") -> ReportingClock:
    """Compute the clock of an event.

    Args:
        fields: those of the answer: serious (Y, N, U), criteria, causality and expectedness.
        row: columns of its row: AWARE_DATE, and REPORTED_DATE if the first report was made.
        language: that of the reasons; English where there are none in it.

    Raises:
        DataError: a date of the row is none.
    """
    rules = _rules()["clock"]
    texts = {name: by_language.get(language, by_language["en"]) for name, by_language in rules["reasons"].items()}
    excluded = [texts[reason] for name, value, reason in _EXCLUDING if fields.get(name) == value]
    if excluded:
        return ReportingClock(None, False, tuple(excluded), _iso(_day(row, "AWARE_DATE")))
    unknown = tuple(name for name, _, _ in _EXCLUDING if fields.get(name) in MISSING)
    urgent = rules["fatal_or_life_threatening"]
    criteria = fields.get("criteria")
    met = [one for one in criteria if one in urgent["criteria"]] if isinstance(criteria, list) else []
    days = urgent["days"] if met else rules["other"]["days"]
    reasons = (*(texts["unknown"].replace("FIELD", name) for name in unknown), *met)
    day_0, reported = _day(row, "AWARE_DATE"), _day(row, "REPORTED_DATE")
    due = day_0 and day_0 + timedelta(days=days)
    first = reported or due
    follow_up = first + timedelta(days=urgent["follow_up_days"]) if met and first else None
    return ReportingClock(days, bool(unknown), reasons or (texts["all"],), _iso(day_0), _iso(due), _iso(follow_up))


def site_questions(fields: Mapping[str, Any], row: Mapping[str, Any], language: str = "en") -> list[SiteQuestion]:
    """Return what to ask the site: of each field that is missing, and of each value that needs more."""
    found = []
    for rule in _rules()["questions"]:
        name = rule.get("missing")
        value = row.get(name) if name is not None and name.isupper() else fields.get(name)
        if name is not None and value not in MISSING:
            continue
        if not all(_has(fields.get(of), values) for of, values in (rule.get("if") or {}).items()):
            continue
        ask = rule["ask"]
        found.append(SiteQuestion(rule["id"], name or "", ask.get(language, ask["en"])))
    return found


def _has(value: Any, wanted: Sequence[str]) -> bool:
    return any(one in wanted for one in (value if isinstance(value, list) else [value]))


def _day(row: Mapping[str, Any], column: str) -> date | None:
    value = row.get(column)
    if value in (None, ""):
        return None
    try:
        return date.fromisoformat(str(value).strip()[:10])
    except ValueError:
        raise DataError(f"{column} is {str(value)[:40]!r}; expected a day as 2026-03-04") from None


def _iso(day: date | None) -> str | None:
    return day.isoformat() if day is not None else None
