"""Dates of records: partial ones of SDTM, those of forms, and those that a note names."""

from __future__ import annotations

import pytest

from toolkit.clinical.dates import from_cdash, parse_partial
from toolkit.clinical.relative_dates import find_dates, resolve_date

NOTE_DATE = "2026-03-12"  # a Thursday


@pytest.mark.parametrize(
    "text",
    [
        "2026",
        "2026-03",
        "2026-03-05",
        "2026-03-05T14",
        "2026-03-05T14:30",
        "2026-03-05T14:30:09",
        "2026---15",
        "--12-15",
        "2026-03-05T-:15",
        "-----T07:15",
        "2024-02-29",
        "--02-29",
    ],
)
def test_dates_of_sdtm_are_read_and_written_as_they_are(text: str) -> None:
    assert str(parse_partial(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "2026-",
        "2026-3-5",
        "2026-13",
        "2026-02-30",
        "2025-02-29",
        "--02-30",
        "2026-03-05T25",
        "05-MAR-2026",
        "2026/03/05",
        "어제",
        "2026-03-05 10:00",
    ],
)
def test_what_is_no_date_of_sdtm_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|no such day|has no day"):
        parse_partial(text)


@pytest.mark.parametrize(
    ("first", "second", "is_after"),
    [
        ("2026-03-06", "2026-03-05", True),
        ("2026-03-05", "2026-03-05", False),
        ("2019", "2018-06-14", True),
        ("2018-06", "2018-06-14", False),
        ("2018-06-14", "2018-06", False),
        ("2026---15", "2026-01-01", False),
        ("2026-03-05T15", "2026-03-05T14:30", True),
        ("2026-03-05T15", "2026-03-05", False),
    ],
)
def test_dates_are_compared_by_what_both_tell(first: str, second: str, is_after: bool) -> None:
    assert parse_partial(first).is_after(parse_partial(second)) is is_after


def test_dates_of_forms_become_iso_dates() -> None:
    forms = ["05-MAR-2026", "5 mar 2026", "UN-MAR-2026", "UN-UNK-2026", "05-UNK-2026", "2026-03-05"]
    assert list(map(from_cdash, forms)) == ["2026-03-05", "2026-03-05", "2026-03", "2026", "2026---05", "2026-03-05"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("어제 저녁부터", "2026-03-11"),
        ("그저께", "2026-03-10"),
        ("오늘 아침", "2026-03-12"),
        ("사흘 전", "2026-03-09"),
        ("이틀 전부터", "2026-03-10"),
        ("열흘 전", "2026-03-02"),
        ("보름 전", "2026-02-25"),
        ("3일째 지속", "2026-03-10"),
        ("나흘째", "2026-03-09"),
        ("사흘 뒤", "2026-03-15"),
        ("2주 전", "2026-02-26"),
        ("일주일 전", "2026-03-05"),
        ("한 달 전", "2026-02"),
        ("지난주 화요일", "2026-03-03"),
        ("이번 주 월요일", "2026-03-09"),
        ("지난 화요일", "2026-03-10"),
        ("지난주부터", "2026-03"),
        ("지난달 20일", "2026-02-20"),
        ("작년 11월", "2025-11"),
        ("3월 2일", "2026-03-02"),
        ("12월 30일", "2025-12-30"),
        ("3/5 투약", "2026-03-05"),
        ("3월 초", "2026-03"),
        ("2026.3.5", "2026-03-05"),
        ("2년 전", "2024"),
        ("yesterday", "2026-03-11"),
        ("two days ago", "2026-03-10"),
        ("last Tuesday", "2026-03-10"),
        ("Tuesday last week", "2026-03-03"),
        ("5 Mar", "2026-03-05"),
        ("March 5, 2025", "2025-03-05"),
        ("a week ago", "2026-03-05"),
        ("on 30 Dec", "2025-12-30"),
    ],
)
def test_a_date_of_a_note_is_resolved_against_the_notes_own(text: str, value: str) -> None:
    assert resolve_date(text, NOTE_DATE) == value


def test_what_comes_after_something_is_counted_from_the_date_before_it() -> None:
    found = find_dates("3월 2일 투약. 사흘 뒤 발진, 다음 날 소실", NOTE_DATE)
    assert [one.value for one in found] == ["2026-03-02", "2026-03-05", "2026-03-06"]
    assert found[1].of_note == "2026-03-15"
    assert [one.value for one in find_dates("held 18-21 Feb", NOTE_DATE)] == ["2026-02-18", "2026-02-21"]
    assert [one.value for one in find_dates("3월 8일 밤 횡설수설, 9일 아침 멀쩡", NOTE_DATE)] == [
        "2026-03-08",
        "2026-03-09",
    ]


@pytest.mark.parametrize(
    "text", ["혈압 130/85", "BP 120/80 mmHg", "300mg 하루 2회", "C3D8", "항생제 5일 처방", "Grade 3"]
)
def test_other_numbers_of_a_note_are_no_dates(text: str) -> None:
    assert find_dates(text, NOTE_DATE) == []
