"""Read dates as SDTM has them: ISO 8601, complete as far as known, with unknown components in the middle as hyphens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date

_PARTIAL = re.compile(
    r"(?P<year>\d{4}|-)"
    r"(-(?P<month>\d{2}|-)"
    r"(-(?P<day>\d{2}|-)"
    r"(T(?P<hour>\d{2}|-)"
    r"(:(?P<minute>\d{2}|-)"
    r"(:(?P<second>\d{2})(\.\d+)?)?)?(?P<zone>Z|[+-]\d{2}:\d{2})?)?)?)?"
)
_COMPONENTS = ("year", "month", "day", "hour", "minute", "second")
_RANGES = {"month": (1, 12), "day": (1, 31), "hour": (0, 23), "minute": (0, 59), "second": (0, 59)}
_MONTH_LENGTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_CDASH_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_CDASH = re.compile(
    rf"(\d{{1,2}}|UN|UNK|--)[-/ ]?({'|'.join(_CDASH_MONTHS)}|UN|UNK|---)[-/ ]?(\d{{4}}|UN|UNK|UNKN|----)"
)


@dataclass(frozen=True)
class PartialDate:
    """A date, or date and time, of which some components may be unknown."""

    year: int | None = None
    month: int | None = None
    day: int | None = None
    hour: int | None = None
    minute: int | None = None
    second: int | None = None

    @classmethod
    def of(cls, day: date) -> PartialDate:
        """Return a complete date."""
        return cls(day.year, day.month, day.day)

    @property
    def _components(self) -> tuple[int | None, ...]:
        return self.year, self.month, self.day, self.hour, self.minute, self.second

    @property
    def as_date(self) -> date | None:
        """Return the day, if it is known."""
        if self.year is None or self.month is None or self.day is None:
            return None
        return date(self.year, self.month, self.day)

    def is_after(self, other: PartialDate) -> bool:
        """Return whether it is certainly later: by the components that both have, up to the first that one lacks."""
        for own, of_other in zip(self._components, other._components, strict=True):
            if own is None or of_other is None:
                return False
            if own != of_other:
                return bool(own > of_other)
        return False

    def __str__(self) -> str:
        year, month, day, hour, minute, second = self._components
        known = [value is not None for value in self._components]
        if not any(known):
            return ""
        last = max(place for place, is_known in enumerate(known) if is_known)
        text = "-" if year is None else f"{year:04d}"
        for place, value in ((1, month), (2, day)):
            text += f"-{'-' if value is None else f'{value:02d}'}" if last >= place else ""
        for place, mark, value in ((3, "T", hour), (4, ":", minute), (5, ":", second)):
            text += f"{mark}{'-' if value is None else f'{value:02d}'}" if last >= place else ""
        return text


def parse_partial(text: str) -> PartialDate:
    """Read a date of SDTM: ``2026-03-05``, ``2026-03``, ``2026---05`` (no month), ``2026-03-05T14:30``.

    Raises:
        ValueError: it is none, or there is no such day.
    """
    found = _PARTIAL.fullmatch(text)
    if found is None or text.endswith(("-", "-:")) or text == "-":
        raise ValueError(f"{text!r} is no ISO 8601 date; expected as much of YYYY-MM-DDThh:mm:ss as is known")
    values = {name: int(value) for name in _COMPONENTS if (value := found[name]) not in (None, "-")}
    for name, (low, high) in _RANGES.items():
        if name in values and not low <= values[name] <= high:
            raise ValueError(f"{text!r} has the {name} {values[name]}; expected {low} to {high}")
    if "month" in values and values.get("day", 1) > _MONTH_LENGTHS[values["month"] - 1]:
        raise ValueError(f"{text!r}: month {values['month']} has no day {values['day']}")
    if {"year", "month", "day"} <= values.keys():
        try:
            date(values["year"], values["month"], values["day"])
        except ValueError:
            raise ValueError(f"{text!r}: there is no such day in that year") from None
    return PartialDate(**values)


def from_cdash(text: str) -> str:
    """Return a date as forms collect it, ``05-MAR-2026`` or ``UN-MAR-2026``, as ISO 8601; another text as it is."""
    found = _CDASH.fullmatch(text.strip().upper())
    if found is None:
        return text.strip()
    day, month, year = found.groups()
    known = PartialDate(
        int(year) if year.isdigit() else None,
        _CDASH_MONTHS.index(month) + 1 if month in _CDASH_MONTHS else None,
        int(day) if day.isdigit() else None,
    )
    return str(known)
