"""Questions with options: their classes, what a prior of the training rows scores, and a model corrected by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.data.row_samples import RowSample
from toolkit.runtime.errors import DataError

_MOST_CLASSES = 26
"""Most classes that have names of their own; with more, an option's place among those of its row is its class."""


@dataclass(frozen=True)
class Classes:
    """The classes of the rows' answers, and which of them each row's options are."""

    names: tuple[str, ...]
    """Classes in the order of the task's labels, or in that in which rows bring them."""
    of_options: tuple[np.ndarray, ...]
    """[options] of each row: the class of each option."""
    truth: np.ndarray
    """[rows] class of the right answer."""
    ordered: bool
    """Whether the task says that its labels are in an order."""
    prior: np.ndarray
    """[classes] share of each class in the training rows; of the rows themselves, where there are none."""
    has_prior: bool
    """True if the prior is that of training rows."""

    @classmethod
    def of(cls, rows: Sequence[RowSample], train: Sequence[RowSample]) -> Classes:
        """Find the classes of rows that all have options; ``train`` are those that were trained on.

        Raises:
            DataError: a row has the same option twice.
        """
        options = [row.sample.options for row in rows]
        for row, of_row in zip(rows, options, strict=True):
            if len(set(of_row)) < len(of_row):
                raise DataError(f"{row.origin} has the same option twice: {', '.join(map(repr, of_row))}")
        names = tuple(dict.fromkeys(option for of_row in options for option in of_row))
        by_place = len(names) > _MOST_CLASSES
        if by_place:
            names = tuple(f"option {place + 1}" for place in range(max(map(len, options))))

        def number(row: RowSample, option: str) -> int:
            return row.sample.options.index(option) if by_place else names.index(option)

        def known(row: RowSample) -> bool:
            return row.sample.label is not None and (by_place or row.sample.label in names)

        of_options = tuple(
            np.array([number(row, option) for option in of_row]) for row, of_row in zip(rows, options, strict=True)
        )
        truth = np.array([number(row, str(row.sample.label)) for row in rows])
        trained = [number(row, str(row.sample.label)) for row in train if known(row)]
        counts = np.bincount(trained or truth, minlength=len(names))[: len(names)]
        output = rows[0].task.spec.output
        ordered = output != "text" and output.ordered
        return cls(names, of_options, truth, ordered, counts / counts.sum(), bool(trained))

    def probabilities(self, log_likelihoods: Sequence[np.ndarray]) -> np.ndarray:
        """Return the softmax of each row's options by class: [rows, classes], 0 for those that a row lacks."""
        found = np.zeros((len(self.truth), len(self.names)))
        for row, (classes, scores) in enumerate(zip(self.of_options, log_likelihoods, strict=True)):
            shifted = np.exp(scores - scores.max())
            found[row, classes] = shifted / shifted.sum()
        return found

    def of_prior(self) -> np.ndarray:
        """Return the prior for each row, over the options that it has: [rows, classes]."""
        smoothed = (self.prior + 1e-12) / (self.prior + 1e-12).sum()
        return self.probabilities([np.log(smoothed[classes]) for classes in self.of_options])

    def corrected(self, log_likelihoods: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return likelihoods without a model's own leaning to a class, and with that of the training rows.

        The leaning is the mean log-probability of a class over the rows, whose right answers are not looked at (batch
        calibration, arXiv 2309.17249).
        """
        logs = [scores - np.logaddexp.reduce(scores) for scores in log_likelihoods]
        sums, counts = np.zeros(len(self.names)), np.zeros(len(self.names))
        for classes, scores in zip(self.of_options, logs, strict=True):
            sums[classes] += scores
            counts[classes] += 1
        change = np.log(self.prior + 1e-12) - sums / np.maximum(counts, 1)
        return [scores + change[classes] for classes, scores in zip(self.of_options, logs, strict=True)]
