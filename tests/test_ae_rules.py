"""Rules of records: published ones by rows of the kinds of their test data, and those that need note or dictionary."""

from __future__ import annotations

import json
from typing import Any

import pytest

from toolkit.clinical.ae_check import check_answer
from toolkit.clinical.context import Context
from toolkit.clinical.dictionary import open_dictionary
from toolkit.clinical.records import CRITERIA, complete, to_sdtm
from toolkit.clinical.rules import check_records, rules
from toolkit.clinical.verification import CHECKS, find_check
from toolkit.runtime.errors import UsageError
from toolkit.tasks import task_file

NONE_SERIOUS = dict.fromkeys(CRITERIA, "N")
BASE = {
    "STUDYID": "FROST-01",
    "DOMAIN": "AE",
    "USUBJID": "FROST-01-001",
    "AESEQ": 1,
    "AETERM": "WORN OUT",
    "AESER": "N",
}
NOTE = {
    "NOTE": "3월 8일부터 속이 울렁거림. 구토는 없음. Denies rash.",
    "NOTE_DATE": "2026-03-12",
    "STUDYID": "FROST-01",
    "USUBJID": "FROST-01-001",
}
EVENT = {"AETERM": "속이 울렁거림", "AELLT": "속이 울렁거림", "AESER": "N", "AESTDTC": "2026-03-08"}

GOOD: dict[str, list[dict[str, Any]]] = {
    "CG0040": [BASE],
    "CG0044": [BASE],
    "CG0304": [BASE],
    "CG0041": [
        BASE | NONE_SERIOUS | {"AESHOSP": "Y", "AESER": "Y"},
        BASE | NONE_SERIOUS,
        BASE | {"AESER": ""},
        BASE | dict.fromkeys(CRITERIA, "Y") | {"AESER": "Y"},
    ],
    "CG0042": [BASE | NONE_SERIOUS, BASE, BASE | {"AESOD": "Y", "AESER": "Y"}, BASE | {"AESDTH": "Y", "AESER": ""}],
    "CG0428": [BASE | {"AETOX": "CTCAE 5.0", "AETOXGR": "2"}, BASE, BASE | {"AETOXGR": "GRADE 1"}],
    "FB3209": [
        BASE | {"AESTDTC": "2026-03-01", "AEENDTC": "2026-03-01"},
        BASE | {"AESTDTC": "2026-03", "AEENDTC": "2026-03-02"},
        BASE | {"AESTDTC": "2026-03-05"},
        BASE | {"AEENDTC": "2026-03-05"},
        BASE | {"AESTDTC": "2025", "AEENDTC": "2026-01"},
        BASE | {"AESTDTC": "2026---20", "AEENDTC": "2026---02"},
    ],
    "FB3409": [BASE | {"AEOUT": "NOT RECOVERED/NOT RESOLVED"}, BASE | {"AEOUT": "FATAL", "AEENDTC": "2026-03-01"}],
}
BAD: dict[str, list[dict[str, Any]]] = {
    "CG0040": [BASE | {"AEOCCUR": "Y"}, BASE | {"AEOCCUR": ""}],
    "CG0044": [BASE | {"AESTAT": "NOT DONE"}],
    "CG0304": [BASE | {"AEREASND": ""}],
    "CG0041": [BASE | {"AESCAN": "Y"}, BASE | {"AESMIE": "Y", "AESER": ""}, BASE | {"AESLIFE": "Y", "AESER": "U"}],
    "CG0042": [
        BASE | {"AESER": "Y"},
        BASE | {"AESER": ""},
        BASE | NONE_SERIOUS | {"AESER": "Y"},
        BASE | {"AESER": "U"},
    ],
    "CG0428": [BASE | {"AETOX": "CTCAE 5.0"}, BASE | {"AETOX": "CTCAE 5.0", "AETOXGR": " "}],
    "FB3209": [
        BASE | {"AESTDTC": "2026-03-02", "AEENDTC": "2026-03-01"},
        BASE | {"AESTDTC": "2019", "AEENDTC": "2018-06-14"},
        BASE | {"AESTDTC": "2026-03-02T14:30", "AEENDTC": "2026-03-02T09"},
    ],
    "FB3409": [BASE | {"AEOUT": "NOT RECOVERED/NOT RESOLVED", "AEENDTC": "2026-03-01"}],
}
FLAGS = dict(zip([f"CG{number:04d}" for number in range(387, 397)], ["AESER", *CRITERIA, "AECONTRT"], strict=True))


