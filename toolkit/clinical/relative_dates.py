"""Find the dates that a note names, absolute or relative, in Korean and English, and resolve them to ISO 8601.

Relative dates are counted from the note's own date. What comes *after* something (사흘 뒤, two days later) is counted
from the last complete date before it in the note, where there is one. Weeks begin on Monday. A date without a year is
the last one that is not after the note's. What is known to a month or a year alone stays partial.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta

from toolkit.clinical.number_words import DAYS, ENGLISH_COUNT, KOREAN_COUNT, KOREAN_DAYS, number_of


@dataclass(frozen=True)
class DateMention:
    """A date in a text."""

    start: int
    end: int
    text: str
    """As it stands there."""
    value: str
    """ISO 8601, partial where the text is."""
    of_note: str
    """The same, had it been counted from the note's date: another one for what comes after something."""


@dataclass(frozen=True)
class _Anchor:
    """Holds what relative dates are counted from."""

    note: date
    last: date | None = None
    """Last complete date before this place in the note."""


_KOREAN_WEEKDAYS = "월화수목금토일"
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NEAR_DAYS = {
    "오늘": 0, "금일": 0, "당일": 0, "오늘 아침": 0, "어제": -1, "전일": -1, "작일": -1, "어젯밤": -1, "간밤": -1,
    "그저께": -2, "그제": -2, "그끄저께": -3, "내일": 1, "명일": 1, "모레": 2, "글피": 3, "today": 0,
    "this morning": 0, "this afternoon": 0, "tonight": 0, "yesterday": -1, "last night": -1,
    "the day before yesterday": -2, "tomorrow": 1,
}  # fmt: skip
_WEEKS = {"지지난": -2, "저저번": -2, "지난": -1, "저번": -1, "이번": 0, "금": 0, "다음": 1}

_MONTH_NAME = rf"(?:{'|'.join(_MONTHS)})[a-z]*\.?"
_WEEKDAY_NAME = r"(?P<weekday>mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\b"


def _shift_months(day: date, months: int) -> str:
    total = day.year * 12 + day.month - 1 + months
    return f"{total // 12:04d}-{total % 12 + 1:02d}"


def _full(year: int, month: int, day: int) -> str | None:
    try:
        return date(year, month, day).isoformat()
    except ValueError:
        return None


def _without_year(month: int, day: int, anchor: _Anchor) -> str | None:
    """Return the last such day that is not after the note."""
    for year in range(anchor.note.year, anchor.note.year - 9, -1):  # 29 February: up to eight years back
        found = _full(year, month, day)
        if found is not None and found <= anchor.note.isoformat():
            return found
    return None


def _month_without_year(month: int, anchor: _Anchor) -> str | None:
    if not 1 <= month <= 12:
        return None
    return f"{anchor.note.year - (month > anchor.note.month):04d}-{month:02d}"


def _weekday_of_week(week: int, weekday: int, anchor: _Anchor) -> str:
    monday = anchor.note - timedelta(days=anchor.note.weekday())
    return (monday + timedelta(weeks=week, days=weekday)).isoformat()


def _last_weekday(weekday: int, anchor: _Anchor) -> str:
    back = (anchor.note.weekday() - weekday - 1) % 7 + 1
    return (anchor.note - timedelta(days=back)).isoformat()


def _moved(days: int, anchor: _Anchor, is_after: bool) -> str:
    start = anchor.last if is_after and anchor.last is not None else anchor.note
    return (start + timedelta(days=days)).isoformat()


def _common(first: date, last: date) -> str:
    """Return what two days have in common: their month, or their year."""
    return first.isoformat()[:7] if first.isoformat()[:7] == last.isoformat()[:7] else first.isoformat()[:4]


_Found = re.Match[str]
_Pattern = tuple[re.Pattern[str], Callable[[_Found, _Anchor], str | None]]


def _direction(found: _Found) -> int:
    return -1 if found["way"].strip().lower() in ("전", "ago", "before", "earlier") else 1


def _korean_days(found: _Found, anchor: _Anchor) -> str:
    count = DAYS[found["days"]] if found["days"] else number_of(found["count"])
    if "째" in found["way"]:
        return _moved(1 - count, anchor, False)
    return _moved(_direction(found) * count, anchor, _direction(found) > 0)


def _weeks(found: _Found, anchor: _Anchor) -> str:
    return _moved(7 * _direction(found) * number_of(found["count"]), anchor, _direction(found) > 0)


def _week_alone(found: _Found, anchor: _Anchor) -> str:
    monday = date.fromisoformat(_weekday_of_week(_WEEKS[found["which"]], 0, anchor))
    return _common(monday, monday + timedelta(days=6))


def _form(pattern: str, resolve: Callable[[_Found, _Anchor], str | None]) -> _Pattern:
    return re.compile(pattern, re.IGNORECASE), resolve


def _patterns() -> Iterator[_Pattern]:
    """Yield the forms of dates, the more particular ones first."""
    yield from _calendar_forms()
    yield from _counted_forms()


