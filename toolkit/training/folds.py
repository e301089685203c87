"""Train the folds of ``data.folds`` one after the other, and put their out-of-fold losses into one table."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from toolkit.checkpoint.catalog import checkpoints_of
from toolkit.checkpoint.run_directory import OUT_OF_FOLD_FILE, fold_runs
from toolkit.config.flags import Invocation
from toolkit.config.recipe import read_saved
from toolkit.inference.evaluation import row_losses
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.json_text import to_json
from toolkit.runtime.paths import explain_refused_write, replace_text
from toolkit.training.context import RunContext
from toolkit.training.phases import PhaseState
from toolkit.training.validation import without_dropout

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class OutOfFoldLoss:
    """The loss of one row under the run that did not see it."""

    fold: int
    row: str
    """File and row."""
    loss: float
    """Mean cross entropy over the row's supervised tokens."""
    tokens: int
    """Number of those tokens."""


def train_folds(invocation: Invocation, train: Callable[[Invocation], int]) -> int:
    """Train the fold that ``data.fold`` names, or all that are not finished; return the exit code of the last.

    ``train`` trains one run. Fold i is written to ``fold-i`` of ``output.dir``, which is ``runs/RECIPE`` if not set.

    Raises:
        CheckpointError: ``output.dir`` holds a run without folds, or a file of another's that the last would replace.
    """
    data = invocation.config.data
    assert data.folds is not None
    parent = parent_of_folds(invocation)
    if (parent / OUT_OF_FOLD_FILE).exists() and not fold_runs(parent):
        raise CheckpointError(
            f"{parent / OUT_OF_FOLD_FILE} is there without folds, and would be overwritten; choose another --output.dir"
        )
    if checkpoints_of(parent):
        raise CheckpointError(f"{parent} holds a run without folds; choose another --output.dir for data.folds")
    for fold in range(data.folds) if data.fold is None else (data.fold,):
        log.info("fold %d of %d, into %s", fold, data.folds, _directory(parent, fold))
        if code := train(_invocation_of(invocation, parent, fold)):
            return code
        gc.collect()  # the model of one fold is not to be in memory beside the next
    return 0


def parent_of_folds(invocation: Invocation) -> Path:
    """Return the directory in which each fold has one of its own."""
    config = invocation.config
    if config.output.dir is None:
        return Path("runs") / invocation.recipe.stem
    given = Path(config.output.dir)
    is_of_fold = config.data.fold is not None and given.name == _directory(given, config.data.fold).name
    return given.parent if is_of_fold else given  # config.yaml of a fold's directory names that directory


def save_out_of_fold(context: RunContext, state: PhaseState, run_dir: Path) -> None:
    """Compute the loss of each row that the run held out as its fold, and write them; every rank calls it.

    Raises:
        StopRequested: a signal came; the same command computes them again.
        DiskError: the run directory cannot be written.
    """
    rows, fold = context.dataset.test, context.config.data.fold
    assert fold is not None
    with without_dropout(state):
        losses = row_losses(state.engine.forward_loss, state.prefix, rows, context.pad_id, context.world)
    if context.world.is_main:
        found = [
            OutOfFoldLoss(fold, row.origin, loss, row.supervised_tokens)
            for row, loss in zip(rows, losses, strict=True)
        ]  # fmt: skip
        with explain_refused_write(run_dir):
            _write(run_dir / OUT_OF_FOLD_FILE, found)


def report_folds(invocation: Invocation, world: World) -> None:
    """Log the losses of all folds, and write those of all rows into one file, once every fold has its own."""
    folds, parent = invocation.config.data.folds, parent_of_folds(invocation)
    assert folds is not None
    files = [_directory(parent, fold) / OUT_OF_FOLD_FILE for fold in range(folds)]
    if not world.is_main:
        return
    if missing := [fold for fold, file in enumerate(files) if not file.is_file()]:
        log.info("the table over all folds comes with the last of them; missing: %s", ", ".join(map(str, missing)))
        return
    found = [_read(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    if differences := _recipe_differences([_directory(parent, fold) for fold in range(folds)]):
        log.warning("the folds are not of one recipe, and their losses do not compare: %s", "; ".join(differences))
    with explain_refused_write(parent):
        _write(parent / OUT_OF_FOLD_FILE, found)
    for line in table(found):
        log.info("%s", line)
    log.info("the loss of each row: %s", parent / OUT_OF_FOLD_FILE)


def _recipe_differences(directories: Sequence[Path]) -> list[str]:
    """Describe each setting of training, mask, model and rows that not all folds have alike."""
    recipes = []
    for directory in directories:
        file = directory / "config.yaml"
        recipe = read_saved(file).model_dump(mode="json", exclude={"output", "prefix"})
        del recipe["data"]["fold"]
        recipes.append({f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()})
    return [
        f"{key} is {recipes[0][key]!r} in {directories[0].name}, {other[key]!r} in {directory.name}"
        for key in recipes[0]
        for directory, other in zip(directories, recipes, strict=True)
        if other[key] != recipes[0][key]
    ]


def table(found: Sequence[OutOfFoldLoss]) -> Iterator[str]:
    """Yield the lines of a table of the folds, and the loss over all rows with the folds' range."""
    yield f"{'fold':>9} {'rows':>7} {'tokens':>9} {'loss':>8}"
    folds = sorted({row.fold for row in found})
    losses = [_mean([row for row in found if row.fold == fold]) for fold in folds]
    for fold, loss in zip(folds, losses, strict=True):
        rows = [row for row in found if row.fold == fold]
        yield f"{fold:>9} {len(rows):>7} {sum(row.tokens for row in rows):>9,} {loss:>8.4f}"
    tokens = sum(row.tokens for row in found)
    yield (
        f"{'all':>9} {len(found):>7} {tokens:>9,} {_mean(found):>8.4f}, out of fold; "
        f"folds from {min(losses):.4f} to {max(losses):.4f}"
    )


def _mean(rows: Sequence[OutOfFoldLoss]) -> float:
    """Return the mean loss over the supervised tokens of rows."""
    return sum(row.loss * row.tokens for row in rows) / sum(row.tokens for row in rows)


def _write(path: Path, rows: Sequence[OutOfFoldLoss]) -> None:
    replace_text(path, "".join(to_json(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def _read(line: str) -> OutOfFoldLoss:
    """Read a line of ``_write``, which has null for a loss that was not finite."""
    values = json.loads(line)
    return OutOfFoldLoss(**{**values, "loss": math.nan if values["loss"] is None else values["loss"]})


def _directory(parent: Path, fold: int) -> Path:
    return parent / f"fold-{fold}"


def _invocation_of(invocation: Invocation, parent: Path, fold: int) -> Invocation:
    """Return the command line of one fold."""
    config = invocation.config
    data = config.data.model_copy(update={"fold": fold})
    output = config.output.model_copy(update={"dir": str(_directory(parent, fold))})
    return replace(invocation, config=config.model_copy(update={"data": data, "output": output}))
