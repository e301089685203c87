"""Early stopping: what the validation losses of a run say, so that an interrupted run stops where it would have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from toolkit.config.schema import TrainConfig

METRICS_FILE = "metrics.jsonl"
"""What a run logs, in its directory."""


def has_stopped_improving(losses: Iterable[float], train: TrainConfig) -> bool:
    """Return whether training ends after these validation losses (``train.early_stopping_patience``).

    It does once the loss was not below the lowest one before by more than ``train.early_stopping_threshold`` in so many
    validations in a row. A loss that is not finite is not below.
    """
    lowest, in_a_row = math.inf, 0
    for loss in losses:
        if loss < lowest - train.early_stopping_threshold or (lowest == math.inf and math.isfinite(loss)):
            lowest, in_a_row = loss, 0
        else:
            in_a_row += 1
    return train.early_stopping_patience is not None and in_a_row >= train.early_stopping_patience


def logged_losses(lines: Iterable[str], until: int) -> list[float]:
    """Return the validation losses up to a step in the lines of ``metrics.jsonl``, one a step; NaN if not finite."""
    rows = map(json.loads, lines)
    found = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row and row["step"] <= until}
    return [math.nan if found[step] is None else float(found[step]) for step in sorted(found)]


def ended_early(run: Path, step: int, train: TrainConfig) -> bool:
    """Return whether the run in a directory, whose newest checkpoint is of ``step``, ended there by early stopping."""
    if train.early_stopping_patience is None or not (run / METRICS_FILE).is_file():
        return False
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    whole = (line for line in lines if line.endswith("\n"))  # a killed process leaves a part of its last one
    return has_stopped_improving(logged_losses(whole, step), train)
