"""Deal the rows of one optimizer step to ranks and micro batches, so that no rank has much more to compute.

All ranks wait for the one with the most tokens, at the end of each step (under ZeRO-3 in each micro batch). Dealing is
longest-processing-time-first scheduling (Graham 1969, doi:10.1137/0117039) with a fixed number of rows each, and
exchanges after it. Only whole numbers are compared, so all ranks deal alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

_EXCHANGES_A_RANK = 4

MicroBatch = list[list[int]]
"""Positions of rows in the step, by rank, in ascending order; a rank may have none."""


def deal_by_position(count: int, micro_batch_size: int, ranks: int) -> list[MicroBatch]:
    """Deal ``count`` rows in the order in which they come."""
    size = micro_batch_size * ranks
    return [
        [list(range(start + rank, min(start + size, count), ranks)) for rank in range(ranks)]
        for start in range(0, count, size)
    ]


def deal_by_length(lengths: np.ndarray, micro_batch_size: int, ranks: int) -> list[MicroBatch]:
    """Deal rows of these lengths, [rows] tokens: a micro batch of all ranks has similar rows, and ranks equal sums.

    There are as many micro batches as ``deal_by_position`` makes, of ``micro_batch_size`` rows a rank at most. Rows
    stay in their order where dealing changes nothing: on one rank, and where each rank has one row.
    """
    if ranks == 1 or len(lengths) <= ranks:
        return deal_by_position(len(lengths), micro_batch_size, ranks)
    of_ranks = _deal_to_ranks(lengths, ranks)
    return [
        [sorted(rows[start : start + micro_batch_size]) for rows in of_ranks]
        for start in range(0, max(map(len, of_ranks)), micro_batch_size)
    ]


def deal_by_tokens(lengths: np.ndarray, tokens: int, ranks: int, packed: bool) -> list[MicroBatch]:
    """Cut rows of these lengths into as few micro batches of up to ``tokens`` tokens as possible, as many on each rank.

    Tokens are counted with padding unless rows are ``packed``. A row of more tokens is a micro batch of its own.
    """
    cut = _cut_packed(lengths, tokens, ranks) if packed else _cut_padded(lengths, tokens, ranks)
    costs = np.array([sum(lengths[rows]) if packed else len(rows) * max(lengths[rows]) for rows in cut])
    of_ranks = _deal_to_ranks(costs, ranks)
    return [
        [sorted(cut[pieces[number]]) if number < len(pieces) else [] for pieces in of_ranks]
        for number in range(max(map(len, of_ranks)))
    ]


def _deal_to_ranks(costs: np.ndarray, ranks: int) -> list[list[int]]:
    """Return the items of each rank, of falling cost; their numbers differ by one at most.

    Of falling items each rank takes one in turn, who has least first. Then the rank with most and the one with least
    exchange the two items that make them most alike, until the mean is 99 % of the most or no exchange helps.
    """
    loads, order = np.zeros(ranks, np.int64), np.argsort(-costs, kind="stable")
    own: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), ranks):
        items = order[start : start + ranks]
        least_loaded = np.argsort(loads, kind="stable")[: len(items)]
        loads[least_loaded] += costs[items]
        for rank, item in zip(least_loaded.tolist(), items.tolist(), strict=True):
            own[rank].append(item)
    for _ in range(_EXCHANGES_A_RANK * ranks):
        most, least = int(loads.argmax()), int(loads.argmin())
        gap = loads[most] - loads[least]
        if 100 * loads.sum() >= 99 * ranks * loads[most] or not own[least]:
            break
        moved = costs[own[most]][:, None] - costs[own[least]][None, :]
        left = np.where((moved > 0) & (moved < gap), np.abs(gap - 2 * moved), gap)
        one, other = np.unravel_index(int(left.argmin()), left.shape)
        if left[one, other] == gap:
            break
        own[most][one], own[least][other] = own[least][other], own[most][one]
        loads[most] -= moved[one, other]
        loads[least] += moved[one, other]
    return [sorted(items, key=lambda item: (-costs[item], item)) for items in own]


def _cut_padded(lengths: np.ndarray, tokens: int, ranks: int) -> list[list[int]]:
    """Cut rows, sorted by length, where the longest of a piece times its rows would exceed ``tokens``.

    The limit is then lowered as far as the same number of micro batches a rank allows, which makes them alike.
    """
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order].tolist()
    most = -(-len(_starts(falling, tokens)) // ranks) * ranks
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        if len(_starts(falling, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    starts = _starts(falling, high)
    return [order[start:end].tolist() for start, end in zip(starts, [*starts[1:], len(falling)], strict=True)]


def _starts(falling: Sequence[int], tokens: int) -> list[int]:
    """Return where each piece of up to ``tokens`` tokens begins, padding included."""
    starts, start = [], 0
    while start < len(falling):
        starts.append(start)
        start += max(1, tokens // falling[start])
    return starts


def _cut_packed(lengths: np.ndarray, tokens: int, ranks: int) -> list[list[int]]:
    """Deal rows to as few equal pieces of up to ``tokens`` tokens as possible, a multiple of ``ranks``."""
    order = np.argsort(-lengths, kind="stable").tolist()
    count = max(1, -(-int(lengths.sum()) // (tokens * ranks))) * ranks
    while True:
        pieces: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, number) for number in range(count)]
        is_over = False
        for position in order:
            load, number = heap[0]
            load += int(lengths[position])
            is_over |= bool(pieces[number]) and load > tokens
            if is_over:
                break
            pieces[number].append(position)
            heapq.heapreplace(heap, (load, number))
        if not is_over:
            return [piece for piece in pieces if piece]
        count += ranks
