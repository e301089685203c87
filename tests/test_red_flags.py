"""Red flags override a model, and what a report denies is none; the check of triage answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.clinical.red_flags import OWN_RULES, read_red_flags
from toolkit.clinical.triage import ABSTAIN, check_answer, decide
from toolkit.runtime.errors import DataError

KOREAN = ("자가 관리", "오늘 연락", "응급")
ENGLISH = ("self-care", "contact today", "emergency")

DENIED = {
    "no chest pain": "RF02", "I don't have any chest pain": "RF02", "no fever, cough, or chest pain": "RF02",
    "no chest pain, dizziness or fainting": "RF05", "denies chest pressure": "RF02", "never had a seizure": "RF05",
    "without passing out": "RF05", "Chest pain: no": "RF02", "가슴 통증은 없어요": "RF02", "가슴이 안 아파요": "RF02",
    "가슴 통증이나 호흡곤란은 없고 열만 있어요": "RF02", "기절한 적은 없어요": "RF05", "입술이 붓지는 않았어요": "RF08",
    "가슴이 아픈 건 아니고 등이 아파요": "RF02", "죽고 싶다는 생각은 없어요": "RF09", "chest pain (-)": "RF02",
}  # fmt: skip
ASSERTED = {
    "no relief from chest pain": "RF02", "not sure if this is chest pain or heartburn": "RF02",
    "no fever but chest pain since noon": "RF02", "no appetite. chest pain": "RF02", "no fever, chest pain": "RF02",
    "가슴 통증 때문에 잠을 못 잤어요": "RF02", "흉통, 식욕 없음": "RF02", "흉통이 끊임없이 이어져요": "RF02",
    "가슴 통증이 없어졌어요": "RF02", "열은 없는데 가슴이 아파요": "RF02", "숨을 못 쉬겠어요": "RF03",
    "의식이 없어요": "RF05", "I can't breathe": "RF03", "피가 멈추지 않아요": "RF06", "살고 싶지 않아요": "RF09",
    "I haven't peed since yesterday": "RF14", "가슴 통증으로 식욕이 없어요": "RF02", "체온 38.4도": "RF10",
    "가슴 통증이 있어 어쩔 수 없어요": "RF02",
}  # fmt: skip


@pytest.mark.parametrize("report", DENIED)
def test_what_a_report_denies_is_no_red_flag_and_is_shown_as_denied(report: str) -> None:
    met, denied = read_red_flags().find(report)
    assert met == []
    assert DENIED[report] in [flag.rule for flag in denied]


@pytest.mark.parametrize("report", ASSERTED)
def test_what_is_not_plainly_denied_is_a_red_flag(report: str) -> None:
    met, _ = read_red_flags().find(report)
    assert ASSERTED[report] in [flag.rule for flag in met]


@pytest.mark.parametrize(
    "report", ["체중 38.5 kg", "코가 막히고 콧물이 나요", "눈앞이 노래요", "a sweater in my chest of drawers"]
)
def test_ordinary_reports_have_none(report: str) -> None:
    assert read_red_flags().find(report) == ([], [])


def test_a_rule_of_several_groups_needs_each_of_them() -> None:
    rules = read_red_flags()
    both, _ = rules.find("가슴이 아프고 식은땀이 나요", "ko")
    assert [(flag.rule, flag.at_least) for flag in both] == [("RF01", 2), ("RF02", 1)]
    assert both[0].words == ("가슴이 아프", "식은땀")
    one, _ = rules.find("가슴이 아프지만 식은땀은 없어요", "ko")
    assert [flag.rule for flag in one] == ["RF02"]


def test_a_red_flag_overrides_a_sure_model_and_says_so() -> None:
    decision = decide("가슴이 쥐어짜듯 아프고 식은땀이 나요", KOREAN, [0.97, 0.02, 0.01], 0.5, "ko")
    assert (decision.label, decision.decided_by, decision.model_label) == ("응급", "rule", "자가 관리")
    shown = decision.as_columns("ko")
    assert shown["RED_FLAGS"][0]["words"] == ["가슴이 쥐어짜듯 아프", "식은땀"]
    assert shown["NOTICE"] == "연구용이며 진료에 쓰지 않습니다."


def test_a_rule_never_makes_a_report_less_urgent_and_the_model_keeps_its_own() -> None:
    decision = decide("chest pain", ENGLISH, [0.0, 0.1, 0.9], 0.5)
    assert (decision.label, decision.decided_by) == ("emergency", "model")
    assert [flag.rule for flag in decision.red_flags] == ["RF02"]


def test_an_unsure_model_abstains_but_for_the_most_urgent_rules() -> None:
    assert decide("runny nose", ENGLISH, [0.5, 0.3, 0.2], 0.6).label == ABSTAIN["en"]
    unsure = decide("chest pain", ENGLISH, [0.5, 0.3, 0.2], 0.6)  # today, by the rule, is not enough to go by
    assert (unsure.label, unsure.decided_by, len(unsure.red_flags)) == ("abstain", "nobody", 1)
    assert decide("I can't breathe", ENGLISH, [0.5, 0.3, 0.2], 0.6).decided_by == "rule"
    assert decide("콧물", KOREAN, [0.4, 0.3, 0.3], 0.6, "ko").label == "판단 보류"


@pytest.mark.parametrize("labels", [("low", "high"), ENGLISH[::-1], (*ENGLISH, "other")])
def test_labels_that_are_not_the_rules_classes_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="expected the same ones in the same order"):
        decide("chest pain", labels, [1 / len(labels)] * len(labels), 0.5)


WRONG = {
    "rules: [": "cannot be read",
    "rules: []": "have no classes",
    "classes: {a: {en: a}}\nrules: [{id: X, at_least: b, all: [[x]]}]": "X has at_least b; expected one of a",
    "classes: {a: {en: a}}\nrules: [{id: X, at_least: a, all: [['(']]}]": "is no regular expression",
    "classes: {a: {en: a}}\nrules: [{id: X, at_least: a, all: [['x*']]}]": "matches the empty text",
    "classes: {a: {en: a}}\nrules: [{id: X, at_least: a, all: []}]": "no groups of words",
    "classes: {a: {en: a}}\nrules: [{id: X}]": "rule 1 lacks a key",
    "classes: {a: {en: a}}\nrules: [{id: X, at_least: a, all: [[x]]}, {id: X, at_least: a, all: [[y]]}]": "an id twice",
}


@pytest.mark.parametrize("text", WRONG)
def test_rules_that_cannot_be_used_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=WRONG[text]):
        read_red_flags(path)


def test_rules_of_the_users_own_have_their_own_classes(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    rule = "{id: OWN1, at_least: go, name: {en: bee sting}, all: [[stung]]}"
    path.write_text(f"classes: {{stay: {{en: stay}}, go: {{en: go}}}}\nrules: [{rule}]", encoding="utf-8")
    decision = decide("I was stung", ("stay", "go"), [1.0, 0.0], 0.5, rules=read_red_flags(path))
    assert (decision.label, decision.red_flags[0].name) == ("go", "bee sting")
    assert read_red_flags(OWN_RULES).classes[2] == ("emergency", "응급", "emergency")


ROW = {"NOTE": "가슴 통증은 없어요. 숨을 못 쉬겠어요", "LANGUAGE": "ko"}
ANSWERS = {
    "응급\n“숨을 못 쉬겠어요”라고 한다.": [],
    "아마 응급\n“숨을 못 쉬겠어요”": ["TR01"],
    "오늘 연락\n“숨을 못 쉬겠어요”라고 한다.": ["TR02"],
    "응급\n“숨이 막혀요”라고 한다.": ["TR03"],
    "응급": ["TR04"],
    "": ["TR01"],
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_check_names_what_an_answer_breaks(answer: str) -> None:
    assert [violation.rule for violation in check_answer(answer, ROW)] == ANSWERS[answer]
