"""Metrics of labels, all from the sums of a confusion matrix; the same as scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from toolkit.metrics.metric import Metric, check_rows, divide
from toolkit.runtime.errors import DataError


def label_metrics(
    truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str], ordered: bool = False, prefix: str = ""
) -> list[Metric]:
    """Return the metrics of predicted labels.

    Accuracy, macro-F1, recall of each label and the share of predictions that are labels at all (``valid``). Of
    ``ordered`` labels also how far off they are: Cohen's kappa with quadratic weights (Cohen 1968), shares within one
    step of the truth, below it and above it.

    Args:
        truth: [rows] number of the right label.
        predicted: [rows] number of the predicted label; -1 where the answer is none, which counts as wrong, and is left
            out of kappa and of the shares below and above.
        labels: names by number.
        ordered: whether a label's number says how far it is from others.
        prefix: what the names of the metrics begin with.

    Raises:
        DataError: there are no rows, or other predictions than labels, or a number is out of its range.
    """
    metric = _metrics_of(truth, predicted, len(labels), prefix)
    found = [metric("accuracy", _accuracy), metric("macro_f1", _macro_f1), metric("valid", _valid)]
    found += [
        metric(f"recall/{label}", lambda table, at=at: divide(table[..., at, at], table[..., at, :].sum(-1)))
        for at, label in enumerate(labels)
    ]
    if ordered:
        found += [
            metric("quadratic_kappa", lambda table: _kappa(table, 2)),
            metric("within_one", _within_one),
            metric("under_rate", lambda table: _off(table, below=True), False),
            metric("over_rate", lambda table: _off(table, below=False), False),
        ]
    return found


def precision_metrics(
    truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str], prefix: str = ""
) -> list[Metric]:  # fmt: skip
    """Return the precision of each label, ``precision/LABEL``; NaN for one that is never predicted.

    Apart from ``label_metrics``, so that they do not count among the metrics whose p-values are adjusted for each
    other. Arguments and errors are the same.
    """
    metric = _metrics_of(truth, predicted, len(labels), prefix)
    return [
        metric(f"precision/{label}", lambda table, at=at: divide(table[..., at, at], table[..., :, at].sum(-1)))
        for at, label in enumerate(labels)
    ]


def label_numbers(given: Sequence[str | None], labels: Sequence[str]) -> np.ndarray:
    """Return the number of each label, [rows]; -1 for None and for what is no label."""
    numbers = {label: number for number, label in enumerate(labels)}
    return np.array([-1 if one is None else numbers.get(one, -1) for one in given], dtype=int)


def confusion(truth: np.ndarray, predicted: np.ndarray, labels: int) -> np.ndarray:
    """Return the confusion matrix [labels, labels + 1] of counts; the last column is for answers that are no label."""
    table = np.zeros((labels, labels + 1), int)
    np.add.at(table, (truth, np.where(predicted < 0, labels, predicted)), 1)
    return table


def cohen_kappa(first: np.ndarray, second: np.ndarray, labels: int, power: int) -> float:
    """Return Cohen's kappa of two raters (Cohen 1968), by how far apart their labels are: 1 if they always agree.

    Args:
        first: [ratings] number of the label that one rater gives.
        second: [ratings] that of the other rater for the same.
        labels: how many labels there are, given or not.
        power: a disagreement weighs its distance to this power: 1 is linear, 2 quadratic.

    Returns:
        NaN where both give one and the same label throughout, or nothing is rated.
    """
    return float(_kappa(confusion(first, second, labels), power))


def _metrics_of(truth: np.ndarray, predicted: np.ndarray, count: int, prefix: str) -> Callable[..., Metric]:
    """Return what makes a metric of a name and a score of the confusion matrix [..., count, count + 1]."""
    check_rows(labels=truth, predictions=predicted)
    for name, numbers, least in (("right label", truth, 0), ("predicted label", predicted, -1)):
        if (outside := numbers[(numbers < least) | (numbers >= count)]).size:
            raise DataError(f"a {name} has the number {outside[0]}; expected one from {least} to {count - 1}")
    cells = np.zeros((len(truth), count, count + 1))
    cells[np.arange(len(truth)), truth, np.where(predicted < 0, count, predicted)] = 1
    statistics = cells.reshape(len(truth), -1)

    def metric(
        name: str, score: Callable[[np.ndarray], np.ndarray], higher_is_better: bool | None = True
    ) -> Metric:  # fmt: skip
        def of_sums(sums: np.ndarray) -> np.ndarray:
            return score(sums.reshape(*sums.shape[:-1], count, count + 1))

        return Metric(f"{prefix}{name}", statistics, of_sums, higher_is_better)

    return metric


def _hits(table: np.ndarray) -> np.ndarray:
    return np.diagonal(table[..., :-1], axis1=-2, axis2=-1)


def _accuracy(table: np.ndarray) -> np.ndarray:
    return divide(_hits(table).sum(-1), table.sum((-2, -1)))


def _valid(table: np.ndarray) -> np.ndarray:
    return divide(table[..., :-1].sum((-2, -1)), table.sum((-2, -1)))


def _macro_f1(table: np.ndarray) -> np.ndarray:
    """Return the mean F1 of all labels; that of a label which is neither right nor predicted is 0."""
    sides = table.sum(-1) + table[..., :-1].sum(-2)
    return np.asarray(divide(2 * _hits(table), sides, otherwise=0.0).mean(-1))


def _kappa(table: np.ndarray, power: int) -> np.ndarray:
    square = table[..., :-1]
    count = square.shape[-1]
    weights = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) ** power
    right, predicted = square.sum(-1), square.sum(-2)
    expected = divide(right[..., :, None] * predicted[..., None, :], square.sum((-2, -1))[..., None, None])
    return 1 - divide((weights * square).sum((-2, -1)), (weights * expected).sum((-2, -1)))


def _within_one(table: np.ndarray) -> np.ndarray:
    count = table.shape[-2]
    near = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) <= 1
    return divide((near * table[..., :-1]).sum((-2, -1)), table.sum((-2, -1)))


def _off(table: np.ndarray, below: bool) -> np.ndarray:
    """Return the share of labels below or above the truth."""
    square = table[..., :-1]
    part = np.tril(square, -1) if below else np.triu(square, 1)
    return divide(part.sum((-2, -1)), square.sum((-2, -1)))
