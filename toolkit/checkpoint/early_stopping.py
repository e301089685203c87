"""Early stopping: what the validations of a run say, so that an interrupted run stops where it would have."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.checkpoint.manifest import step_of
from toolkit.checkpoint.metrics_log import METRICS_FILE, number, read_rows
from toolkit.checkpoint.validation_score import LOSS, ValidationScore, read_validation_score
from toolkit.config.schema import TrainConfig


def has_stopped_improving(ranks: Iterable[float], train: TrainConfig) -> bool:
    """Return whether training ends after these validations (``train.early_stopping_patience``).

    It does once ``ValidationScore.rank`` was not below the lowest one before by more than
    ``train.early_stopping_threshold`` in so many validations in a row. A rank that is not finite is not below.
    """
    lowest, in_a_row = math.inf, 0
    for rank in ranks:
        if rank < lowest - train.early_stopping_threshold or (lowest == math.inf and math.isfinite(rank)):
            lowest, in_a_row = rank, 0
        else:
            in_a_row += 1
    return train.early_stopping_patience is not None and in_a_row >= train.early_stopping_patience


def logged_scores(
    rows: Iterable[dict[str, Any]], until: int, metric: str = LOSS, higher_is_better: bool = False
) -> dict[int, ValidationScore]:
    """Return the validation scores up to a step in the rows of ``metrics.jsonl``, by step, in their order.

    ``metric`` is the one that decides, which rows before it was asked for lack.
    """
    found = {}
    for row in rows:
        if "eval_loss" in row and row["step"] <= until:
            loss = number(row["eval_loss"])
            value = None if metric == LOSS else number(row.get(f"eval_{metric}"))
            found[row["step"]] = ValidationScore(loss, metric, value, higher_is_better)
    return dict(sorted(found.items()))


def ended_early(run: Path, checkpoint: Path, train: TrainConfig) -> bool:
    """Return whether the run in a directory ended by early stopping at its newest checkpoint."""
    if train.early_stopping_patience is None or not (run / METRICS_FILE).is_file():
        return False
    if (score := read_validation_score(checkpoint)) is None:
        return False
    rows = read_rows(run / METRICS_FILE)
    scores = logged_scores(rows, step_of(checkpoint), score.metric, score.higher_is_better)
    return has_stopped_improving((of.rank for of in scores.values()), train)
