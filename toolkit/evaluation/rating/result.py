"""What the ratings of two models' answers show: means, preference, and how far raters agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from toolkit.evaluation.rating.filled import SIDES, FilledSheet, Judgement
from toolkit.evaluation.rating.key import RatingKey
from toolkit.metrics.labels import cohen_kappa
from toolkit.metrics.metric import mean_metric
from toolkit.metrics.resampling import Difference, Interval, bootstrap, claim, compare, holm, resample_weights
from toolkit.runtime.errors import DataError

_WEIGHTS = {1: "linear", 2: "quadratic"}
"""Names of the weights of kappa, by their power."""


@dataclass(frozen=True)
class RatedMeasure:
    """A criterion, or the preference: values of A and B with 95 % intervals over rows, and their paired difference."""

    rows: int
    """Rows of which at least one rater rated both answers; a row's value is the mean of its raters'."""
    a: Interval
    """Mean rating, or share of judgements that prefer A."""
    b: Interval
    difference: Difference
    """A - B."""
    verdict: str
    """Of A against B; see ``toolkit.metrics.resampling.claim``."""


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two raters in a criterion, over the answers that both rated, or in the preference."""

    raters: tuple[int, int]
    of: str
    """The criterion, or ``preference``."""
    weights: str
    """quadratic for criteria; linear for the preference, where A, tie and B have an order."""
    rows: int
    """Rows that both rated."""
    kappa: float | None
    """None where it is not defined: nothing in common, or all of it rated alike."""


@dataclass(frozen=True)
class RatingResult:
    """Holds what the sheets show."""

    a: str
    """File of A's answers."""
    b: str
    scale: tuple[int, int]
    rows: int
    """Rows that the sheets were made with."""
    raters: Sequence[Mapping[str, Any]]
    """Rater, file, and numbers of rows that are rated, rated in part, and not rated."""
    criteria: Mapping[str, RatedMeasure | None]
    """By name; None if no row is rated. Verdicts are corrected for their number (Holm)."""
    preference: RatedMeasure | None
    """The declared measure: its verdict is not corrected."""
    ties: float | None
    """Share of judgements that prefer neither, averaged over rows as the preference is."""
    preferred_sides: Mapping[str, float] | None
    """Shares of judgements that prefer answer 1 and answer 2, whoever's they are."""
    agreement: Sequence[Agreement]
    comments: Sequence[Mapping[str, Any]]
    """Rater, id of the row, whose answer was answer 1, and the comment."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        return asdict(self)


def summarise(sheets: Sequence[FilledSheet], key: RatingKey, seed: int = 42) -> RatingResult:
    """Compute what the sheets of some raters show; ``seed`` is that of resampling.

    Raises:
        DataError: no row is rated.
    """
    if not any(sheet.rated for sheet in sheets):
        raise DataError("no row is rated in any of the sheets; expected ratings or preferences")
    judged = [judgement for sheet in sheets for judgement in sheet.judgements.values()]
    criteria = {name: _measure(_rated(judged, name), seed) for name in key.criteria}
    p_values = holm({name: of.difference.p for name, of in criteria.items() if of is not None})
    preferred = [(one.row.row, float(one.preference == "a"), float(one.preference == "b"))
                 for one in judged if one.preference is not None]  # fmt: skip
    preference = _measure(preferred, seed)
    return RatingResult(
        key.a, key.b, key.scale, max(sheet.rows for sheet in sheets),
        [{"rater": of.rater, "file": of.file, "rated": of.rated, "in_part": of.in_part, "unrated": of.rows - of.rated}
         for of in sheets],
        {name: of and replace(of, verdict=_verdict(of, p_values[name])) for name, of in criteria.items()},
        preference, None if preference is None else 1 - preference.a.value - preference.b.value, _sides(judged),
        [one for pair in combinations(sheets, 2) for one in _agreement(*pair, key)],
        [{"rater": sheet.rater, "id": one.row.id, "answer_1": "ab"[not one.row.a_is_first], "comment": one.comment}
         for sheet in sheets for one in sheet.judgements.values() if one.comment],
    )  # fmt: skip


def _rated(judged: Sequence[Judgement], criterion: str) -> list[tuple[int, float, float]]:
    """Return row, rating of A and rating of B of each judgement that has both."""
    both = ((one.row.row, *one.ratings[criterion]) for one in judged)
    return [(row, a, b) for row, a, b in both if a is not None and b is not None]


def _measure(rated: Sequence[tuple[int, float, float]], seed: int) -> RatedMeasure | None:
    """Compare the values of A and B, which are averaged over raters, over the rows; None without rows."""
    of_rows: dict[int, list[tuple[float, float]]] = {}
    for row, a, b in rated:
        of_rows.setdefault(row, []).append((a, b))
    if not of_rows:
        return None
    means = np.array([np.mean(of_rows[row], axis=0) for row in sorted(of_rows)])
    ours, theirs = mean_metric("a", means[:, 0]), mean_metric("b", means[:, 1])
    weights = resample_weights(len(means), seed=seed)
    difference = compare(ours, theirs, weights)
    measure = RatedMeasure(len(means), bootstrap(ours, weights), bootstrap(theirs, weights), difference, "")
    return replace(measure, verdict=_verdict(measure, difference.p))


def _verdict(measure: RatedMeasure, p: float) -> str:
    return claim(measure.difference, True, measure.rows, p)


def _sides(judged: Sequence[Judgement]) -> dict[str, float] | None:
    """Return how often answer 1 and answer 2 are preferred."""
    preferred = [one for one in judged if one.preference is not None]
    if not preferred:
        return None
    shares = {}
    for answer, is_first in (("answer_1", True), ("answer_2", False)):
        sides = [one.preference == ("a" if one.row.a_is_first is is_first else "b") for one in preferred]
        shares[answer] = sum(sides) / len(sides)
    return shares


def _agreement(one: FilledSheet, other: FilledSheet, key: RatingKey) -> list[Agreement]:
    """Return how far two raters agree in each criterion and in the preference."""
    common = [(one.judgements[row], other.judgements[row]) for row in one.judgements if row in other.judgements]
    low, high = key.scale
    found = []
    for criterion in key.criteria:
        both = [
            [given for given in zip(first.ratings[criterion], second.ratings[criterion], strict=True)
             if None not in given]
            for first, second in common
        ]  # fmt: skip
        given = np.array([pair for of_row in both for pair in of_row], int).reshape(-1, 2) - low
        found.append(_kappa(one, other, criterion, given, sum(map(bool, both)), high - low + 1, 2))
    preferred = [
        (SIDES.index(first.preference), SIDES.index(second.preference))
        for first, second in common
        if first.preference is not None and second.preference is not None
    ]
    given = np.array(preferred, int).reshape(-1, 2)
    return [*found, _kappa(one, other, "preference", given, len(preferred), len(SIDES), 1)]


def _kappa(
    one: FilledSheet, other: FilledSheet, of: str, given: np.ndarray, rows: int, labels: int, power: int
) -> Agreement:  # fmt: skip
    kappa = cohen_kappa(given[:, 0], given[:, 1], labels, power)
    return Agreement((one.rater, other.rater), of, _WEIGHTS[power], rows, None if math.isnan(kappa) else kappa)
