"""Rows of one step are dealt by length: the same rows, equal sums, as many micro batches on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.data.batches import BatchPlan, epoch_order, step_batches
from toolkit.data.dealing import deal_by_length, deal_by_position, deal_by_tokens
from toolkit.data.examples import Example


def lengths_like_pubmedqa(rows: int, seed: int = 0) -> np.ndarray:
    """Log-normal lengths with PubMedQA's mean of about 420 tokens and a spread of 0.3."""
    return np.random.default_rng(seed).lognormal(6.0, 0.3, rows).astype(np.int64) + 16


def balance(dealt: list[list[list[int]]], lengths: np.ndarray) -> float:
    """Mean over longest rank, in tokens of the step."""
    sums = np.array([[lengths[rows].sum() for rows in micro_batch] for micro_batch in dealt]).sum(axis=0)
    return float(sums.mean() / sums.max())


@pytest.mark.parametrize("ranks", [8, 512])
def test_ranks_with_eight_rows_each_have_nearly_the_same_number_of_tokens(ranks: int) -> None:
    by_length, by_position = [], []
    for seed in range(8):
        lengths = lengths_like_pubmedqa(8 * ranks, seed)
        by_length.append(balance(deal_by_length(lengths, 1, ranks), lengths))
        by_position.append(balance(deal_by_position(len(lengths), 1, ranks), lengths))
    assert np.mean(by_length) > 0.98
    assert np.mean(by_length) > np.mean(by_position) + 0.08


@pytest.mark.parametrize(
    ("micro", "ranks", "count"), [(1, 2, 8), (2, 3, 12), (3, 2, 17), (2, 4, 9), (4, 2, 5), (1, 4, 3)]
)
def test_every_row_is_dealt_once_and_no_micro_batch_is_larger(micro: int, ranks: int, count: int) -> None:
    dealt = deal_by_length(lengths_like_pubmedqa(count), micro, ranks)
    assert sorted(row for micro_batch in dealt for rows in micro_batch for row in rows) == list(range(count))
    assert len(dealt) == len(deal_by_position(count, micro, ranks))
    assert all(len(micro_batch) == ranks and max(map(len, micro_batch)) <= micro for micro_batch in dealt)


def test_rows_keep_their_order_on_one_rank_and_with_one_row_a_rank() -> None:
    lengths = np.array([3, 9, 1, 7])
    assert deal_by_length(lengths, 1, 1) == [[[0]], [[1]], [[2]], [[3]]]
    assert deal_by_length(lengths, 2, 1) == [[[0, 1]], [[2, 3]]]
    assert deal_by_length(lengths, 1, 4) == [[[0], [1], [2], [3]]]


def test_long_rows_share_a_micro_batch_and_short_ones_make_up_for_them() -> None:
    assert deal_by_length(np.array([1, 9, 2, 10]), 1, 2) == [[[3], [1]], [[0], [2]]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("limit", "ranks"), [(1024, 1), (2048, 2), (4096, 3), (64, 2), (10**9, 2)])
def test_micro_batches_stay_under_the_limit_of_tokens(packed: bool, limit: int, ranks: int) -> None:
    lengths = lengths_like_pubmedqa(50)
    dealt = deal_by_tokens(lengths, limit, ranks, packed)
    assert sorted(row for micro_batch in dealt for rows in micro_batch for row in rows) == list(range(50))
    for rows in (rows for micro_batch in dealt for rows in micro_batch if rows):
        own = lengths[rows]
        assert len(rows) == 1 or (own.sum() if packed else len(rows) * own.max()) <= limit
    assert all(len(micro_batch) == ranks for micro_batch in dealt)
    if limit == 64:
        assert all(len(rows) <= 1 for micro_batch in dealt for rows in micro_batch)
    if limit == 10**9:
        assert len(dealt) == 1


def test_packed_rows_need_no_more_micro_batches_than_padded_ones() -> None:
    lengths = np.array([600, 600, 300, 300, 300, 300, 100, 100])
    assert len(deal_by_tokens(lengths, 1000, 1, packed=True)) == 3
    assert len(deal_by_tokens(lengths, 1000, 1, packed=False)) == 4


@pytest.mark.parametrize("tokens", [None, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_has_the_same_rows_on_every_layout_and_fillers_where_rows_lack(tokens: int | None, ranks: int) -> None:
    lengths, order = lengths_like_pubmedqa(10) // 20, epoch_order(10, 0, 0)
    for step in range(2):
        dealt = [
            BatchPlan(10, 6 // ranks, 1, rank, ranks, tokens).micro_batches(order, step, lengths)
            for rank in range(ranks)
        ]
        assert len(set(map(len, dealt))) == 1
        rows = [row for own in dealt for rows, is_filler in own if not is_filler for row in rows]
        assert sorted(rows) == sorted(order[step * 6 : step * 6 + 6])


def test_a_filler_is_the_shortest_row_of_the_step() -> None:
    lengths = np.array([50, 8, 90])
    of_ranks = [BatchPlan(3, 2, 1, rank, 2).micro_batches(range(3), 0, lengths) for rank in range(2)]
    assert of_ranks == [[([2], False)], [([0, 1], False)]]
    last = [BatchPlan(3, 1, 2, rank, 2).micro_batches(range(3), 0, lengths) for rank in range(2)]
    assert [own[-1] for own in last].count(([1], True)) == 1


def test_batches_are_made_of_the_rows_that_fit() -> None:
    examples = [Example.with_answer(tuple(range(1, length + 1)), 1) for length in (3, 9, 4, 8, 5, 7)]
    plan = BatchPlan(6, 6, micro_batch_tokens=18)
    (padded,) = step_batches(examples, range(6), plan, 0)
    assert [tuple(batch.input_ids.shape) for batch in padded] == [(2, 8), (3, 5), (1, 9)]
    (packed,) = step_batches(examples, range(6), plan, 0, packed=True)
    assert [batch.tokens for batch in packed] == [18, 18]
