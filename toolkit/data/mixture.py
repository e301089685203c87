"""Which training rows an epoch takes, and how often: a limit, the weights of a mixture, oversampling of rare labels.

Pure functions on row numbers, decided once a run. All draws come from the seed, so every rank and every resumed run
takes the same. They apply to training rows alone, after validation rows were held out; a row that is taken twice stands
in the epoch twice.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence

from toolkit.data.identifiers import shown
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")

_MANY_REPEATS = 10
"""Repeats of a row in an epoch above which the log warns that it may be learned by heart."""


def draw_rows(
    sources: Sequence[int],
    weights: Sequence[float],
    labels: Sequence[str | None] | None,
    limit: int | None,
    seed: int,
) -> Sequence[int]:
    """Return the numbers of the training rows that an epoch takes, in their order, some of them more than once.

    Args:
        sources: number of the source that each training row comes from.
        weights: how often the rows of each source are taken, by the source's number.
        labels: label of each training row, None for a row without one; None takes rows as they are.
        limit: most rows, before any is taken more than once; None takes all.
        seed: that of the run, ``train.seed``.
    """
    drawn: Sequence[int] = range(len(sources))
    if limit is not None and limit < len(sources):
        drawn = sorted(_shuffled(len(sources), f"{seed} limit")[:limit])
    if any(weight != 1 for weight in weights):
        drawn = _weigh(drawn, sources, weights, seed)
    if labels is not None:
        drawn = _balance(drawn, labels, seed)
    return drawn


def check_labels(labels: Sequence[str | None], column: str) -> None:
    """Check that the values of a column are labels.

    Raises:
        DataError: nearly every row has one of its own, or all have the same, or none has one.
    """
    counts = Counter(label for label in labels if label is not None)
    if len(counts) < 2:
        raise DataError(f"data.oversample is {column!r}, which has {len(counts) or 'no'} value(s); expected at least 2")
    if len(counts) > max(2, sum(counts.values()) // 2):
        raise DataError(
            f"data.oversample is {column!r}, which has {len(counts)} different values in {sum(counts.values())} rows; "
            "expected a column of a few labels"
        )


def _weigh(drawn: Sequence[int], sources: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Take the rows of each source as often as its weight says; of a fraction, as many rows at random, at least one."""
    by_source: list[list[int]] = [[] for _ in weights]
    for row in drawn:
        by_source[sources[row]].append(row)
    taken: list[int] = []
    for number, (rows, weight) in enumerate(zip(by_source, weights, strict=True)):
        taken += _take(rows, max(1, round(len(rows) * weight)), f"{seed} weight {number}")
    return sorted(taken)


def _balance(drawn: Sequence[int], labels: Sequence[str | None], seed: int) -> list[int]:
    """Take the rows of each label as often as those of the most frequent one; rows without a label as they are."""
    by_label: dict[str | None, list[int]] = {}
    for row in drawn:
        by_label.setdefault(labels[row], []).append(row)
    unlabelled = by_label.pop(None, [])
    most = max(map(len, by_label.values()), default=0)
    taken = list(unlabelled)
    for label in sorted(by_label, key=str):
        rows = by_label[label]
        taken += _take(rows, most, f"{seed} label {label}")
        if most > _MANY_REPEATS * len(set(rows)):
            log.warning(
                "data.oversample takes each of the %d rows labelled %s up to %d times in an epoch; they may be learned "
                "by heart", len(set(rows)), shown(str(label)), math.ceil(most / len(set(rows))),
            )  # fmt: skip
    counts = ", ".join(f"{shown(str(label))} {len(by_label[label])}" for label in sorted(by_label, key=str))
    rest = f" and {len(unlabelled)} without a label" if unlabelled else ""
    log.info("data.oversample: training rows by label were %s%s; each label has %d rows now", counts, rest, most)
    return sorted(taken)


def _take(rows: Sequence[int], count: int, seed: str) -> list[int]:
    """Take ``count`` of ``rows``: all of them as often as possible, and the rest at random."""
    if not rows:
        return []
    times, rest = divmod(count, len(rows))
    return [*rows] * times + [rows[at] for at in _shuffled(len(rows), seed)[:rest]]


def _shuffled(count: int, seed: str) -> list[int]:
    """Return the numbers below ``count`` in an order that the seed decides; a text is hashed the same everywhere."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
