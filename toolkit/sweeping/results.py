"""What the trials of a sweep gave, and what each cost: read from their runs, and scored on the rows they held out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from toolkit.checkpoint.choice import ChosenCheckpoint, find_checkpoint
from toolkit.checkpoint.manifest import read_manifest
from toolkit.checkpoint.metrics_log import METRICS_FILE, number, read_rows
from toolkit.evaluation.comparison import Comparison, compare_models
from toolkit.evaluation.outputs import Asked
from toolkit.evaluation.rows import Part
from toolkit.evaluation.sources import BASE, OpenOptions
from toolkit.evaluation.verdicts import ModelScores
from toolkit.metrics.resampling import Interval
from toolkit.runtime import signals
from toolkit.runtime.errors import CheckpointError, FrostlineError
from toolkit.sweeping.definition import Settings
from toolkit.sweeping.inputs import base_key, require_same_inputs
from toolkit.sweeping.trials import Sweep, Trial

log = logging.getLogger("frostline")

Scores = dict[str, Any]
"""Value, ends of the 95 % interval, and rows of a metric; whether more of it is better."""


def score_trials(sweep: Sweep, with_test: bool = False) -> bool:
    """Read the costs of the finished trials and score their best checkpoints; return False if a signal came first.

    Each is scored on the rows that it held out: ``data.validation`` as a fraction holds out others for each
    ``train.seed``. The base is scored once on each such set of rows. ``with_test`` also scores the rows of
    ``data.test``, by which nothing is chosen. Scores are kept; a trial that cannot be scored says why.
    """
    for trial in sweep.trials:
        if not trial.is_done:
            continue
        if signals.stop_requested():
            return False
        try:
            _score(sweep, trial, with_test)
            trial.fault = None
        except FrostlineError as error:
            trial.result = {}
            trial.fault = f"cannot be scored: {' '.join(str(error).split())}"
            log.warning("sweep: trial %d %s", trial.number, trial.fault)
        sweep.save()
    return True


def bases_of(sweep: Sweep) -> dict[str, Any]:
    """Return the scores of the models before training that the trials began from, without those of other trials."""
    keys = {trial.result.get("base") for trial in sweep.trials}
    return {key: scores for key, scores in sweep.base.items() if key in keys}


def costs_of(trial: Trial) -> dict[str, float]:
    """Return seconds of the training steps, most memory in GiB and most trained parameters, by ``metrics.jsonl``.

    Filling the cache is not among the seconds: which trial does it is chance.

    Raises:
        CheckpointError: the run has logged no step.
    """
    needed = {"trained_parameters", "seconds", "peak_memory_gib"}
    rows = [row for row in read_rows(trial.directory / METRICS_FILE) if needed <= row.keys()]
    if not rows:
        raise CheckpointError(f"{trial.directory / METRICS_FILE} has no step; expected those of a finished run")
    return {
        "seconds": sum(number(row["seconds"]) for row in rows),
        "memory_gib": max(number(row["peak_memory_gib"]) for row in rows),
        "trained": int(max(number(row["trained_parameters"]) for row in rows)),
    }


def quality_of(result: Mapping[str, Any]) -> Interval | None:
    """Return the score that trials are compared by, of ``Trial.result`` or of a base.

    None before it is known, and if it is not finite.
    """
    scores = result.get("validation")
    if not scores or scores["value"] is None or not math.isfinite(scores["value"]):
        return None
    return Interval(*(float("nan") if scores[key] is None else scores[key] for key in ("value", "low", "high")))


def outcomes(sweep: Sweep) -> list[tuple[Settings, float | None]]:
    """Return settings and score of each trial; None of one that has none."""
    scores = [quality_of(trial.result) for trial in sweep.trials]
    return [
        (trial.settings, None if score is None else score.value)
        for trial, score in zip(sweep.trials, scores, strict=True)
    ]


def higher_is_better(sweep: Sweep) -> bool:
    """Return whether more of what trials are compared by is better; False before anything is scored."""
    return any(trial.result["validation"]["higher_is_better"] for trial in sweep.trials if "validation" in trial.result)


def _score(sweep: Sweep, trial: Trial, with_test: bool) -> None:
    """Fill ``Trial.result``, and the scores of the base if these rows have none yet."""
    require_same_inputs(sweep, trial)
    chosen = _checkpoint(trial)
    checkpoint, digest = str(chosen.step), read_manifest(chosen.checkpoint)[1]
    key = base_key(trial.config, chosen.checkpoint)
    if trial.result.get("digest") != digest:
        trial.result = {"checkpoint": checkpoint, "digest": digest, **costs_of(trial)}
    trial.result["base"] = key
    parts: tuple[Part, ...] = ("validation", "test") if with_test else ("validation",)
    of_base = sweep.base.setdefault(key, {})
    run, metric = f"{trial.directory}@{checkpoint}", trial.config.train.metric_for_best_model
    for part in parts:
        if part in trial.result and part in of_base:
            continue
        sources = [run] if part in of_base else [BASE, run]
        comparison = _compare(trial, sources, part, 0)
        if metric not in _model(comparison, run).scores:  # it is of generated answers
            comparison = _compare(trial, sources, part, trial.config.output.sample_answers)
        trial.result[part] = _scores(comparison, run, metric)
        if part not in of_base:
            of_base[part] = _scores(comparison, BASE, metric)


def _checkpoint(trial: Trial) -> ChosenCheckpoint:
    """Return the best checkpoint of a trial; the latest where no validation loss was finite."""
    try:
        return find_checkpoint(trial.directory, "best")
    except CheckpointError:
        return find_checkpoint(trial.directory)


def _compare(trial: Trial, sources: list[str], part: Part, answers: int) -> Comparison:
    asked = Asked(trial.config.train.micro_batch_size, answers)
    options = OpenOptions(trust_remote_code=trial.config.model.trust_remote_code)
    return compare_models(sources, None, part, asked, options)


def _scores(comparison: Comparison, name: str, metric: str) -> Scores:
    """Return the score of one model by the metric that trials are compared by."""
    model = _model(comparison, name)
    if metric not in model.scores:
        raise CheckpointError(f"{metric} is not among {', '.join(model.scores)}, which these rows have")
    score = model.scores[metric]
    better = bool(score.higher_is_better)
    return {**asdict(Interval(score.value, score.low, score.high)), "higher_is_better": better,
            "rows": comparison.rows, "metric": metric}  # fmt: skip


def _model(comparison: Comparison, name: str) -> ModelScores:
    return next(model for model in comparison.models if model.name == name)