@pytest.mark.parametrize("rule", [*GOOD, *FLAGS])
def test_a_published_rule_takes_its_good_rows_and_finds_its_bad_ones(rule: str) -> None:
    good = GOOD.get(rule) or [BASE | {FLAGS[rule]: value} for value in ("Y", "N", "")] + [BASE]
    bad = BAD.get(rule) or [BASE | {FLAGS[rule]: value} for value in ("U", "y", "YES", "1")]
    for record in good:
        assert check_records([record], only=[rule]) == [], record
    for record in bad:
        (found,) = check_records([BASE, record], only=[rule], rows=["one", "two"])
        assert found.rule == rule
        assert found.row == "two"
        assert found.value == str(record.get(found.field, ""))


def test_every_published_rule_is_named_with_its_source() -> None:
    published = {rule.id: rule.source for rule in rules() if not rule.id.startswith("AE-")}
    wanted = ["CG0040", "CG0041", "CG0042", "CG0044", "CG0304", *(f"CG{n:04d}" for n in range(387, 397)), "CG0428"]
    assert sorted(published) == sorted([*wanted, "FB3209", "FB3409"])
    assert all("CDISC" in published[name] and "CORE-" in published[name] for name in wanted)
    assert published["FB3209"].startswith("FDA")
    assert len({rule.id for rule in rules()}) == len(rules())


OWN = {
    "AE-JSON": '{"AETERM": 1',
    "AE-TERM": [{"AESER": "N"}],
    "AE-START": [EVENT | {"AESTDTC": "2026-02-30"}],
    "AE-END": [EVENT | {"AEENDTC": "soon"}],
    "AE-SEV": [EVENT | {"AESEV": "Mild"}],
    "AE-OUT": [EVENT | {"AEOUT": "RESOLVED"}],
    "AE-ACN": [EVENT | {"AEACN": "STOPPED"}],
    "AE-TOXGR": [EVENT | {"AETOXGR": "6"}],
    "AE-FATAL": [EVENT | {"AEOUT": "FATAL"}],
    "AE-DEATH": [EVENT | {"AESER": "Y", "AESDTH": "Y", "AEOUT": "UNKNOWN"}],
    "AE-GRADE5": [EVENT | {"AETOXGR": "5"}],
    "AE-DOMAIN": [EVENT | {"DOMAIN": "MH"}],
    "AE-SEQ": [EVENT | {"AESEQ": 1}, EVENT | {"AESEQ": 1, "AESTDTC": "2026-03"}],
    "AE-SEQ-NUMBER": [EVENT | {"AESEQ": 0}],
    "AE-DUPLICATE": [EVENT, EVENT | {"AESEV": "MILD"}],
    "AE-SUBJECT": [EVENT | {"USUBJID": "FROST-01-002"}],
    "AE-VERBATIM": [EVENT | {"AETERM": "메스꺼움이 심함"}],
    "AE-NEGATED": [EVENT | {"AETERM": "구토"}],
    "AE-FUTURE": [EVENT | {"AESTDTC": "2026-03-20"}],
    "AE-DATE-SOURCE": [EVENT | {"AESTDTC": "2026-03-02"}],
    "AE-LLT": [EVENT | {"AELLT": "속이 이상함"}],
    "AE-LLTCD": [EVENT | {"AELLTCD": 900001}],
    "AE-PT": [EVENT | {"AEDECOD": "throwing up"}],
    "AE-SOC": [EVENT | {"AESOC": "Skin"}],
    "AE-VERSION": [EVENT | {"AEDICTVR": "Frostline toy-0"}],
}


