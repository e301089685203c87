"""Metrics: the values of the libraries that everybody knows, whatever is summed, and intervals that hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn import metrics as sklearn

from toolkit.metrics.calibration import probability_metrics
from toolkit.metrics.fields import field_metrics
from toolkit.metrics.labels import confusion, label_metrics
from toolkit.metrics.metric import Metric, mean_metric
from toolkit.metrics.morphemes import is_korean, morphemes, tokenizer_for, words
from toolkit.metrics.numbers import number_metrics, numbers_in
from toolkit.metrics.overlap import overlap_metrics, rouge_l, token_f1
from toolkit.metrics.perplexity import loss_metrics
from toolkit.metrics.pubmedqa import official_score
from toolkit.metrics.resampling import Difference, bootstrap, claim, compare, holm, resample_weights
from toolkit.runtime.errors import DataError

KOREAN = ("아스피린은 심근경색의 위험을 낮춥니다.", "환자는 수술 후 3일째 퇴원하였다.", "효과가 없었다.")
ENGLISH = ("Aspirin lowers the risk of infarction.", "Patients left on day 3.", "There was no effect at all.")


def values(metrics: list[Metric]) -> dict[str, float]:
    return {metric.name: metric.value for metric in metrics}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("labels", [2, 3, 5])
def test_labels_score_as_in_scikit_learn(seed: int, labels: int) -> None:
    draw = np.random.default_rng(seed)
    truth, predicted = draw.integers(0, labels, 40), draw.integers(0, labels, 40)
    names = [f"class {number}" for number in range(labels)]
    found = values(label_metrics(truth, predicted, names, ordered=True))
    numbers = list(range(labels))
    macro = sklearn.f1_score(truth, predicted, labels=numbers, average="macro", zero_division=0)
    recall = sklearn.recall_score(truth, predicted, labels=numbers, average=None, zero_division=np.nan)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(macro, abs=1e-12)
    for name, value in zip(names, recall, strict=True):
        assert found[f"recall/{name}"] == pytest.approx(value, abs=1e-12, nan_ok=True)
    kappa = sklearn.cohen_kappa_score(truth, predicted, labels=numbers, weights="quadratic")
    assert found["quadratic_kappa"] == pytest.approx(kappa, abs=1e-12)
    assert found["within_one"] == pytest.approx((np.abs(truth - predicted) <= 1).mean())
    assert found["under_rate"] == pytest.approx((predicted < truth).mean())
    assert found["over_rate"] == pytest.approx((predicted > truth).mean())
    assert confusion(truth, predicted, labels)[:, :-1].tolist() == sklearn.confusion_matrix(
        truth, predicted, labels=numbers
    ).tolist()  # fmt: skip


def test_an_answer_that_is_no_label_is_wrong_and_not_valid() -> None:
    found = values(label_metrics(np.array([0, 1, 1, 2]), np.array([0, -1, 1, -1]), ["yes", "no", "maybe"], True))
    assert (found["accuracy"], found["valid"], found["recall/no"], found["recall/maybe"]) == (0.5, 0.5, 0.5, 0.0)
    assert found["quadratic_kappa"] == 1.0  # of the answers that are labels
    assert found["within_one"] == 0.5
    assert confusion(np.array([0, 1]), np.array([-1, 1]), 2).tolist() == [[0, 0, 1], [0, 1, 0]]


def test_recall_of_a_label_that_no_row_has_is_not_defined() -> None:
    found = values(label_metrics(np.array([0, 0]), np.array([0, 1]), ["yes", "no"]))
    assert math.isnan(found["recall/no"])


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_score_as_in_scikit_learn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth, probabilities = draw.integers(0, 3, 60), draw.dirichlet([1, 1, 1], 60)
    found = values(probability_metrics(truth, probabilities))
    assert found["log_loss"] == pytest.approx(sklearn.log_loss(truth, probabilities, labels=[0, 1, 2]), abs=1e-12)
    squares = [sklearn.brier_score_loss(truth == label, probabilities[:, label]) for label in range(3)]
    assert found["brier"] == pytest.approx(sum(squares), abs=1e-12)
    largest, right = probabilities.max(1), probabilities.argmax(1) == truth
    bins = np.digitize(largest, np.linspace(0, 1, 16)[1:-1])
    gaps = [abs(right[bins == own].mean() - largest[bins == own].mean()) * (bins == own).mean() for own in set(bins)]
    assert found["ece"] == pytest.approx(sum(gaps), abs=1e-12)


def test_certainty_that_is_wrong_has_a_finite_loss() -> None:
    found = values(probability_metrics(np.array([1]), np.array([[1.0, 0.0]])))
    assert (found["log_loss"] > 30, math.isfinite(found["log_loss"]), found["brier"], found["ece"]) == (
        True,
        True,
        2,
        1,
    )


@pytest.mark.parametrize("texts", [KOREAN, ENGLISH])
def test_overlap_is_sacrebleus_over_the_corpus(texts: tuple[str, ...]) -> None:
    answers = [texts[1], texts[1] + " " + texts[0], "", texts[2]]
    references = [texts[0], texts[0], texts[1], texts[2]]
    found = values(overlap_metrics(answers, references, words))
    assert found["chrf++"] == pytest.approx(CHRF(word_order=2).corpus_score(answers, [references]).score, abs=1e-9)
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(answers, [references]).score, abs=1e-9)
    assert found["exact_match"] == 0.25


def test_a_resample_of_overlap_is_the_corpus_of_its_rows() -> None:
    answers, references = list(ENGLISH), [*ENGLISH[1:], ENGLISH[0]]
    metric = overlap_metrics(answers, references, None)[0]
    taken = [0, 0, 2]
    weights = np.array([[2.0, 0.0, 1.0]])
    corpus = CHRF(word_order=2).corpus_score([answers[at] for at in taken], [[references[at] for at in taken]])
    assert metric.score(weights @ metric.statistics)[0] == pytest.approx(corpus.score, abs=1e-9)


def test_rouge_l_is_rouge_scores_on_the_same_tokens() -> None:
    class Words:
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    for answer, reference in zip([*KOREAN, *ENGLISH], [*KOREAN[1:], *ENGLISH, KOREAN[0]], strict=True):
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(words(answer), words(reference)) == pytest.approx(expected)
    assert (rouge_l([], ["a"]), token_f1(["a"], [])) == (0.0, 0.0)
    assert token_f1(["a", "b", "a"], ["a", "c"]) == pytest.approx(2 * 1 / 5)


def test_identical_korean_sentences_score_one_where_rouge_score_gives_nothing() -> None:
    alone = RougeScorer(["rougeL"]).score(KOREAN[2], KOREAN[2])["rougeL"].fmeasure
    assert (alone, rouge_l(morphemes(KOREAN[2]), morphemes(KOREAN[2]))) == (0, 1)
    assert tokenizer_for(KOREAN) is morphemes
    assert tokenizer_for(ENGLISH) is words
    assert not is_korean(["The dose of 아스피린 was 100 mg in all of the patients."])


def test_particles_do_not_part_the_same_noun() -> None:
    assert {"환자", "병원"} <= set(morphemes("환자는 병원에 갔다")) & set(morphemes("병원의 환자가 많다"))
    assert not set(words("환자는 병원에 갔다")) & set(words("병원의 환자가 많다"))


def test_korean_without_kiwi_has_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tokenizer_for(KOREAN) is None
    assert {metric.name for metric in overlap_metrics(KOREAN, KOREAN, None)} == {"chrf++", "bleu", "exact_match"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,200명 중 0.50%", {"1200", "0.5"}),
        ("3.5배, 2,000명", {"3.5", "2000"}),
        ("１２와 ١٣", {"12", "13"}),
        ("COVID-19, IL-6", {"19", "6"}),
        ("007", {"7"}),
        ("p < .05, .050", {"0.05"}),
        ("1,2 and 3", {"1", "2", "3"}),
        ("in 2,0000 ml", {"2", "0"}),
        ("none", set()),
    ],
)
def test_numbers_have_one_spelling(text: str, found: set[str]) -> None:
    assert numbers_in(text) == found


def test_a_number_is_made_up_if_neither_context_nor_question_has_it() -> None:
    (metric,) = number_metrics(["12 % of 1200", "30 days", "no"], ["1,200 patients, 12.0%", "three days", "1"])
    assert (metric.value, metric.higher_is_better) == (pytest.approx(1 / 3), False)


def test_fields_of_json_are_compared_one_by_one() -> None:
    references = [
        '{"term": "nausea", "grade": 2, "when": {"day": 1, "serious": true}, "drugs": ["a", "b"]}',
        '{"term": null}',
    ]
    answers = ['{"term": "nausea", "grade": 2.0, "when": {"day": 1, "serious": 1}, "drugs": ["b", "a"]}', "sorry"]
    found = values(field_metrics(answers, references, lambda text: text.startswith("{")))
    assert (found["valid"], found["exact_match"], found["fields"]) == (0.5, 0.0, pytest.approx(3 / 6))
    assert (found["field/term"], found["field/grade"], found["field/when"], found["field/drugs"]) == (0.5, 1, 0, 0)


def test_bits_per_byte_and_perplexity_follow_from_the_same_sums() -> None:
    found = values(loss_metrics(np.array([4.0, 2.0]), np.array([3, 1]), np.array([10, 2])))
    assert (found["loss"], found["perplexity"]) == (1.5, pytest.approx(math.exp(1.5)))
    assert found["bits_per_byte"] == pytest.approx(6 / math.log(2) / 12)
    endless = loss_metrics(np.array([1e4]), np.array([1]), np.array([1]))[1]
    assert endless.value == math.inf


TRUTH = {str(key): label for key, label in enumerate(["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55)}
"""As many of each as the official test set has."""


def test_the_majority_class_has_its_official_score() -> None:
    score = official_score(dict.fromkeys(TRUTH, "yes"), TRUTH)
    assert (round(score.accuracy, 3), round(score.macro_f1, 3)) == (0.552, 0.237)


def _without_one(truth: Mapping[str, str]) -> dict[str, str]:
    return dict(list(truth.items())[1:])


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (_without_one, "lack 1 of 500 ids and have 0 others"),
        (lambda truth: {**truth, "x": "yes"}, "lack 0 of 500 ids and have 1 others"),
        (lambda truth: {**truth, "0": "Yes"}, "'Yes' is no answer of PubMedQA"),
    ],
)
def test_other_predictions_are_refused(predictions: Callable[..., Mapping[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        official_score(predictions(TRUTH), TRUTH)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    held = 0
    for seed in range(200):
        metric = mean_metric("m", np.random.default_rng(seed).normal(1.0, 2.0, 80))
        interval = bootstrap(metric, resample_weights(80, seed=seed))
        held += interval.low <= 1.0 <= interval.high
    assert 180 <= held <= 198  # 190 expected


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(0, 5, 100)
    ours = base + draw.normal(0.5, 0.5, 100)
    weights = resample_weights(100)
    difference = compare(mean_metric("m", ours), mean_metric("m", base), weights)
    alone = bootstrap(mean_metric("m", ours), weights)
    assert difference.low > 0
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)
    assert claim(difference, True, 100, difference.p) == "better"
    assert claim(difference, False, 100, difference.p) == "worse"
    assert claim(difference, True, 49, difference.p) == "too few rows"


def test_copies_of_a_row_are_no_more_rows() -> None:
    once = np.random.default_rng(1).normal(0, 1, 60)
    copies, groups = np.repeat(once, 4), np.repeat(np.arange(60), 4).tolist()
    by_row = bootstrap(mean_metric("m", copies), resample_weights(240))
    by_group = bootstrap(mean_metric("m", copies), resample_weights(240, groups))
    alone = bootstrap(mean_metric("m", once), resample_weights(60))
    assert by_group.high - by_group.low == pytest.approx(alone.high - alone.low, rel=1e-9)
    assert by_row.high - by_row.low < 0.6 * (by_group.high - by_group.low)


def test_the_same_model_twice_shows_nothing() -> None:
    metric = mean_metric("m", np.random.default_rng(0).normal(0, 1, 100))
    difference = compare(metric, metric, resample_weights(100))
    assert (difference.value, difference.p) == (0, 1)
    assert claim(difference, True, 100, 0.0) == "no difference shown"


def test_p_is_uniform_where_there_is_no_difference() -> None:
    found = []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        one, other = (mean_metric("m", draw.normal(0, 1, 80)) for _ in range(2))
        found.append(compare(one, other, resample_weights(80, seed=seed)).p)
    assert min(found) > 0
    assert 3 <= sum(p <= 0.05 for p in found) <= 20  # 10 expected
    assert 80 <= sum(p <= 0.5 for p in found) <= 120


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_resamples_without_a_value_are_left_out() -> None:
    metric = label_metrics(np.array([0, 1]), np.array([0, 1]), ["yes", "no"])[3]
    interval = bootstrap(metric, resample_weights(2))
    assert (interval.low, interval.high) == (1.0, 1.0)
    never = label_metrics(np.array([0]), np.array([0]), ["yes", "no"])[4]
    assert math.isnan(bootstrap(never, resample_weights(1)).low)
    assert compare(never, never, resample_weights(1)).p == 1.0
    assert claim(Difference(math.nan, 0, 0, 1.0), True, 100, 1.0) == "no difference shown"


def test_a_reference_that_is_no_json_is_an_error() -> None:
    with pytest.raises(DataError, match=r"the reference '{' is not JSON"):
        field_metrics(["{}"], ["{"], lambda text: True)
