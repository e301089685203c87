"""Find what can be compared in a text: numbers with their units, dates, spans of time, names of drugs, quotes."""

from __future__ import annotations

import calendar
import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from toolkit.clinical.number_words import DAYS, KOREAN_DAYS

_SPELLINGS = {
    "day": "일간 일 days day", "hour": "시간 hours hour h", "week": "주 weeks week", "month": "개월 months month",
    "year": "년 years year", "minute": "분 minutes", "ms": "ms", "age": "세", "mg": "mg ㎎ 밀리그램", "g": "g",
    "kg": "kg ㎏ 킬로그램", "µg": "µg μg mcg 마이크로그램", "second": "초 seconds sec s", "l": "L", "degree F": "℉ °F",
    "ml": "mL ml", "%": "%", "degree": "℃ °C 도", "times": "회 번 차례 times",
    "tablet": "정 알 tablets tablet tabs tab",
    "u/l": "U/L IU/L", "mmhg": "mmHg", "bpm": "bpm", "grade": "등급", "ordinal": "차",
}  # fmt: skip
"""Ways of writing each unit."""
_UNITS = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split()}
_UNIT = "|".join(re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True))
_NUMBER = re.compile(rf"(?:(?<![\w.-])|(?<![A-Za-z])[x×])(\d+(?:,\d{{3}})*(?:\.\d+)?)(?:\s*({_UNIT})(?![A-Za-z]))?")
_CODE = re.compile(r"(?<![\w-])[A-Z]{2,}(?:-[A-Z0-9]+)*-?\d{2,}(?![\w-])")
"""A code such as FRL-101 or AB1234."""
_COUNTS = {"한": 1, "두": 2, "세": 3, "네": 4, "다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8, "아홉": 9, "열": 10}
_ENGLISH = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}
_ENGLISH_UNIT = "|".join(unit for unit in _UNITS if unit.isalpha() and unit.isascii())
_OFTEN = {"once": 1, "twice": 2, "thrice": 3}
_WORDS = re.compile(
    rf"(?<![가-힣])(?P<count>{'|'.join(_COUNTS)})\s?(?P<unit>번|회|차례|알|정|시간|주|달|개월)"
    rf"|(?<![가-힣])(?P<days>{KOREAN_DAYS})(?!뿐|살)"
    rf"|\b(?P<english>{'|'.join(_ENGLISH)})\b(?:\s(?P<of>{_ENGLISH_UNIT})\b)?"
    rf"|\b(?P<often>{'|'.join(_OFTEN)})\b",
    re.IGNORECASE,
)
"""A number in words, with its unit where it has one."""
_FULL_WIDTH = str.maketrans("０１２３４５６７８９．，／～", "0123456789.,/~")
_RANGE = re.compile(r"(?<![\w.-])(\d+(?:\.\d+)?)-(?=\d+(?:\.\d+)?(?![\d-]))")
_TO = re.compile(r"\s*(?:[~–→]|to)\s*")
"""Between two numbers of which the second has the unit of both."""
_TIME = re.compile(r"(?<!\d)(\d{1,2})시\s*(\d{1,2})분")
_DAYS_OF_MONTH = re.compile(r"(?<!\d)(\d{1,2})월\s*(\d{1,2})\s*([·,~-])\s*(\d{1,2})일")
_MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_name) if name} | {
    name.lower(): number for number, name in enumerate(calendar.month_abbr) if name
}
_MONTH = "|".join(sorted(_MONTHS, key=len, reverse=True))
_DATES = (
    re.compile(r"(?<!\d)(?P<y>\d{4})-(?P<m>\d\d)-(?P<d>\d\d)(?!\d)"),
    re.compile(r"(?<!\d)(?P<y>\d{4})\s*[./]\s*(?P<m>\d{1,2})\s*[./]\s*(?P<d>\d{1,2})(?!\d)\.?"),
    re.compile(r"(?<!\d)(?:(?P<y>\d{4})년\s*)?(?P<m>\d{1,2})월\s*(?P<d>\d{1,2})일"),
    re.compile(rf"(?<!\d)(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\s+(?P<name>{_MONTH})\.?(?:,?\s+(?P<y>\d{{4}}))?(?!\w)", re.I),
    re.compile(rf"(?<!\w)(?P<name>{_MONTH})\.?\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s+(?P<y>\d{{4}}))?(?!\w)", re.I),
    re.compile(r"(?<!\d)(?P<m>0?[1-9]|1[0-2])/(?P<d>[0-3]?\d)(?![\d/])"),
)
_PARTIAL = re.compile(r"(?<![\d-])(\d{4})-(\d\d)(?![\d-])|(?<!\d)(\d{4})년\s*(\d{1,2})월(?!\s*\d)")
_QUOTE = re.compile(r"“([^”]{2,})”|\"([^\"]{2,})\"|‘([^’]{4,})’")
_SPAN = re.compile(r"(?<![\w.-])(\d+)\s*(일|days?|시간|hours?|주|weeks?|개월|months?)", re.I)
_KINDS = (
    ("year", "month", "week", "day", "hour", "minute", "second", "ms"), ("kg", "g", "mg", "µg"), ("l", "ml"),
    ("degree", "degree F"),
)  # fmt: skip
_ALIKE = {unit: kind for kind in _KINDS for unit in kind}
"""What each unit measures: a number with one of them is no other's."""
TIME = frozenset(_KINDS[0])
"""Units of time, which a note does not leave out."""
_HOURS = {"hour": 1, "day": 24, "week": 168}
_DATA = Path(__file__).parent / "drug_names.yaml"
_PARTICLES = "(?:은|는|이|가|을|를|의|에|와|과|로|으로|도|만|정|주|인|이나|나|라|복용|투여)?"


