"""Labels and probabilities: scikit-learn's values on every resample, and what is not a label or a number is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from sklearn import metrics as sklearn

from toolkit.metrics.calibration import prior_log_loss, probability_metrics
from toolkit.metrics.labels import label_metrics, label_numbers, precision_metrics
from toolkit.metrics.metric import Metric
from toolkit.metrics.resampling import bootstrap, compare, resample_weights
from toolkit.runtime.errors import DataError

NAMES = ("none", "mild", "severe")


def by_name(metrics: list[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


@pytest.mark.parametrize("seed", range(4))
def test_every_resample_scores_as_scikit_learn_does_its_rows(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth, predicted = draw.integers(0, 3, 12), draw.integers(-1, 3, 12)
    found, weights = by_name(label_metrics(truth, predicted, NAMES, ordered=True)), resample_weights(12, seed=seed)[:20]
    f1, kappa = (found[name].score(weights @ found[name].statistics) for name in ("macro_f1", "quadratic_kappa"))
    for own_f1, own_kappa, counts in zip(f1, kappa, weights, strict=True):
        rows = np.repeat(np.arange(12), counts.astype(int))
        y, z = truth[rows], predicted[rows]
        macro = sklearn.f1_score(y, z, labels=[0, 1, 2], average="macro", zero_division=0)
        assert own_f1 == pytest.approx(macro, abs=1e-12)
        labels = z >= 0  # those that are none are left out of kappa alone
        if len({*y[labels], *z[labels]}) > 1:
            public = sklearn.cohen_kappa_score(y[labels], z[labels], labels=[0, 1, 2], weights="quadratic")
            assert own_kappa == pytest.approx(public, abs=1e-12)


def test_precision_is_scikit_learns_and_undefined_for_a_label_that_is_never_predicted() -> None:
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, -1])
    found = {metric.name: metric.value for metric in precision_metrics(truth, predicted, NAMES)}
    public = sklearn.precision_score(truth, predicted, labels=[0, 1, 2], average=None, zero_division=np.nan)
    expected = dict(zip([f"precision/{name}" for name in NAMES], public, strict=True))
    assert found == pytest.approx(expected, nan_ok=True)
    assert math.isnan(found["precision/severe"])


def test_labels_have_their_number_and_what_is_none_has_minus_one() -> None:
    assert label_numbers(["mild", None, "Severe", "none"], NAMES).tolist() == [1, -1, -1, 0]


def test_a_single_class_has_full_marks_and_no_kappa() -> None:
    found = by_name(label_metrics(np.zeros(5, int), np.zeros(5, int), ["yes"], ordered=True))
    assert (found["accuracy"].value, found["macro_f1"].value, found["within_one"].value) == (1, 1, 1)
    assert math.isnan(found["quadratic_kappa"].value)
    assert math.isnan(bootstrap(found["quadratic_kappa"], resample_weights(5)).low)


def test_answers_that_are_all_no_labels_have_no_rate_above_or_below() -> None:
    found = by_name(label_metrics(np.array([0, 1]), np.array([-1, -1]), NAMES, ordered=True))
    assert (found["accuracy"].value, found["macro_f1"].value, found["valid"].value) == (0, 0, 0)
    assert all(math.isnan(found[name].value) for name in ("under_rate", "over_rate", "quadratic_kappa"))


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([-1], [0], "a right label has the number -1; expected one from 0 to 2"),
        ([0], [3], "a predicted label has the number 3; expected one from -1 to 2"),
        ([0, 1], [0], "2 labels and 1 predictions"),
        ([], [], "0 labels and 0 predictions"),
    ],
)
def test_numbers_that_are_no_labels_are_refused(truth: list[int], predicted: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_metrics(np.array(truth, int), np.array(predicted, int), NAMES)


@pytest.mark.parametrize("seed", range(4))
def test_ece_is_the_papers_also_where_probabilities_lie_on_the_edges_of_bins(seed: int) -> None:
    draw = np.random.default_rng(seed)
    numbers = draw.multinomial(15, [0.5, 0.3, 0.2], 80)
    truth, probabilities = draw.integers(0, 3, 80), numbers / 15
    largest, right = probabilities.max(1), probabilities.argmax(1) == truth
    edges, expected = np.linspace(0, 1, 16), 0.0
    for lower, upper in pairwise(edges):  # as github.com/gpleiss/temperature_scaling
        if (inside := (largest > lower) & (largest <= upper)).any():
            expected += abs(right[inside].mean() - largest[inside].mean()) * inside.mean()
    assert by_name(probability_metrics(truth, probabilities))["ece"].value == pytest.approx(expected, abs=1e-12)


def test_two_classes_have_scikit_learns_whole_brier_score() -> None:
    draw = np.random.default_rng(0)
    truth, probabilities = draw.integers(0, 2, 50), draw.dirichlet([1, 1], 50)
    public = sklearn.brier_score_loss(truth, probabilities[:, 1])
    assert by_name(probability_metrics(truth, probabilities))["brier"].value == pytest.approx(2 * public)


def test_the_priors_loss_is_that_of_its_shares_and_pairs_with_a_models() -> None:
    truth, counts = np.array([0, 0, 1, 2]), np.array([6, 3, 1])
    prior = prior_log_loss(truth, counts)
    public = sklearn.log_loss(truth, np.tile(counts / 10, (4, 1)), labels=[0, 1, 2])
    assert prior.value == pytest.approx(public, abs=1e-12)
    certain = by_name(probability_metrics(truth, np.eye(3)[truth]))["log_loss"]
    assert compare(certain, prior, resample_weights(4)).high < 0
    assert 36 < prior_log_loss(np.array([1]), np.array([5, 0])).value < 37
    with pytest.raises(DataError, match=r"of each class are \[0, 0\]; expected counts from 0, not all 0"):
        prior_log_loss(np.array([0]), np.array([0, 0]))


def test_a_model_that_diverged_has_no_value_and_shows_no_difference() -> None:
    truth = np.array([0, 1, 1])
    broken = probability_metrics(truth, np.array([[0.5, 0.5], [np.nan, np.nan], [0.1, 0.9]]))
    whole = probability_metrics(truth, np.full((3, 2), 0.5))
    for ours, base in zip(broken, whole, strict=True):
        assert math.isnan(ours.value)
        assert compare(ours, base, resample_weights(3, resamples=50)).p > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda truth, p: (truth, p * 1.1), "2 rows have numbers such as .*; expected probabilities"),
        (lambda truth, p: (truth, p + np.array([1, -1])), "2 rows have numbers such as"),
        (lambda truth, p: (truth + 1, p), "a right class has the number 2; expected one from 0 to 1"),
        (lambda truth, p: (truth[:1], p), "1 labels and 2 probabilities"),
    ],
)
def test_what_are_no_probabilities_is_refused(change: Callable[..., tuple[np.ndarray, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        probability_metrics(*change(np.array([0, 1]), np.array([[0.5, 0.5], [0.2, 0.8]])))
