"""Which rows are held out: groups stay together, strata keep their share, and a split that is impossible says so."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from toolkit.data.splits import fold, hold_out
from toolkit.runtime.errors import DataError

LABELS = ["yes"] * 55 + ["no"] * 34 + ["maybe"] * 11
PATIENTS = [f"p{random.Random(row).randrange(30)}" for row in range(100)]


def labels(rows: np.ndarray) -> Counter[str]:
    return Counter(LABELS[row] for row in rows)


def assert_parts(kept: np.ndarray, held_out: np.ndarray, count: int) -> None:
    assert sorted([*kept, *held_out]) == list(range(count))
    assert list(kept) == sorted(kept)
    assert list(held_out) == sorted(held_out)


def test_a_plain_hold_out_draws_what_earlier_versions_drew() -> None:
    kept, held_out = hold_out(1000, 0.1, seed=42)
    assert_parts(kept, held_out, 1000)
    assert list(held_out) == sorted(random.Random(42).sample(range(1000), 100))
    assert list(held_out[:3]) == [6, 25, 27]


def test_at_least_one_row_is_held_out_and_one_is_kept() -> None:
    assert len(hold_out(3, 0.01, seed=0)[1]) == 1
    with pytest.raises(DataError, match=r"data.test 0.9 of 3 rows leaves none to train on; expected a smaller"):
        hold_out(3, 0.9, seed=0, key="data.test")


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.37])
def test_a_stratified_hold_out_has_its_share_of_each_label_to_within_one_row(fraction: float) -> None:
    kept, held_out = hold_out(100, fraction, 7, strata=LABELS)
    assert_parts(kept, held_out, 100)
    assert len(held_out) == round(100 * fraction)
    for label, count in Counter(LABELS).items():
        assert abs(labels(held_out)[label] - count * fraction) < 1


@pytest.mark.parametrize("strata", [None, LABELS])
def test_no_group_is_on_both_sides(strata: list[str] | None) -> None:
    kept, held_out = hold_out(100, 0.2, 7, PATIENTS, strata)
    assert_parts(kept, held_out, 100)
    assert not {PATIENTS[row] for row in kept} & {PATIENTS[row] for row in held_out}
    assert 17 <= len(held_out) <= 23
    if strata:
        assert 1 <= labels(held_out)["maybe"] <= 4


def test_groups_are_held_out_whatever_their_size() -> None:
    groups = ["large"] * 20 + [f"{row // 10}" for row in range(20, 60)] + [f"{row}" for row in range(60, 200)]
    held = {groups[row] for seed in range(20) for row in hold_out(200, 0.2, seed, groups)[1]}
    assert {"2", "3", "4", "5"} & held
    assert len(held) > 50


@pytest.mark.parametrize("groups", [None, PATIENTS])
@pytest.mark.parametrize("strata", [None, LABELS])
def test_every_row_is_held_out_in_exactly_one_fold(groups: list[str] | None, strata: list[str] | None) -> None:
    parts = [fold(100, 5, number, 3, groups, strata) for number in range(5)]
    assert sorted(row for _, held_out in parts for row in held_out) == list(range(100))
    for kept, held_out in parts:
        assert_parts(kept, held_out, 100)
        assert abs(len(held_out) - 20) <= (2 if groups else 0)
        if groups:
            assert not {groups[row] for row in kept} & {groups[row] for row in held_out}
        if strata:
            assert labels(held_out)["maybe"] in ((1, 2, 3, 4) if groups else (2, 3))


def test_the_seed_decides_the_folds() -> None:
    assert list(fold(50, 5, 0, 1)[1]) == list(fold(50, 5, 0, 1)[1])
    assert list(fold(50, 5, 0, 1)[1]) != list(fold(50, 5, 0, 2)[1])
    grouped = [list(fold(100, 5, 0, seed, PATIENTS)[1]) for seed in (1, 1, 2)]
    assert grouped[0] == grouped[1] != grouped[2]


def test_impossible_splits_are_refused_in_one_message() -> None:
    with pytest.raises(DataError, match=r"data.folds 5 needs at least 5 groups \(data.group_by\); the data has 2"):
        fold(6, 5, 0, 0, groups=list("aaabbb"))
    with pytest.raises(DataError, match=r"data.folds 5 needs at least 5 rows; the data has 4"):
        fold(4, 5, 0, 0)
    with pytest.raises(DataError, match=r"data.validation 0.5 needs at least 2 groups .* the data has 1"):
        hold_out(6, 0.5, 0, groups=["a"] * 6)
    with pytest.raises(DataError, match=r"1 of 2 values have fewer: 'maybe' \(2\). Stratify by a column of few values"):
        fold(12, 3, 0, 0, strata=["yes"] * 10 + ["maybe"] * 2)
    with pytest.raises(DataError, match=r"at least 3 groups \(data.group_by\) of each value; .* 'maybe' \(1\)"):
        fold(12, 3, 0, 0, groups=[*"abcabcabc", *"ddd"], strata=["yes"] * 9 + ["maybe"] * 3)
    with pytest.raises(DataError, match="as a group stays on one side; expected smaller groups or another fraction"):
        hold_out(100, 0.01, 0, groups=["a"] * 50 + ["b"] * 50)