Number = tuple[str, str, str]
"""Value, unit (empty if there is none) and the writing of a number."""


@dataclass(frozen=True)
class Date:
    """A date as it is written; ``year`` is None where it has none."""

    year: int | None
    month: int
    day: int
    written: str

    def is_one_of(self, dates: set[datetime.date]) -> bool:
        """Return whether it is one of some dates; without a year it is by month and day."""
        return any((d.month, d.day) == (self.month, self.day) and self.year in (None, d.year) for d in dates)


def plain(text: str) -> str:
    """Return a text with digits of one width, times with a colon, and the days of a month as dates (2월 7·9일)."""
    text = _DAYS_OF_MONTH.sub(r"\1월 \2일\3\1월 \4일", text.translate(_FULL_WIDTH))
    return _TIME.sub(r"\1:\2", text)


@lru_cache(maxsize=1024)
def dates_in(text: str) -> tuple[Sequence[Date], str]:
    """Return the dates of a text, and the text without them."""
    found, text = [], plain(text)
    for pattern in _DATES:
        for match in pattern.finditer(text):
            groups = match.groupdict()
            month = _MONTHS[groups["name"].lower()] if groups.get("name") else int(groups["m"])
            year, day = groups.get("y"), int(groups["d"])
            is_capital = groups.get("name", "m")[0].isupper()
            if groups.get("name", "").lower() == "may" and not is_capital:
                continue  # the verb
            if (
                (1 <= month <= 12 and 1 <= day <= 31) or pattern in _DATES[:3] or is_capital
            ):  # an impossible date is one
                found.append(Date(int(year) if year else None, month, day, match[0]))
        text = pattern.sub(" ", text)
    return tuple(found), text


def whole_dates(text: str) -> set[datetime.date]:
    """Return the dates of a text that have a year and exist."""
    return {date for found in dates_in(text)[0] if (date := _date(found)) is not None}


def _date(found: Date) -> datetime.date | None:
    try:
        return None if found.year is None else datetime.date(found.year, found.month, found.day)
    except ValueError:
        return None


@lru_cache(maxsize=1024)
def numbers_in(text: str, ones: bool = False) -> Sequence[Number]:
    """Return the numbers of a text that are no part of a date, in digits and words.

    Args:
        text: any text.
        ones: with words for one (한 번, 하루, once), which often count nothing.
    """
    rest = _RANGE.sub(r"\1~", _PARTIAL.sub(" ", _CODE.sub(" ", dates_in(text)[1])))
    found, matches = [], list(_NUMBER.finditer(rest))
    for at, match in enumerate(matches):
        value = match[1].replace(",", "")
        value = value.rstrip("0").rstrip(".") if "." in value else value.lstrip("0") or "0"
        next_one = matches[at + 1] if at + 1 < len(matches) else match
        is_range = _TO.fullmatch(rest[match.end() : next_one.start()])
        found.append((value, _UNITS.get(match[2] or (is_range and next_one[2]) or "", ""), match[0].strip()))
    for match in _WORDS.finditer(rest):
        if (number := _in_words(match))[0] != "1" or ones:
            found.append(number)
    return tuple(found)


