"""Resampling: intervals of ratios hold, verdicts keep to their interval, rows that do not fit are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import false_discovery_control

from toolkit.metrics.metric import mean_metric
from toolkit.metrics.resampling import Difference, bootstrap, claim, compare, holm, over_seeds, resample_weights
from toolkit.runtime.errors import DataError


def test_an_interval_is_scipys_percentile_interval() -> None:
    values = np.random.default_rng(0).exponential(1, 200)
    own = bootstrap(mean_metric("m", values), resample_weights(200, resamples=20_000))
    public = scipy_bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert [own.low, own.high] == pytest.approx([public.low, public.high], abs=0.01)


def test_the_mean_of_groups_is_held_by_resamples_of_groups_alone() -> None:
    by_group = by_row = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        groups = np.repeat(np.arange(60), 5)
        metric = mean_metric("m", draw.normal(0, 1, 60)[groups] + draw.normal(0, 0.2, 300))
        grouped = bootstrap(metric, resample_weights(300, groups.tolist(), seed=seed, resamples=300))
        rows = bootstrap(metric, resample_weights(300, seed=seed, resamples=300))
        by_group += grouped.low <= 0 <= grouped.high
        by_row += rows.low <= 0 <= rows.high
    assert by_group >= 90  # 95 expected
    assert by_row < 75


def test_rows_of_a_group_are_drawn_together_and_as_many_groups_as_there_are() -> None:
    weights = resample_weights(5, ["a", "b", "a", "c", "b"], resamples=40)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert (resample_weights(9, seed=3) == resample_weights(9, seed=3)).all()
    assert (resample_weights(9, seed=3) != resample_weights(9, seed=4)).any()


@given(st.integers(0, 10_000), st.floats(-1, 1), st.sampled_from([True, False]))
@settings(max_examples=60, deadline=None)
def test_what_is_claimed_is_in_the_interval(seed: int, shift: float, higher: bool) -> None:
    draw = np.random.default_rng(seed)
    ours, base = mean_metric("m", draw.normal(shift, 1, 60)), mean_metric("m", draw.normal(0, 1, 60))
    difference = compare(ours, base, resample_weights(60, seed=seed, resamples=200))
    verdict = claim(difference, higher, 60, difference.p)
    sides = {True: "better" if higher else "worse", False: "worse" if higher else "better"}
    assert 0 < difference.p <= 1
    if verdict == "no difference shown":
        assert difference.p > 0.05
    else:
        assert difference.low * difference.high > 0
        assert verdict == sides[difference.value > 0]


@pytest.mark.parametrize("value", [0.1, 0.0, math.nan])
def test_a_value_that_is_not_on_the_side_of_its_interval_shows_nothing(value: float) -> None:
    assert claim(Difference(value, -0.3, -0.2, 0.002), True, 100, 0.002) == "no difference shown"


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_rejects_what_its_own_definition_rejects(p_values: list[float]) -> None:
    adjusted = list(holm({str(at): p for at, p in enumerate(p_values)}).items())
    ordered, rejected = sorted(p_values), 0
    while rejected < len(ordered) and ordered[rejected] * (len(ordered) - rejected) <= 0.05:
        rejected += 1
    assert sum(p <= 0.05 for _, p in adjusted) == rejected
    assert all(p >= p_values[int(at)] for at, p in adjusted)
    milder = false_discovery_control(p_values)  # Benjamini and Hochberg's, never stricter than Holm's
    assert all(p >= milder[int(at)] - 1e-12 for at, p in adjusted)


def test_seeds_are_told_by_mean_deviation_and_range() -> None:
    found = over_seeds([0.5, 0.75, 0.25])
    assert (found.mean, found.deviation, found.lowest, found.highest, found.n) == (0.5, 0.25, 0.25, 0.75, 3)
    assert over_seeds([0.5]).deviation is None
    with pytest.raises(DataError, match="has no values; expected that of at least one run"):
        over_seeds([])


def test_resamples_of_other_rows_are_refused() -> None:
    two, three = mean_metric("ours", np.ones(2)), mean_metric("base", np.ones(3))
    with pytest.raises(DataError, match="ours is of 2 rows, and the resamples of 3"):
        bootstrap(two, resample_weights(3))
    with pytest.raises(DataError, match="base is of 3 rows, and the resamples of 2"):
        compare(two, three, resample_weights(2))
    with pytest.raises(DataError, match="of 3 rows with the groups of 1"):
        resample_weights(3, ["a"])
    with pytest.raises(DataError, match="asked for of 0 rows"):
        resample_weights(0)
