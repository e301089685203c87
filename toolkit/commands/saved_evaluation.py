"""Keep the scores of runs where their curves are: in the run directory, its metrics.jsonl and TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.runtime.errors import CheckpointError, UsageError
from toolkit.runtime.file_lock import RunLock
from toolkit.runtime.json_text import to_json
from toolkit.runtime.paths import LineFile, explain_refused_write, replace_text

if TYPE_CHECKING:
    from toolkit.evaluation.comparison import Comparison
    from toolkit.evaluation.sources import ModelName

log = logging.getLogger("frostline")

EVALUATION_FILE = "evaluation.json"
"""What ``evaluate.py --save`` printed, in the directory of each run that it evaluated."""


def runs_among(sources: Sequence[str]) -> list[ModelName]:
    """Return the sources that are runs, or steps of one, and can be written to now.

    Raises:
        UsageError: there are none.
        CheckpointError: one is being trained, or cannot be written.
    """
    from toolkit.evaluation.sources import ModelName
    from toolkit.inference.open_model import is_run

    runs = [name for name in map(ModelName.parse, sources) if not name.is_base and is_run(Path(name.path))]
    if not runs:
        raise UsageError(
            f"--save writes into the runs among the sources, and {', '.join(sources)} is none; name the directory of "
            "a run (of data.folds: of a fold), or keep the JSON with --output FILE"
        )
    for name in runs:
        with _locked(Path(name.path)):
            pass
    return runs


def save_evaluation(comparison: Comparison, runs: Sequence[ModelName]) -> None:
    """Write a comparison into the directories of its runs.

    Each has all of it in ``evaluation.json``, which is replaced, and its own scores as a line of ``metrics.jsonl`` and,
    if its recipe reports to TensorBoard, as points ``evaluation/METRIC`` at the step that was evaluated.

    Raises:
        CheckpointError: a run has begun to be trained meanwhile.
        DiskError: a directory cannot be written.
    """
    values = comparison.as_dict()
    models = {model["name"]: model for model in values["models"]}
    for name in runs:
        run, model = Path(name.path), models[name.text]
        scores = {metric: score["value"] for metric, score in model["scores"].items()}
        about = {"data": values["data"], "rows": values["rows"], "held_out": values["held_out"]}
        row = {"step": model["step"], "event": "evaluation", **about, "scores": scores}
        with _locked(run), explain_refused_write(run):
            replace_text(run / EVALUATION_FILE, to_json(values, ensure_ascii=False) + "\n")
            lines = LineFile(run / "metrics.jsonl")
            lines.write(to_json(row, ensure_ascii=False))
            lines.close()
            _show(run, model["step"], scores)
        log.info("scores of %s: %s", name.text, run / EVALUATION_FILE)


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory within the context: nobody trains in it meanwhile."""
    try:
        lock = RunLock.take(run)
    except OSError as error:
        raise CheckpointError(f"{run} cannot be written ({error}); leave out --save, and take --output FILE") from None
    if isinstance(lock, str):
        raise CheckpointError(
            f"{run} is being trained: {lock}. --save writes to its metrics.jsonl and TensorBoard files; wait for it, "
            "or keep the JSON with --output FILE"
        )
    try:
        yield
    finally:
        lock.release()


def _show(run: Path, step: int, scores: dict[str, Any]) -> None:
    """Add the scores to a run's TensorBoard directory, if its recipe has one; what is there stays."""
    from torch.utils.tensorboard import SummaryWriter

    from toolkit.config.recipe import read_saved

    if "tensorboard" not in read_saved(run / "config.yaml").output.report_to:
        return
    if (run / "tensorboard").is_symlink():
        log.warning("%s is a symbolic link, which is not followed: it gets no scores", run / "tensorboard")
        return
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for metric, value in scores.items():
            if value is not None:
                writer.add_scalar(f"evaluation/{metric}", value, step)
