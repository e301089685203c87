import pytest
import torch

from toolkit.data.batches import BatchPlan, collate, epoch_order, pack, step_batches
from toolkit.data.examples import Example
from toolkit.data.layout import lay_out, unpad
from toolkit.data.rows import Rows


def plans(rows: int, micro: int, accumulation: int, ranks: int) -> list[BatchPlan]:
    return [BatchPlan(rows, micro, accumulation, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("rows", "micro", "accumulation"), [(20, 1, 1), (13, 2, 2), (7, 4, 1), (1, 1, 3), (9, 1, 2)])
def test_ranks_see_disjoint_rows_whose_union_is_the_data_set(
    rows: int, micro: int, accumulation: int, ranks: int
) -> None:
    order = epoch_order(rows, seed=3, epoch=1)
    seen: list[int] = []
    for plan in plans(rows, micro, accumulation, ranks):
        for step in range(plan.steps_per_epoch):
            seen += [row for own, is_filler in plan.micro_batches(order, step) if not is_filler for row in own]
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize(("micro", "accumulation", "ranks"), [(1, 4, 1), (1, 2, 2), (2, 1, 2), (4, 1, 1), (1, 1, 4)])
def test_a_step_learns_from_the_same_rows_however_they_are_dealt(micro: int, accumulation: int, ranks: int) -> None:
    order = epoch_order(10, seed=0, epoch=0)
    for step in range(3):
        rows = {
            row
            for plan in plans(10, micro, accumulation, ranks)
            for own, is_filler in plan.micro_batches(order, step)
            if not is_filler
            for row in own
        }
        assert rows == set(order[step * 4 : step * 4 + 4])


def test_every_rank_has_the_same_number_of_micro_batches_in_a_short_last_step() -> None:
    order = list(range(5))
    micro = [plan.micro_batches(order, 1) for plan in plans(5, 1, 2, 2)]
    assert micro == [[([4], False)], [([4], True)]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_every_rank_knows_the_tokens_of_a_step_of_all_ranks(packed: bool, stored: bool) -> None:
    """Fillers, which a short last step has, count for nothing."""
    examples = [Example((1,) * (5 + n), ((2, 3), (4, 5 + n % 3))) for n in range(5)]
    steps = [
        list(step_batches(Rows.of(examples) if stored else examples, range(5), plan, 0, packed=packed))
        for plan in plans(5, 1, 2, 2)
    ]
    for of_ranks in zip(*steps, strict=True):
        batches = [batch for micro_batches in of_ranks for batch in micro_batches]
        tokens = sum(batch.tokens for batch in batches if not batch.is_filler)
        assert {batch.of_step for batch in batches} == {(sum(batch.supervised_tokens for batch in batches), tokens)}


def test_epochs_shuffle_differently_and_repeat_exactly() -> None:
    assert epoch_order(50, 1, 0) != epoch_order(50, 1, 1) != epoch_order(50, 2, 1)
    assert epoch_order(50, 1, 1) == epoch_order(50, 1, 1)


def test_targets_are_the_tokens_after_the_supervised_positions() -> None:
    batch = collate([Example.with_answer((5, 6, 7, 8), 2), Example.with_answer((9, 10), 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch.supervised.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.targets.tolist() == [7, 8, 10]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (batch.tokens, batch.supervised_tokens) == (6, 3)


def test_a_batch_without_padding_has_no_mask() -> None:
    assert collate([Example.with_answer((5, 6), 1), Example.with_answer((7, 8), 1)], pad_id=0).attention_mask is None


def test_resuming_within_an_epoch_gives_the_batches_that_were_left() -> None:
    examples = [Example.with_answer((index + 1, 2, 3), 1) for index in range(7)]
    plan, order = BatchPlan(7, 2), epoch_order(7, 0, 0)
    whole = [[batch.input_ids for batch in step] for step in step_batches(examples, order, plan, 0)]
    rest = [[batch.input_ids for batch in step] for step in step_batches(examples, order, plan, 0, first_step=2)]
    assert len(whole) == 4
    assert all(torch.equal(a, b) for x, y in zip(whole[2:], rest, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("lengths", [(5, 3, 7), (4, 4), (6,)])
@pytest.mark.parametrize("packed", [True, False])
def test_rows_taken_out_of_a_batch_and_laid_out_again_are_the_batch(lengths: tuple[int, ...], packed: bool) -> None:
    examples = [
        Example.with_answer(tuple(range(10 * i + 1, 10 * i + 1 + length)), 2) for i, length in enumerate(lengths)
    ]
    batch = pack(examples) if packed else collate(examples, pad_id=0)
    assert batch.examples == tuple(examples)
    hidden = torch.stack([batch.input_ids, batch.input_ids + 100], dim=-1)
    rows = unpad(hidden, batch)
    assert [tuple(row[:, 0].tolist()) for row in rows] == [example.token_ids for example in examples]
    again = lay_out(rows, batch)
    assert again.shape == hidden.shape
    padding = torch.zeros_like(hidden) if batch.attention_mask is None else 1 - batch.attention_mask[..., None]
    assert torch.equal(again, hidden * (1 - padding))


def test_a_packed_row_has_no_padding_and_supervises_the_same_targets_as_padded_rows() -> None:
    examples = [Example.with_answer((5, 6, 7, 8), 2), Example.with_answer((9, 10), 1)]
    batch, padded = pack(examples), collate(examples, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.supervised.tolist() == [[False, True, True, False, True, False]]
    assert torch.equal(batch.targets, padded.targets)
    assert batch.attention_mask is None
    assert (batch.is_packed, padded.is_packed) == (True, False)
    assert (batch.tokens, batch.supervised_tokens) == (padded.tokens, padded.supervised_tokens) == (6, 3)
