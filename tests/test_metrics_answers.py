"""Numbers, fields and PubMedQA's answers: hard spellings, hostile answers, the official script."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from toolkit.metrics.fields import field_metrics
from toolkit.metrics.numbers import number_count, number_metrics, numbers_in
from toolkit.metrics.pubmedqa import LABELS, official_score
from toolkit.runtime.errors import DataError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("위험이 3.5배, 2,000명", {"3.5", "2000"}),
        ("１２．５％와 １，２００명", {"12.5", "1200"}),
        ("2020.05.01", {"2020", "5", "1"}),
        ("2020년 5월 1일", {"2020", "5", "1"}),
        ("1,2,3 and 1.5,2.3", {"1", "2", "3", "1.5", "2.3"}),
        ("10⁵ cells, CO₂", {"10", "5", "2"}),
        ("10^5 cells, CO2", {"10", "5", "2"}),
        ("P=.05; it ended.5 of them", {"0.05", "5"}),
        ("1,234,567.50 and 0012", {"1234567.5", "12"}),
        ("...", set()),
    ],
)
def test_hard_spellings_of_numbers_are_read(text: str, found: set[str]) -> None:
    assert numbers_in(text) == found


def test_numbers_are_unsupported_if_they_stand_nowhere_in_the_source() -> None:
    source = "COVID-19 환자 2,000명에서 IL-6가 3.5배 증가했다 (P<.05). 0.50"
    answers = [
        "2000명의 COVID-19 환자", "IL-6는 3.50배", "p = 0.05, 0.5", "1. 증가했다\n2) 3.5배", "4배, 30 %", "IL-8", ""
    ]  # fmt: skip
    share, count = number_metrics(answers, [source] * 7)[0], number_count(answers, [source] * 7)
    assert share.statistics[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert count.statistics[:, 0].tolist() == [0, 0, 0, 0, 2, 1, 0]
    assert [share.value, count.value] == pytest.approx([2 / 7, 3 / 7])
    assert (share.higher_is_better, count.higher_is_better) == (False, None)


REFERENCE = '{"a": {"b": 1, "c": "x"}, "d": []}'


@pytest.mark.parametrize(
    ("answer", "exact", "fields", "of_a"),
    [
        ('{"d": [], "a": {"c": "x", "b": 1.0}}', 1, 1, 1),
        ('{"a": {"b": true, "c": "x"}, "d": []}', 0, 2 / 3, 0),
        ('{"a": 1, "d": {}}', 0, 0, 0),
        ('{"a.b": 1, "a.c": "x", "d": []}', 0, 1 / 3, 0),
        ("", 0, 0, 0),
        ("[1, 2]", 0, 0, 0),
        ('{"a":' * 600 + "1" + "}" * 600, 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
        ("9" * 5000, 0, 0, 0),
    ],
    ids=["equal", "true is no 1", "scalar for object", "dots in a name", "empty", "list", "deep", "deeper", "long"],
)
def test_any_answer_is_scored_by_its_fields(answer: str, exact: float, fields: float, of_a: float) -> None:
    found = {metric.name: metric.value for metric in field_metrics([answer], [REFERENCE], lambda text: True)}
    assert [found["exact_match"], found["fields"], found["field/a"]] == pytest.approx([exact, fields, of_a])


def test_a_field_that_some_references_lack_is_scored_where_it_is() -> None:
    references = ['{"a": 1}', '{"b": 2}', '{"b": 3}']
    found = {metric.name: metric.value for metric in field_metrics(['{"b": 2}'] * 3, references, lambda text: True)}
    assert [found["field/a"], found["field/b"], found["fields"]] == pytest.approx([0, 0.5, 1 / 3])


def test_answers_and_references_have_to_pair() -> None:
    with pytest.raises(DataError, match="1 answers and 2 references"):
        field_metrics(["{}"], ["{}", "{}"], lambda text: True)
    with pytest.raises(DataError, match="0 answers and 0 sources"):
        number_metrics([], [])


@pytest.mark.parametrize("known", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_pubmedqa_scores_as_its_own_script_does(seed: int, known: int) -> None:
    draw = np.random.default_rng(seed)
    truth, predictions = ({str(key): LABELS[draw.integers(known)] for key in range(30)} for _ in range(2))
    pair = [truth[key] for key in sorted(truth)], [predictions[key] for key in sorted(truth)]
    score = official_score(dict(reversed(predictions.items())), truth)
    assert score.accuracy == pytest.approx(accuracy_score(*pair))
    assert score.macro_f1 == pytest.approx(f1_score(*pair, average="macro"))


@pytest.mark.parametrize(
    ("predictions", "truth", "message"),
    [
        ({"1": None}, {"1": "yes"}, "None is no answer of PubMedQA; expected one of yes, no, maybe"),
        ({"1": None, "2": "Yes"}, {"1": "yes", "2": "no"}, "'Yes' is no answer of PubMedQA"),
        ({}, {}, "the truth has no ids"),
        ({"2": "yes"}, {"1": "yes"}, "lack 1 of 1 ids and have 1 others"),
    ],
)
def test_what_the_official_script_cannot_score_is_refused(
    predictions: dict[str, Any], truth: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        official_score(predictions, truth)
