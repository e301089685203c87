"""Adverse event notes: the clock and the questions are computed, and what an answer breaks is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.clinical.ae_triage import check_answer, complete
from toolkit.clinical.reporting import clock_source, reporting_clock, site_questions
from toolkit.runtime.errors import ConfigError, DataError
from toolkit.tasks.choose import load_task

FIELDS: dict[str, Any] = {
    "event": "간부전", "serious": "Y", "criteria": ["AESHOSP"], "causality": "RELATED", "expectedness": "UNEXPECTED",
    "listed": None, "onset": "2026-02-26", "outcome": "NOT RECOVERED/NOT RESOLVED", "action": "DRUG WITHDRAWN",
}  # fmt: skip
ROW = {
    "NOTE": "2/26 간부전으로 입원.", "NOTE_DATE": "2026-02-27", "AWARE_DATE": "2026-02-27", "LANGUAGE": "ko",
    "REFERENCE": "구역, 발진",
}  # fmt: skip

CLOCKS: list[tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]] = [
    ({}, {}, (15, "2026-03-14", None, False)),
    ({"criteria": ["AESDTH"]}, {}, (7, "2026-03-06", "2026-03-14", False)),
    ({"criteria": ["AESHOSP", "AESLIFE"]}, {"REPORTED_DATE": "2026-03-02"}, (7, "2026-03-06", "2026-03-10", False)),
    ({"criteria": ["AESDTH"]}, {"AWARE_DATE": "2028-02-27"}, (7, "2028-03-05", "2028-03-13", False)),  # a leap year
    ({}, {"AWARE_DATE": "2026-12-20T23:59"}, (15, "2027-01-04", None, False)),
    ({"causality": "UNKNOWN"}, {}, (15, "2026-03-14", None, True)),
    ({"expectedness": "UNKNOWN"}, {}, (15, "2026-03-14", None, True)),
    ({"serious": "U", "criteria": []}, {}, (15, "2026-03-14", None, True)),
    ({"serious": "N", "criteria": []}, {}, (None, None, None, False)),
    ({"causality": "NOT RELATED"}, {}, (None, None, None, False)),
    ({"expectedness": "EXPECTED"}, {}, (None, None, None, False)),
    ({"expectedness": "EXPECTED", "causality": "UNKNOWN"}, {}, (None, None, None, False)),
    ({"criteria": ["AESDTH"]}, {"AWARE_DATE": None}, (7, None, None, False)),
]


@pytest.mark.parametrize(("fields", "row", "wanted"), CLOCKS)
def test_the_clock_counts_calendar_days_from_the_day_of_awareness(
    fields: dict[str, Any], row: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    clock = reporting_clock({**FIELDS, **fields}, {**ROW, **row})
    assert (clock.days, clock.due, clock.follow_up_due, clock.is_provisional) == wanted


def test_the_clock_names_what_decided_its_source_and_that_it_is_to_be_checked() -> None:
    assert reporting_clock({**FIELDS, "criteria": ["AESLIFE"]}, ROW).reasons == ("AESLIFE",)
    assert reporting_clock({**FIELDS, "serious": "N"}, ROW).reasons == ("not serious",)


def test_reasons_of_the_clock_stand_in_the_notes_language() -> None:
    assert reporting_clock({**FIELDS, "serious": "N"}, ROW, "ko").reasons == ("중대하지 않음",)
    assert reporting_clock({**FIELDS, "causality": "U"}, ROW, "ko").reasons == (
        "causality 미상, 보고 대상인 것으로 셈",
    )
    assert reporting_clock(FIELDS, ROW, "fr").reasons == reporting_clock(FIELDS, ROW).reasons
    assert complete(json.dumps({**FIELDS, "expectedness": "EXPECTED"}), {**ROW, "LANGUAGE": "ko"})["CLOCK"][
        "reasons"
    ] == ["참조정보에서 예상되는 반응"]
    assert "별표 4" in clock_source()
    assert "check it against the law in force" in clock_source()


def test_a_day_of_awareness_that_is_no_date_is_an_error() -> None:
    with pytest.raises(DataError, match="AWARE_DATE is '어제'; expected a day"):
        reporting_clock(FIELDS, {**ROW, "AWARE_DATE": "어제"})


def test_each_missing_field_asks_its_question_in_the_language_of_the_row() -> None:
    assert [question.id for question in site_questions(FIELDS, ROW, "ko")] == ["Q09", "Q10"]
    nothing = site_questions({}, {}, "en")
    assert [question.field for question in nothing] == [
        "AWARE_DATE", "serious", "causality", "REFERENCE", "onset", "outcome", "action",
    ]  # fmt: skip
    assert "(day 0)" in nothing[0].text
    assert "0일" in site_questions({}, {}, "ko")[0].text
    died = site_questions({**FIELDS, "criteria": ["AESDTH"], "outcome": "FATAL"}, ROW, "ko")
    assert [question.id for question in died] == ["Q08"]
    assert "사망진단서" in died[0].text


def test_what_follows_from_an_answer_is_computed_and_an_unreadable_one_asks_for_all() -> None:
    found = complete(json.dumps(FIELDS), ROW)
    assert (found["FIELDS"], found["CLOCK"]["due"]) == (FIELDS, "2026-03-14")
    assert found["NOTICE"] == "연구용이며 진료에 쓰지 않습니다."
    broken = complete('{"event": "간부', ROW)
    assert (broken["FIELDS"], broken["CLOCK"]["is_provisional"], len(broken["QUESTIONS"])) == ({}, True, 5)


BROKEN: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"serious": "yes"}, ["AT02", "AT03"]),
    ({"criteria": ["AESHOSP", "AESHOSP"]}, ["AT02"]),
    ({"criteria": "AESHOSP"}, ["AT02", "AT03"]),
    ({"criteria": [{}]}, ["AT02"]),
    ({"serious": "N"}, ["AT03"]),
    ({"outcome": "FATAL"}, ["AT04"]),
    ({"criteria": ["AESDTH"]}, ["AT04"]),
    ({"event": "간 부전"}, ["AT05"]),
    ({"event": ""}, ["AT05"]),
    ({"listed": "발진"}, ["AT08"]),
    ({"listed": "황달", "expectedness": "EXPECTED"}, ["AT07"]),
    ({"expectedness": "EXPECTED"}, ["AT08"]),
    ({"onset": "2월 26일"}, ["AT09"]),
    ({"onset": "2026-02-30"}, ["AT09"]),
    ({"onset": "2026-03"}, ["AT10", "AT10"]),
    ({"onset": "2026-02-28"}, ["AT10", "AT10"]),
    ({"onset": "2026-02"}, []),
    ({"onset": None}, []),
]


@pytest.mark.parametrize(("changes", "rules"), BROKEN)
def test_the_check_names_what_an_answer_breaks(changes: dict[str, Any], rules: list[str]) -> None:
    assert [violation.rule for violation in check_answer(json.dumps({**FIELDS, **changes}), ROW)] == rules


def test_without_a_reference_text_nothing_is_expected_or_not() -> None:
    row = {**ROW, "REFERENCE": ""}
    assert [violation.rule for violation in check_answer(json.dumps(FIELDS), row)] == ["AT06"]
    assert check_answer(json.dumps({**FIELDS, "expectedness": "UNKNOWN"}), row) == []
    assert [violation.rule for violation in check_answer("no JSON", row)] == ["AT01"]
    assert [violation.rule for violation in check_answer("[]", row)] == ["AT01"]


def test_one_reference_text_for_all_rows_comes_from_a_file(tmp_path: Path) -> None:
    brochure = tmp_path / "brochure.txt"
    brochure.write_text("\ufeff예상되는 이상반응: 구역\n", encoding="utf-8")
    column = {"path": "REFERENCE", "default_file": str(brochure)}
    task = load_task({"extends": "recipes/tasks/ae_triage.yaml", "columns": {"reference": column}})
    sample = task.read({"NOTE": "구역"}, with_answer=False)
    assert "Reference text: 예상되는 이상반응: 구역\n" in sample.turns[-1].content
    own = task.read({"NOTE": "구역", "REFERENCE": "발진"}, with_answer=False)
    assert "Reference text: 발진\n" in own.turns[-1].content
    column["default_file"] = str(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match=r"default_file is .*none\.txt, which cannot be read"):
        load_task({"extends": "recipes/tasks/ae_triage.yaml", "columns": {"reference": column}})