def _calendar_forms() -> Iterator[_Pattern]:
    """Yield dates of the calendar, and days of a named year, month or week."""
    yield _form(
        r"(?<![\d.])(?P<y>\d{4})\s?[-./년]\s?(?P<m>\d{1,2})\s?[-./월]\s?(?P<d>\d{1,2})(?!\d)일?",
        lambda f, a: _full(int(f["y"]), int(f["m"]), int(f["d"])),
    )
    yield _form(
        r"(?P<y>\d{4})\s?년\s?(?P<m>\d{1,2})\s?월(?!\s?\d)|(?<!\d)(?P<y2>\d{4})-(?P<m2>\d{2})(?![\d-])",
        lambda f, a: f"{int(f['y'] or f['y2']):04d}-{int(f['m'] or f['m2']):02d}",
    )
    yield _form(
        rf"\b(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\s(?:of\s)?(?P<m>{_MONTH_NAME})(?:,?\s(?P<y>\d{{4}}))?",
        _english,
    )
    yield _form(
        rf"\b(?P<d>\d{{1,2}})(?=\s?(?:-|–|~|to|and)\s?\d{{1,2}}\s(?P<m>{_MONTH_NAME})(?:,?\s(?P<y>\d{{4}}))?)", _english
    )
    yield _form(
        rf"\b(?P<m>{_MONTH_NAME})\s(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,?\s(?P<y>\d{{4}}))?",
        _english,
    )
    yield _form(
        r"(?P<which>작년|지난해|올해|금년|재작년)\s?(?P<m>\d{1,2})\s?월(?:\s?(?P<d>\d{1,2})\s?일)?", _named_year
    )
    yield _form(
        r"(?P<which>지난달|저번 달|지난 달|이번 달|이달|전월)\s?(?P<d>\d{1,2})\s?일",
        _day_of_month,
    )
    yield _form(
        r"(?<!\d)(?P<m>\d{1,2})\s?월\s?(?P<d>\d{1,2})\s?일"
        r"|(?<![\d/.])(?P<m2>\d{1,2})/(?P<d2>\d{1,2})(?![\d/]|\s?(?:점|mmHg))",
        lambda f, a: _without_year(int(f["m"] or f["m2"]), int(f["d"] or f["d2"]), a),
    )
    yield _form(
        r"(?P<which>지지난|저저번|지난|저번|이번|금|다음)\s?주\s?(?P<weekday>[월화수목금토일])요일",
        lambda f, a: _weekday_of_week(_WEEKS[f["which"]], _KOREAN_WEEKDAYS.index(f["weekday"]), a),
    )
    yield _form(
        r"지난\s?(?P<weekday>[월화수목금토일])요일", lambda f, a: _last_weekday(_KOREAN_WEEKDAYS.index(f["weekday"]), a)
    )
    yield _form(
        r"(?<![가-힣])(?P<weekday>[월화수목금토일])요일",
        lambda f, a: _last_weekday(_KOREAN_WEEKDAYS.index(f["weekday"]), a),
    )
    yield _form(rf"\b{_WEEKDAY_NAME}\s(?:of\s)?last\sweek", lambda f, a: _weekday_of_week(-1, _english_weekday(f), a))
    yield _form(
        rf"\b{_WEEKDAY_NAME}\sbefore\slast",
        lambda f, a: (date.fromisoformat(_last_weekday(_english_weekday(f), a)) - timedelta(weeks=1)).isoformat(),
    )
    yield _form(rf"\b(?:on|since|from)\s{_WEEKDAY_NAME}", lambda f, a: _last_weekday(_english_weekday(f), a))
    yield _form(rf"\blast\s{_WEEKDAY_NAME}", lambda f, a: _last_weekday(_english_weekday(f), a))


