"""Decide which rows are trained on and which are held out; pure functions on row numbers, the same on every rank.

Rows that belong together (``groups``) stay on one side. ``strata`` keep the share of each value the same on both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.data.identifiers import shown
from toolkit.runtime.errors import DataError

Rows = NDArray[np.int64]
"""Row numbers in ascending order."""

_LONGEST_SHOWN = 40
"""Most characters of a group or stratum that an error message shows."""


def hold_out(
    count: int, fraction: float, seed: int, groups: Sequence[str] | None = None, strata: Sequence[str] | None = None,
    key: str = "data.validation", grouped_by: str = "data.group_by",
) -> tuple[Rows, Rows]:  # fmt: skip
    """Split ``count`` rows at random; return the rows that are kept and those that are held out.

    Without groups exactly ``max(1, round(count * fraction))`` rows are held out, and of each stratum its share to
    within one row. With groups both hold as nearly as whole groups allow.

    Args:
        count: number of rows.
        fraction: share of the rows to hold out, between 0 and 1.
        seed: same seed, same split.
        groups: group of each row; None lets each row be one of its own.
        strata: stratum of each row, such as its label; None does not stratify.
        key: recipe key that names the fraction, for messages.
        grouped_by: what makes the groups, for messages.

    Raises:
        DataError: nothing would be left to train on or to hold out, or a stratum cannot be on both sides.
    """
    held = max(1, round(count * fraction))
    if held >= count:
        raise DataError(f"{key} {fraction:g} of {count} rows leaves none to train on; expected a smaller fraction")
    if groups is None and strata is None:
        drawn = random.Random(seed).sample(range(count), held)
    else:
        _check_possible(count, 2, f"{key} {fraction:g}", groups, strata, grouped_by)
        if groups is None:
            order = _order_by_stratum(count, seed, strata)
            drawn = [row for at, row in enumerate(order) if (at + 1) * held // count > at * held // count]
        else:
            part_of = _deal_groups(groups, strata, (fraction, 1 - fraction), seed)
            drawn = np.flatnonzero(part_of == 0).tolist()
            if not 0 < len(drawn) < count:
                raise DataError(
                    f"{key} {fraction:g} of {count} rows in {len(set(groups))} groups ({grouped_by}) would hold out "
                    f"{len(drawn)} of them, as a group stays on one side; expected smaller groups or another fraction"
                )
    return _divide(count, drawn)


def fold(
    count: int, folds: int, fold: int, seed: int, groups: Sequence[str] | None = None,
    strata: Sequence[str] | None = None, grouped_by: str = "data.group_by",
) -> tuple[Rows, Rows]:  # fmt: skip
    """Split ``count`` rows into ``folds`` parts; return the rows to train on and those of part ``fold``, held out.

    Every row is held out in exactly one of the folds. Without groups the sizes of the parts differ by one row at most,
    and so do the numbers of rows of each stratum.

    Raises:
        DataError: there are fewer rows or groups than folds, or fewer of a stratum than folds.
    """
    _check_possible(count, folds, f"data.folds {folds}", groups, strata, grouped_by)
    if groups is None:
        return _divide(count, _order_by_stratum(count, seed, strata)[fold::folds])
    part_of = _deal_groups(groups, strata, (1 / folds,) * folds, seed)
    if empty := [part for part in range(folds) if not (part_of == part).any()]:
        raise DataError(
            f"data.folds {folds}: fold {empty[0]} gets no row, as the groups of {grouped_by} are of too unequal size; "
            "expected fewer folds"
        )
    return _divide(count, np.flatnonzero(part_of == fold).tolist())


def _divide(count: int, drawn: Sequence[int]) -> tuple[Rows, Rows]:
    """Return the row numbers that were not drawn, and those that were."""
    held_out = np.zeros(count, dtype=bool)
    held_out[np.asarray(drawn, dtype=np.int64)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _order_by_stratum(count: int, seed: int, strata: Sequence[str] | None) -> list[int]:
    """Return the rows in random order, stratum after stratum: every n-th of them has the same share of each."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order if strata is None else sorted(order, key=lambda row: strata[row])


def _deal_groups(
    groups: Sequence[str], strata: Sequence[str] | None, shares: tuple[float, ...], seed: int
) -> NDArray[np.int64]:
    """Deal whole groups to parts, the largest first; return the part of each row.

    Each group goes to the part where it raises sum((rows - expected)² / expected) least, taken over the rows of each
    stratum and over all rows: greedy, as scikit-learn's StratifiedGroupKFold, but for parts of any share.
    """
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    stratum_of = (
        np.unique(np.asarray(strata), return_inverse=True)[1] if strata is not None else np.zeros_like(group_of)
    )
    content = np.zeros((len(sizes), int(stratum_of.max()) + 2))  # rows of each stratum in a group; last: of all
    np.add.at(content, (group_of, stratum_of), 1)
    content[:, -1] = sizes
    expected = np.outer(shares, content.sum(axis=0))
    rows = np.zeros_like(expected)
    part_of_group = np.zeros(len(sizes), dtype=np.int64)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    for group in sorted(order, key=lambda group: -sizes[group]):
        added = content[group]
        cost = ((2 * added * (rows - expected) + added**2) / expected).sum(axis=1)
        part_of_group[group] = part = int(cost.argmin())
        rows[part] += added
    return part_of_group[group_of]


def _check_possible(
    count: int, parts: int, asked: str, groups: Sequence[str] | None, strata: Sequence[str] | None, grouped_by: str
) -> None:
    """Raise DataError unless the rows, and those of each stratum, can be on every one of ``parts`` sides."""
    units: Sequence[str | int] = groups if groups is not None else range(count)
    noun, by = ("groups", f" ({grouped_by})") if groups is not None else ("rows", "")
    if (found := len(set(units))) < parts:
        raise DataError(f"{asked} needs at least {parts} {noun}{by}; the data has {found}")
    if strata is None:
        return
    units_of: dict[str, set[str | int]] = {}
    for unit, stratum in zip(units, strata, strict=True):
        units_of.setdefault(stratum, set()).add(unit)
    rare = {stratum: len(its) for stratum, its in units_of.items() if len(its) < parts}
    if rare:
        listed = ", ".join(f"{shown(name)[:_LONGEST_SHOWN]!r} ({number})" for name, number in list(rare.items())[:5])
        raise DataError(
            f"{asked} with data.stratify_by needs at least {parts} {noun}{by} of each value; {len(rare)} of "
            f"{len(units_of)} values have fewer: {listed}. Stratify by a column of few values, or not at all"
        )
