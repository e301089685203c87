"""Name the rows on which a model is furthest off, below and above the right class of labels in an order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from toolkit.data.row_samples import RowSample
from toolkit.evaluation.labels import Classes

if TYPE_CHECKING:
    from toolkit.metrics.abstention import CoveragePoint

_MOST_LETTERS = 160


@dataclass(frozen=True)
class WorstCase:
    """A row on which a model is further off than on any other."""

    kind: Literal["under", "over"]
    row: str
    """Id of the row, or file and row."""
    expected: str
    given: str
    confidence: float
    """Probability of what was given."""
    text: str
    """What was asked, its beginning; identifiers are masked where those of the run's rows are."""


def worst_cases(
    classes: Classes, rows: Sequence[RowSample], ids: Sequence[str], probabilities: np.ndarray
) -> tuple[WorstCase, ...]:
    """Return the row that is furthest below its class, and that furthest above; of equals the one given surest."""
    given, confidence = probabilities.argmax(1), probabilities.max(1)
    off = given - classes.truth
    found = list[WorstCase]()
    directions: tuple[tuple[Literal["under", "over"], np.ndarray], ...] = (("under", -off), ("over", off))
    for kind, distance in directions:
        if np.isnan(confidence).any() or (far := int(distance.max())) <= 0:
            continue
        at = int(np.argmax(np.where(distance == far, confidence, -1.0)))
        text = " ".join(rows[at].sample.question.split())[:_MOST_LETTERS]
        right, own = classes.names[classes.truth[at]], classes.names[given[at]]
        found.append(WorstCase(kind, ids[at], right, own, float(confidence[at]), text))
    return tuple(found)


def lines(
    worst: Mapping[str, Sequence[WorstCase]], curves: Mapping[str, Sequence[CoveragePoint]]
) -> Iterator[str]:  # fmt: skip
    """Yield the lines of a table that name the worst cases of each model, and show what abstaining would give."""
    for name, cases in worst.items():
        for case in cases:
            far = f"{case.expected} given as {case.given} ({case.confidence:.2f})"
            yield f"Worst {case.kind}-estimate of {name}: {case.row}, {far}: {case.text}"
    for name, points in curves.items():
        shown = "; ".join(
            f"{point.confidence:.2f}: answers {point.coverage:.0%}, wrong {point.risk:.0%}, under {point.under:.0%}"
            for point in points[::3]
        )
        yield f"Abstaining of {name} below a confidence of {shown}"