def _in_words(match: re.Match[str]) -> Number:
    if match["count"]:
        return str(_COUNTS[match["count"]]), _UNITS.get(match["unit"], "month"), match[0]
    if match["days"]:
        return str(DAYS[match["days"]]), "day", match[0]
    if match["often"]:
        return str(_OFTEN[match["often"].lower()]), "times", match[0]
    return str(_ENGLISH[match["english"].lower()]), _UNITS.get((match["of"] or "").lower(), ""), match[0]


def months_in(text: str) -> dict[tuple[int, int], str]:
    """Return the months that a text names with their year, without a day, and their writing."""
    found = _PARTIAL.finditer(dates_in(text)[1])
    return {(int(match[1] or match[3]), int(match[2] or match[4])): match[0] for match in found}


def is_same_kind(unit: str, other: str) -> bool:
    """Return whether two units are different ones of one kind, such as mg and g."""
    return unit != other and unit in _ALIKE and _ALIKE[unit] == _ALIKE.get(other)


def alike(value: str, unit: str) -> Iterator[tuple[str, str]]:
    """Yield a number with its unit, and the same span in days, hours or weeks: 2 weeks are 14 days."""
    yield value, unit
    if unit in _HOURS and value.isdigit():
        for other, hours in _HOURS.items():
            number, rest = divmod(int(value) * _HOURS[unit], hours)
            if not rest:
                yield str(number), other


@lru_cache(maxsize=1024)
def spans_in(text: str) -> Sequence[tuple[int, str]]:
    """Return the spans of time in a text, as number and unit: a deadline such as 15 days is among them."""
    return tuple((int(match[1]), _UNITS[match[2].lower()]) for match in _SPAN.finditer(dates_in(text)[1]))


def later(day: datetime.date, number: int, unit: str) -> datetime.date:
    """Return the day that is a span after another; hours are counted as days that they begin."""
    if unit == "month":
        months = day.month - 1 + number
        year, month = day.year + months // 12, months % 12 + 1
        return datetime.date(year, month, min(day.day, calendar.monthrange(year, month)[1]))
    days = {"day": number, "week": 7 * number, "hour": -(-number // 24)}[unit]
    return day + datetime.timedelta(days=min(days, 36500))


def codes_in(text: str) -> set[str]:
    """Return the codes of a text, such as that of a trial's drug."""
    return set(_CODE.findall(text))


def quotes_in(text: str) -> list[str]:
    """Return what stands in quotation marks."""
    return [next(group for group in match.groups() if group) for match in _QUOTE.finditer(text)]


@cache
def _drugs() -> tuple[re.Pattern[str], dict[str, str]]:
    """Return what finds names of drugs, and one spelling of each name that has several."""
    data: dict[str, Any] = yaml.safe_load(_DATA.read_text(encoding="utf-8"))
    spelled = {name.lower(): group[0].lower() for group in data["names"] for name in group}
    names = sorted(spelled, key=len, reverse=True)
    english = "|".join([rf"[a-z]{{2,}}(?:{'|'.join(data['stems_en'])})", *(n for n in names if n.isascii())])
    korean = "|".join([rf"[가-힣]{{1,8}}?(?:{'|'.join(data['stems_ko'])})", *(n for n in names if not n.isascii())])
    pattern = rf"(?<![a-z])({english})(?![a-z])|(?<![가-힣])({korean}){_PARTICLES}(?![가-힣])"
    return re.compile(pattern, re.IGNORECASE), spelled


@lru_cache(maxsize=1024)
def drugs_in(text: str) -> Mapping[str, str]:
    """Return the names of drugs in a text by the spelling that stands for all of a name's.

    They are those of ``drug_names.yaml`` and words that end in a stem of international nonproprietary names.
    """
    pattern, spelled = _drugs()
    found = {}
    for match in pattern.finditer(text):
        name = (match[1] or match[2]).lower()
        found[spelled.get(name, name)] = match[1] or match[2]
    return found


def squeezed(text: str) -> str:
    """Return a text without blanks, in one case, for comparing quotes that were wrapped otherwise."""
    return re.sub(r"\s+", "", text).casefold()