def _counted_forms() -> Iterator[_Pattern]:
    """Yield what counts from the note or from a date before it, then parts of a date that stand alone."""
    days = rf"(?:(?P<days>{KOREAN_DAYS})|(?<![\d.])(?P<count>\d{{1,3}})\s?일)"
    yield _form(rf"{days}\s?(?P<way>전|뒤|후|만에|째)", _korean_days)
    yield _form(rf"(?<![가-힣\d])(?P<count>{KOREAN_COUNT})\s?주(?:일)?\s?(?P<way>전|뒤|후)", _weeks)
    yield _form(
        rf"(?<![가-힣\d])(?P<count>{KOREAN_COUNT})\s?(?:달|개월)\s?(?P<way>전)",
        lambda f, a: _shift_months(a.note, -number_of(f["count"])),
    )
    yield _form(r"(?<!\d)(?P<count>\d{1,2})\s?년\s?전", lambda f, a: f"{a.note.year - int(f['count']):04d}")
    yield _form(
        rf"\b(?P<count>{ENGLISH_COUNT})\sdays?\s(?P<way>ago|before|earlier|later|after|afterwards)",
        lambda f, a: _moved(_direction(f) * number_of(f["count"]), a, _direction(f) > 0),
    )
    yield _form(rf"\b(?P<count>{ENGLISH_COUNT})\sweeks?\s(?P<way>ago|before|earlier|later|after|afterwards)", _weeks)
    yield _form(
        rf"\b(?P<count>{ENGLISH_COUNT})\smonths?\sago", lambda f, a: _shift_months(a.note, -number_of(f["count"]))
    )
    yield _form(
        r"(?<![가-힣])(?:다음\s?날|이튿날|익일|the (?:next|following) day)",
        lambda f, a: _moved(1, a, True),
    )
    near = "|".join(sorted(map(re.escape, _NEAR_DAYS), key=len, reverse=True))
    yield _form(rf"(?<![가-힣a-z])(?:{near})(?![a-z])", lambda f, a: _moved(_NEAR_DAYS[f[0].lower()], a, False))
    yield _form(
        r"(?<![\d월.])(?<!월\s)(?P<d>\d{1,2})\s?일(?=\s?(?:아침|오전|오후|저녁|밤|새벽|낮|에|부터|까지|경|쯤))",
        _day_after_last,
    )
    yield _form(r"지난\s?달|저번 달|전월|last month", lambda f, a: _shift_months(a.note, -1))
    yield _form(r"이번\s?달|이달|this month", lambda f, a: _shift_months(a.note, 0))
    yield _form(r"(?P<which>지지난|지난|저번|이번|다음)\s?주(?![가-힣]*\s?[월화수목금토일]요일)", _week_alone)
    yield _form(
        r"(?<!\d)(?P<m>\d{1,2})\s?월\s?(?:초|중순|말|경|쯤)?(?!\s?\d)",
        lambda f, a: _month_without_year(int(f["m"]), a),
    )
    yield _form(
        r"(?<![\d.])(?P<y>(?:19|20)\d{2})\s?년(?!\s?[\d전뒤후])|\b(?:in|since|from)\s(?P<y2>(?:19|20)\d{2})\b", _year
    )
    yield _form(r"작년|지난해|last year", lambda f, a: f"{a.note.year - 1:04d}")


def _year(found: _Found, anchor: _Anchor) -> str:
    return f"{found['y'] or found['y2']}"


def _english(found: _Found, anchor: _Anchor) -> str | None:
    month = _MONTHS.index(found["m"].lower()[:3]) + 1
    if found["y"]:
        return _full(int(found["y"]), month, int(found["d"]))
    return _without_year(month, int(found["d"]), anchor)


def _english_weekday(found: _Found) -> int:
    return _WEEKDAYS.index(found["weekday"].lower()[:3])


def _day_after_last(found: _Found, anchor: _Anchor) -> str | None:
    """Return a day of the month in which the last date of the note lies; None if there is none before it."""
    if anchor.last is None or int(found["d"]) < anchor.last.day:
        return None
    return _full(anchor.last.year, anchor.last.month, int(found["d"]))


def _named_year(found: _Found, anchor: _Anchor) -> str | None:
    year = anchor.note.year - {"작년": 1, "지난해": 1, "재작년": 2}.get(found["which"], 0)
    month = int(found["m"])
    return _full(year, month, int(found["d"])) if found["d"] else f"{year:04d}-{month:02d}"


def _day_of_month(found: _Found, anchor: _Anchor) -> str | None:
    month = _shift_months(anchor.note, 0 if found["which"] in ("이번 달", "이달") else -1)
    return _full(int(month[:4]), int(month[5:]), int(found["d"]))


_FORMS = tuple(_patterns())


def find_dates(text: str, note_date: str) -> list[DateMention]:
    """Return the dates that a note names, in their order, each resolved; places do not overlap.

    Raises:
        ValueError: ``note_date`` is no complete ISO 8601 date.
    """
    note = date.fromisoformat(note_date[:10])
    places: dict[int, tuple[_Found, Callable[[_Found, _Anchor], str | None]]] = {}
    taken: list[tuple[int, int]] = []
    for pattern, resolve in _FORMS:
        for found in pattern.finditer(text):
            if all(found.end() <= start or found.start() >= end for start, end in taken):
                taken.append(found.span())
                places[found.start()] = found, resolve
    mentions, last = [], None
    for start in sorted(places):
        found, resolve = places[start]
        if (value := resolve(found, _Anchor(note, last))) is None:
            continue
        of_note = resolve(found, _Anchor(note)) or value
        mentions.append(DateMention(start, found.end(), found[0], value, of_note))
        last = date.fromisoformat(value) if len(value) == 10 else last
    return mentions


def resolve_date(text: str, note_date: str) -> str | None:
    """Return the first date that an expression names as ISO 8601; None if it names none.

    Raises:
        ValueError: ``note_date`` is no complete ISO 8601 date.
    """
    found = find_dates(text, note_date)
    return found[0].value if found else None