@pytest.mark.parametrize("rule", OWN)
def test_a_rule_of_our_own_finds_what_it_promises(rule: str) -> None:
    answer = OWN[rule] if isinstance(OWN[rule], str) else json.dumps(OWN[rule], ensure_ascii=False)
    found = check_answer(str(answer), NOTE, open_dictionary("toy"))
    assert rule in {one.rule for one in found}


def test_every_rule_is_tried() -> None:
    assert {rule.id for rule in rules()} <= {*GOOD, *FLAGS, *OWN}


def test_clean_answers_break_no_rule() -> None:
    dictionary = open_dictionary("toy")
    whole = complete([EVENT], NOTE, dictionary)
    cut = [EVENT | {"AESTDTC": date} for date in ("2026-03", "2026", "2026-03-12")]
    for answer in ([], [EVENT], whole, *([one] for one in cut), [EVENT | {"AETERM": "속이  울렁거림"}]):
        assert check_answer(json.dumps(answer), NOTE, dictionary) == []
    assert check_answer('{"EVENTS": []}', NOTE) == []


@pytest.mark.parametrize(
    ("note", "term", "is_negated"),
    [
        ("구토 없음", "구토", True),
        ("구토는 전혀 없었음", "구토", True),
        ("발열 부인", "발열", True),
        ("구토(-)", "구토", True),
        ("no rash", "rash", True),
        ("denies any rash", "rash", True),
        ("without fever or rash", "rash", True),
        ("denies nausea, vomiting, rash", "rash", True),
        ("No fever, rash on both arms", "rash", False),
        ("두통과 구토 없음", "두통", True),
        ("두통/구토(-)", "두통", True),
        ("두통, 열은 없음", "두통", False),
        ("구토 2회", "구토", False),
        ("구토 없음. 저녁에 구토", "구토", False),
        ("rash on the arm, no fever", "rash", False),
        ("소화가 안 됨", "소화가 안 됨", False),
        ("구토 있음", "구토", False),
    ],
)
def test_a_term_is_negated_where_the_note_says_so_right_beside_it(note: str, term: str, is_negated: bool) -> None:
    found = check_records([{"AETERM": term, "AESER": "N"}], Context(note), only=["AE-NEGATED"])
    assert bool(found) is is_negated


@pytest.mark.parametrize(
    ("note", "start", "is_known"),
    [
        ("rash x3 days", "2026-03-09", True),
        ("for two weeks", "2026-02-26", True),
        ("사흘간 설사", "2026-03-10", True),
        ("since Monday", "2026-03-09", True),
        ("C2D8 발진", "2026-03-01", True),
        ("C2D1 3월 5일 발진", "2026-03-01", False),
        ("rash x3 days", "2026-03-01", False),
    ],
)
def test_a_date_follows_from_what_the_note_tells(note: str, start: str, is_known: bool) -> None:
    found = check_records([{"AESTDTC": start}], Context(note, "2026-03-12"), only=["AE-DATE-SOURCE"])
    assert (not found) is is_known


def test_names_of_cdash_and_its_forms_are_mapped() -> None:
    form = {
        "aeterm": "worn out",
        "AESTDAT": "05-MAR-2026",
        "AESTTIM": "14:30",
        "AEENDAT": "UN-MAR-2026",
        "AESER": "No",
        "AETOXGR": "Grade 2",
        "AEONGO": "N",
        "AESDTH": None,
        "AELLTCD": 900064.0,
        "AESEQ": "3",
    }
    assert to_sdtm(form) == {
        "AETERM": "worn out",
        "AESTDTC": "2026-03-05T14:30",
        "AEENDTC": "2026-03",
        "AESER": "N",
        "AETOXGR": "2",
        "AELLTCD": 900064,
        "AESEQ": 3,
    }


def test_task_files_name_the_checks_that_there_are() -> None:
    assert set(CHECKS) == set(task_file.Verify.__args__)
    assert find_check("sdtm_ae")("[]", NOTE) == []
    with pytest.raises(UsageError, match=r"verify is none_such; expected one of .*sdtm_ae"):
        find_check("none_such")
