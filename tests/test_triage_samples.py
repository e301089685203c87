"""The hand-written samples of triage, ae_triage and choice: enough of them, different, rightly labelled, of nobody."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from helpers import ROOT

from toolkit.clinical.red_flags import read_red_flags
from toolkit.clinical.reporting import reporting_clock
from toolkit.clinical.verification import find_check
from toolkit.data.identifiers import IdentifierFinder
from toolkit.runtime.errors import ConfigError
from toolkit.tasks.choose import load_task

FOLDER = ROOT / "examples" / "data" / "clinical"
FILES = {
    "triage_ko": "triage", "triage_en": "triage_en", "ae_triage_ko": "ae_triage", "ae_triage_en": "ae_triage",
}  # fmt: skip
MOST_SHARED = 0.5
"""Most words that two notes may share, of those that either has."""


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_each_row_is_read_by_its_task_and_its_answer_breaks_no_rule(name: str) -> None:
    task, read = load_task(f"recipes/tasks/{FILES[name]}.yaml"), rows(name)
    check = find_check(task.spec.verify or "")
    assert len(read) >= (60 if name.endswith("ko") else 20)
    for row in read:
        sample = task.read(row)
        assert check(sample.answer or "", row) == [], row["NOTE"]
        assert sample.turns[0].content.startswith(row["NOTE"])  # the note comes first
        assert row["LANGUAGE"] == name[-2:]
    assert IdentifierFinder().count(read) == {}
    subjects = [row["USUBJID"] for row in read]
    assert len(set(subjects)) == len(subjects)
    assert all(re.fullmatch(r"FROST-01-\d{3}", subject) for subject in subjects)


def test_no_two_notes_share_most_of_their_words() -> None:
    words = [set(re.findall(r"\w+", row["NOTE"].casefold())) for name in FILES for row in rows(name)]
    shared = max(len(one & other) / len(one | other) for one, other in combinations(words, 2))
    assert shared <= MOST_SHARED


@pytest.mark.parametrize("name", ["triage_ko", "triage_en"])
def test_every_class_is_there_and_no_rule_asks_for_more_than_the_label(name: str) -> None:
    rules, read = read_red_flags(), rows(name)
    counts = Counter(row["CLASS"] for row in read)
    assert len(counts) == 3
    assert min(counts.values()) >= len(read) // 4
    for row in read:
        met, _ = rules.find(row["NOTE"], row["LANGUAGE"])
        assert all(flag.at_least <= (rules.number(row["CLASS"]) or 0) for flag in met), row["NOTE"]


def test_some_emergencies_are_found_by_no_rule_and_some_denials_by_all() -> None:
    """The rules are no answer to the samples."""
    rules, read = read_red_flags(), rows("triage_ko") + rows("triage_en")
    found = [(row, *rules.find(row["NOTE"], row["LANGUAGE"])) for row in read]
    emergencies = [met for row, met, _ in found if rules.number(row["CLASS"]) == 2]
    assert 2 <= sum(not met or met[0].at_least < 2 for met in emergencies) < len(emergencies) / 2
    assert sum(bool(denied) for _, _, denied in found) >= 5


def test_every_value_and_clock_of_adverse_events_is_there() -> None:
    read = rows("ae_triage_ko") + rows("ae_triage_en")
    assert {row["SERIOUS"] for row in read} == {"Y", "N", "U"}
    assert {one for row in read for one in row["CRITERIA"]} == {
        "AESDTH", "AESLIFE", "AESHOSP", "AESDISAB", "AESCONG", "AESMIE",
    }  # fmt: skip
    assert len({row["OUTCOME"] for row in read}) == 6
    assert len({row["ACTION"] for row in read}) == 6
    names = ("serious", "causality", "expectedness", "criteria")
    clocks = [reporting_clock({name: row[name.upper()] for name in names}, row) for row in read]
    assert {clock.days for clock in clocks} == {7, 15, None}
    assert {clock.is_provisional for clock in clocks} == {True, False}
    assert any(clock.days and clock.due is None for clock in clocks)  # the day of awareness is missing


@pytest.mark.parametrize("column", ["SITE_ACTION", "disposition", "risk_pred"])
def test_a_column_that_gives_the_outcome_away_is_refused_by_name(column: str) -> None:
    with pytest.raises(ConfigError, match=f"columns.note reads {column}, which gives the outcome away"):
        load_task({"extends": "recipes/tasks/triage.yaml", "columns": {"note": column}})


def test_the_option_of_an_explained_answer_is_its_first_line() -> None:
    sample = load_task("recipes/tasks/triage.yaml").read(rows("triage_ko")[0])
    assert (sample.label, sample.options) == ("응급", ("자가 관리", "오늘 연락", "응급"))
    assert sample.explained
    assert sample.answer == "응급\n" + rows("triage_ko")[0]["REASON"]
    without = load_task("recipes/tasks/triage.yaml").read({"NOTE": "두통", "CLASS": "응급"})
    assert (without.answer, without.label) == ("응급", "응급")
    other = {"extends": "recipes/tasks/triage.yaml", "target": "{{ reason }}\n{{ label }}"}
    from toolkit.tasks.sample import RowFaultError

    with pytest.raises(RowFaultError, match="does not begin with its option '응급'"):
        load_task(other).read({"NOTE": "두통", "CLASS": "응급", "REASON": "심하다"})


def test_each_question_with_options_has_one_right_answer_at_all_places_alike() -> None:
    read = rows("choice_ko")
    task = load_task("choice")
    samples = [task.read(row) for row in read]
    assert len({row["question"] for row in read}) == len(read) == 30
    for row, sample in zip(read, samples, strict=True):
        texts = [row[letter] for letter in "ABCDE"]
        assert len(set(texts)) == 5
        assert (sample.options, sample.label) == (tuple("ABCDE"), "ABCDE"[row["answer"] - 1])
        assert [sample.turns[0].content.count(text) for text in texts].count(0) == 0
    assert set(Counter(row["answer"] for row in read).values()) == {6}
