"""The sample notes of ae_coding: labels that hold, and no two notes alike."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from typing import Any

from helpers import ROOT

from toolkit.clinical.ae_check import check_answer
from toolkit.clinical.ae_metrics import event_metrics, trivial_events
from toolkit.clinical.dictionary import open_dictionary
from toolkit.clinical.verification import find_check
from toolkit.tasks.choose import load_task

ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (ROOT / "examples/data/clinical/ae_coding.jsonl").read_text(encoding="utf-8").splitlines()
]
MOST_SHARED = 0.4
"""Most words that two notes share, of all that they have."""


def test_there_are_enough_of_every_kind() -> None:
    languages = Counter(row["LANGUAGE"] for row in ROWS)
    assert languages["ko"] >= 60
    assert languages["en"] >= 20
    numbers = Counter(len(row["EVENTS"]) for row in ROWS)
    assert min(numbers[count] for count in (0, 1, 2, 3)) >= 2
    assert sum("AELLT" not in event for row in ROWS for event in row["EVENTS"]) >= 2  # no term in the dictionary
    assert len({row["USUBJID"] for row in ROWS}) == len(ROWS)


def test_every_label_is_one_that_the_task_allows_and_breaks_no_rule() -> None:
    task, dictionary = load_task("ae_coding"), open_dictionary("toy")
    for row in ROWS:
        answer = task.read(row).answer
        assert answer is not None
        assert json.loads(answer) == row["EVENTS"]
        assert check_answer(answer, row, dictionary) == [], row["USUBJID"]


def test_no_two_notes_share_more_than_a_part_of_their_words() -> None:
    words = [set(re.findall(r"\w+", row["NOTE"].casefold())) for row in ROWS]
    for (at, one), (to, other) in combinations(enumerate(words), 2):
        shared = len(one & other) / len(one | other)
        assert shared <= MOST_SHARED, (ROWS[at]["NOTE"], ROWS[to]["NOTE"])


def test_the_reference_scores_full_and_trivial_answers_do_not() -> None:
    references = [json.dumps(row["EVENTS"], ensure_ascii=False) for row in ROWS]
    own = {one.name: one.value for one in event_metrics(references, references, ROWS, find_check("sdtm_ae"))}
    assert set(own.values()) == {1.0}
    names = open_dictionary("toy")
    trivial = trivial_events(ROWS, [names.candidate_names(row["NOTE"], 10) for row in ROWS])
    for answers in trivial.values():
        scores = {one.name: one.value for one in event_metrics(answers, references, ROWS, find_check("sdtm_ae"))}
        assert scores["events/exact"] < 0.2
        assert scores["events/f1"] < 0.8


def test_events_are_aligned_one_to_one_whatever_their_order() -> None:
    wanted = [{"AETERM": "두통", "AELLT": "두통", "AESER": "N"}, {"AETERM": "구토", "AELLT": "구토", "AESER": "Y"}]
    given = [wanted[1] | {"AESER": "N"}, {"AETERM": "심한 두통", "AELLT": "두통", "AESER": "N"}, wanted[1]]
    found = event_metrics(
        [json.dumps(given), "no JSON", "[]"], [json.dumps(wanted), json.dumps(wanted), "[]"], [{}] * 3,
        find_check("sdtm_ae"),
    )  # fmt: skip
    scores = {one.name: one.value for one in found}
    assert scores["events/precision"] == 2 / 3
    assert scores["events/recall"] == 2 / 4
    assert scores["events/f1"] == 4 / 7
    assert scores["events/exact"] == 1 / 3
    assert scores["field/AELLT"] == 2 / 4
    assert scores["field/AETERM"] == 1 / 4
    assert scores["field/AESER"] == 1 / 4 or scores["field/AESER"] == 2 / 4  # the pair of 구토 is the first of equals
