"""Score a run that has ended beside its base, and write its report (``output.report``)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from toolkit.checkpoint.catalog import LATEST_FILE
from toolkit.checkpoint.run_directory import OUT_OF_FOLD_FILE, fold_runs
from toolkit.config.schema import RunConfig
from toolkit.evaluation.comparison import Comparison, compare_models
from toolkit.evaluation.outputs import Asked
from toolkit.evaluation.rows import Part
from toolkit.evaluation.scoring import SeveralTasksError
from toolkit.evaluation.sources import BASE, OpenOptions
from toolkit.report.page import report_paths, write_report
from toolkit.runtime.errors import FrostlineError
from toolkit.runtime.shipped import command_line

log = logging.getLogger("frostline")

_BATCH = 8
"""Rows that are answered together; each has a key-value cache."""


def report_after_training(run: Path, config: RunConfig) -> None:
    """Write the reports that a recipe asks for, in one process, which holds no model any more.

    Those that are newer than what was trained stay, and those of folds wait for the last fold.

    The run, or the directory of its folds, is scored on its validation rows, or those that each fold held out, and
    answers ``output.report_answers`` of them. The run is whole whatever happens here: a failure is logged, with the
    command to try again, and a report without scores is written if that can be.
    """
    languages = list(dict.fromkeys(config.output.report))
    if not languages:
        return
    folds, comparison = config.data.folds or 0, None
    try:
        if folds and not all((run / f"fold-{fold}" / OUT_OF_FOLD_FILE).is_file() for fold in range(folds)):
            log.info("the report over all folds comes with the last of them")
            return
        if _is_newer(report_paths(run, languages), run):
            return
        if folds or config.data.validation is not None:
            comparison = _score(run, config)
        paths = write_report(run, comparison, languages)
    except FrostlineError as error:
        log.warning("no report was written: %s", error)
        return
    log.info("report: %s", ", ".join(map(str, paths)))


def _is_newer(reports: Sequence[Path], run: Path) -> bool:
    """Return whether all reports are there and were written after the last checkpoint of the run, or of its folds."""
    if not all(path.is_file() for path in reports):
        return False
    written = min(path.stat().st_mtime_ns for path in reports)
    return all((path / "checkpoints" / LATEST_FILE).stat().st_mtime_ns < written for path in fold_runs(run) or [run])


def _score(run: Path, config: RunConfig) -> Comparison | None:
    """Compare the run with its base; None, with a warning, if that fails, as where one GPU cannot hold the model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    folds = config.data.folds is not None
    answers = 0 if folds else config.output.report_answers
    size = max(config.train.micro_batch_size, _BATCH) if answers else config.train.micro_batch_size
    options = OpenOptions(trust_remote_code=config.model.trust_remote_code)
    part: Part = "test" if folds else "validation"
    log.info("scoring the run beside its base for its report (output.report: [] leaves that out)")
    try:
        try:
            return compare_models([BASE, str(run)], None, part, Asked(size, answers), options)
        except SeveralTasksError:  # of a mixture, which have the loss alone in common
            return compare_models([BASE, str(run)], None, part, Asked(size), options)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        log.warning(
            "the run could not be scored for its report (%s); to try again: %s %s", text, command_line("report"), run
        )  # fmt: skip
        return None
