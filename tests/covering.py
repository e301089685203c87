"""Covering arrays: few rows in which every allowed pair of values of any two factors stands at least once.

Greedy, as in AETG (Cohen et al., IEEE TSE 23(7), 1997): each row begins with a pair that no row has yet, and takes for
every other factor the value that brings the most new pairs. allpairspy takes one filter over half-made rows and no
seed, so that it cannot rotate, nor tell a pair that is forbidden from one that is owed elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

Row = dict[str, str]
Cell = tuple[str, str]
"""A factor and one of its values."""
Pair = frozenset[Cell]
"""Two cells; of forbidden combinations, two or more."""

TRIES = 8
"""Rows that are tried for each one that is taken."""


def all_pairs(table: Mapping[str, Sequence[str]], forbidden: Iterable[Pair] = ()) -> set[Pair]:
    """Every pair of values of two factors, without the forbidden ones; those of more than two forbid no pair."""
    cells = [[(factor, value) for value in values] for factor, values in table.items()]
    pairs = {frozenset((one, other)) for a, b in combinations(cells, 2) for one in a for other in b}
    return pairs - set(forbidden)


def pairs_of(row: Row) -> set[Pair]:
    """The pairs that a row has."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def cover(table: Mapping[str, Sequence[str]], seed: str, forbidden: Iterable[Pair] = ()) -> list[Row]:
    """Rows with all allowed pairs, in an order and choice that ``seed`` gives.

    Raises:
        ValueError: a pair is in no row that lacks forbidden pairs.
    """
    dice, never = random.Random(seed), set(forbidden)
    missing = all_pairs(table, never)
    rows: list[Row] = []
    while missing:
        first = dice.choice(sorted(missing, key=sorted))
        tried = [row for _ in range(TRIES) if (row := _row(table, first, missing, never, dice))]
        if not tried:
            raise ValueError(f"no row has {sorted(first)} without a forbidden pair")
        rows.append(max(tried, key=lambda row: len(missing & pairs_of(row))))
        missing -= pairs_of(rows[-1])
    return rows


def _row(
    table: Mapping[str, Sequence[str]], first: Pair, missing: set[Pair], never: set[Pair], dice: random.Random
) -> Row | None:
    """A row that has ``first``; none where a factor is left without an allowed value."""
    row = dict(first)
    others = [factor for factor in table if factor not in row]
    dice.shuffle(others)
    for factor in others:
        allowed = [
            value
            for value in table[factor]
            if not any((factor, value) in one and one <= {*row.items(), (factor, value)} for one in never)
        ]
        if not allowed:
            return None
        gains = {value: sum(frozenset(((factor, value), cell)) in missing for cell in row.items()) for value in allowed}
        best = max(gains.values())
        row[factor] = dice.choice([value for value in allowed if gains[value] == best])
    return {factor: row[factor] for factor in table}
