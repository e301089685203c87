"""Abstaining: risk against coverage, and a plain classifier beside the model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from toolkit.metrics.abstention import MOST_LEVELS, coverage_curve, coverage_metrics
from toolkit.runtime.errors import DataError


def drawn(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 3, rows), random.dirichlet([1, 1, 1], rows)


@pytest.mark.parametrize("rows", [1, 7, MOST_LEVELS])
def test_aurc_is_the_mean_risk_of_the_surest_rows_and_accuracy_is_of_the_surest_part(rows: int) -> None:
    truth, probabilities = drawn(rows)
    order = np.argsort(-probabilities.max(1))
    wrong = (probabilities.argmax(1) != truth)[order]
    risks = np.cumsum(wrong) / np.arange(1, rows + 1)
    aurc, accuracy = coverage_metrics(truth, probabilities)
    assert aurc.value == pytest.approx(risks.mean())
    assert accuracy.value == pytest.approx(1 - risks[math.ceil(0.8 * rows) - 1])
    assert (aurc.higher_is_better, accuracy.higher_is_better) == (False, True)


def test_of_many_rows_the_levels_are_binned_and_nearly_the_same() -> None:
    truth, probabilities = drawn(3000)
    wrong = (probabilities.argmax(1) != truth)[np.argsort(-probabilities.max(1))]
    aurc, _ = coverage_metrics(truth, probabilities)
    assert aurc.statistics.shape == (3000, 2 * MOST_LEVELS)
    assert aurc.value == pytest.approx((np.cumsum(wrong) / np.arange(1, 3001)).mean(), abs=0.005)


def test_a_model_that_is_always_equally_sure_gains_nothing() -> None:
    truth = np.array([0, 1, 2, 0])
    same = np.tile([0.6, 0.3, 0.1], (4, 1))
    aurc, accuracy = coverage_metrics(truth, same)
    assert (aurc.value, accuracy.value) == (0.5, 0.5)
    (point,) = coverage_curve(truth, same)
    assert (point.confidence, point.coverage, point.risk, point.under, point.over) == (0.6, 1.0, 0.5, 0.5, 0.0)


def test_a_row_of_nan_leaves_the_values_undefined_and_resamples_without_it_defined() -> None:
    truth, probabilities = drawn(5)
    probabilities[2] = np.nan
    for metric in coverage_metrics(truth, probabilities):
        assert math.isnan(metric.value)
    assert coverage_curve(truth, probabilities) == ()
    with pytest.raises(DataError, match="0 labels"):
        coverage_metrics(truth[:0], probabilities[:0])


def test_the_curve_falls_from_all_rows_to_the_surest() -> None:
    truth, probabilities = drawn(50)
    curve = coverage_curve(truth, probabilities)
    assert [point.coverage for point in curve] == [step / 10 for step in range(10, 0, -1)]
    for point in curve:
        answered = probabilities.max(1) >= point.confidence
        given = probabilities.argmax(1)[answered]
        assert point.risk == pytest.approx((given != truth[answered]).mean())
        assert point.under + point.over == pytest.approx(point.risk)


def test_a_sum_of_several_resamples_has_a_value_each() -> None:
    truth, probabilities = drawn(20)
    for metric in coverage_metrics(truth, probabilities):
        sums = np.stack([metric.statistics.sum(0), metric.statistics[:10].sum(0)])
        assert metric.score(sums).shape == (2,)
        assert metric.score(sums)[0] == metric.value
