"""Choose and lock the directory that a run writes to, and find the checkpoint to resume from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from toolkit.checkpoint.catalog import checkpoints_of, newest_usable
from toolkit.checkpoint.early_stopping import ended_early
from toolkit.checkpoint.manifest import NewerVersionError
from toolkit.checkpoint.own_directory import claim_linked_checkpoints, holds_run, require_run_or_unused
from toolkit.checkpoint.state import CheckpointState, read_state, recipe_differences
from toolkit.checkpoint.validation_score import read_validation_score
from toolkit.config.recipe import dump
from toolkit.config.schema import RunConfig
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.file_lock import LOCK_FILE_NAME, RunLock
from toolkit.runtime.paths import replace_text
from toolkit.runtime.privacy import close_directory, make_directory, set_access

log = logging.getLogger("frostline")

OUT_OF_FOLD_FILE = "out_of_fold.jsonl"
"""Losses of the rows that a run holds out as its fold; a run of ``data.folds`` ends with it. In the directory
of all folds, those of all rows."""
RECORD_FILE = "record.json"
"""What a run was, as far as no other file says it: parts of the model and what trains of them, rows, hardware."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory that a run writes to, and the checkpoint that it resumes from."""

    path: Path
    checkpoint: Path | None = None
    """Verified checkpoint to resume from; None for a new run."""
    state: CheckpointState | None = None
    """State of the checkpoint; None for a new run."""
    finished: bool = False
    """True if its run is complete: nothing is left to train or to validate."""


@contextmanager
def claim(
    config: RunConfig,
    recipe: Path,
    world: World,
    held_by: Callable[[Path], str | None] = lambda path: None,
    create: bool = True,
    ranks: int | None = None,
    override: bool = False,
) -> Iterator[RunDirectory]:
    """Choose the directory of a run, the same on every rank, and hold its lock within the context.

    The directory is ``output.dir`` if set, else the first of ``runs/RECIPE``, ``runs/RECIPE-2`` … that is free or holds
    an interrupted run of the same recipe. The checkpoint to resume from is verified. A directory that was created
    for the claim and is still empty at the end is removed.

    Args:
        config: the recipe.
        recipe: path of the recipe file, which names the directory if ``output.dir`` is not set.
        world: this process among all ranks.
        held_by: returns who reserved a directory without a running process, such as a queued job, or None.
        create: False to leave a missing directory missing.
        ranks: number of ranks that will train; None for those of ``world``.
        override: True to accept the recipe differences that ``recipe_differences`` calls harmless.

    Raises:
        CheckpointError: the directory holds the run of another recipe or no run, is in use, its checkpoints are
            damaged, or ``output.resume`` forbids it.
    """
    with ExitStack() as locks:
        directory = world.on_main(
            lambda: _claim_directory(config, recipe, ranks or world.size, held_by, create, override, locks)
        )
        yield directory


def _claim_directory(
    config: RunConfig,
    recipe: Path,
    ranks: int,
    held_by: Callable[[Path], str | None],
    create: bool,
    override: bool,
    locks: ExitStack,
) -> RunDirectory:
    """Lock the directory that ``output.dir`` names, or the first of the recipe's directories that fits, on rank 0.

    See ``claim`` for the arguments. ``locks`` holds the lock until it is closed.
    """
    output = config.output
    if output.dir:
        path = Path(output.dir)
        require_run_or_unused(path)
        if holder := locks.enter_context(_locked(path, create, output.share == "group")):
            raise CheckpointError(
                f"{output.dir} is being written by another run: {holder}. Wait for it, or choose another --output.dir"
            )
        claim_linked_checkpoints(path, mark=create)
        if holder := held_by(path):
            raise CheckpointError(
                f"{output.dir} belongs to {holder}; wait for it, cancel it, or choose another --output.dir"
            )
        return _read_run(path, config, ranks, override)
    if override:
        raise CheckpointError("--resume-override goes on with a run that you name: add its --output.dir")
    for number in count(1):
        path = Path("runs") / (recipe.stem if number == 1 else f"{recipe.stem}-{number}")
        if output.resume == "must" and not path.exists():
            raise CheckpointError(
                f"output.resume is must, but no directory up to {path} holds an interrupted run of this recipe; "
                "name the run with --output.dir"
            )
        try:
            require_run_or_unused(path)
        except CheckpointError as error:
            log.info("%s is not taken: %s", path, error)
            continue
        with ExitStack() as lock:
            if lock.enter_context(_locked(path, create, output.share == "group")) or held_by(path):
                continue
            if directory := _read_run_if_fits(path, config, ranks):
                claim_linked_checkpoints(path, mark=create)
                locks.push(lock.pop_all())
                return directory
    raise AssertionError("unreachable")


@contextmanager
def _locked(path: Path, create: bool, is_shared: bool) -> Iterator[str | None]:
    """Lock a directory within the context; yield None, or a text that names another process that holds the lock.

    A missing directory is created, and removed at the end if it is still empty; without ``create`` it stays missing.
    """
    if not create and not path.exists():
        yield None  # nobody can hold what does not exist
        return
    created = [folder for folder in (path, *path.parents) if not folder.exists()]  # deepest first
    try:
        make_directory(path, is_shared)
        if is_shared:
            set_access(path, True)
        elif holds_run(path):
            close_directory(path)
        lock = RunLock.take(path)
    except OSError as error:
        raise CheckpointError(
            f"run directory {path} cannot be written ({error}); choose another --output.dir"
        ) from None
    if isinstance(lock, str):
        yield lock
        return
    try:
        yield None
    finally:
        is_unused = False
        with suppress(OSError):  # of a failing disk the first error is told
            is_unused = path in created and {entry.name for entry in path.iterdir()} <= {LOCK_FILE_NAME}
        lock.release(remove=is_unused)
        if is_unused:
            with suppress(OSError):  # another run has just started to use it
                for folder in created:
                    folder.rmdir()


def _read_run_if_fits(path: Path, config: RunConfig, ranks: int) -> RunDirectory | None:
    """Return the directory if it is unused or holds an unfinished run of the same recipe to resume; else None."""
    resume, present = config.output.resume, checkpoints_of(path)
    if not present:
        return None if resume == "must" else RunDirectory(path)
    if resume == "never" or not any(_has_same_recipe(checkpoint, config, ranks) for checkpoint in present):
        return None
    directory = _read_run(path, config, ranks, override=False)
    return None if directory.finished else directory


def _has_same_recipe(checkpoint: Path, config: RunConfig, ranks: int) -> bool:
    """Return True if a checkpoint can be read and its recipe has no difference from ``config``."""
    try:
        return not any(recipe_differences(read_state(checkpoint), config, ranks))
    except NewerVersionError as error:
        log.warning("its run is not taken up: %s", error)
        return False
    except CheckpointError:
        return False


def _read_run(path: Path, config: RunConfig, ranks: int, override: bool) -> RunDirectory:
    """Find the checkpoint to resume from in ``path``, and check ``output.resume`` and the recipe against it."""
    resume = config.output.resume
    if (present := checkpoints_of(path)) and resume == "never":
        raise CheckpointError(
            f"output.resume is never, but {path} holds {present[-1].name}; choose another --output.dir, or resume: auto"
        )
    checkpoint = newest_usable(path, must_be_latest=resume == "must")
    if checkpoint is None:
        if resume == "must":
            raise CheckpointError(f"output.resume is must, but {path} holds no checkpoint; expected an interrupted run")
        return RunDirectory(path)
    state = read_state(checkpoint)
    refused, harmless = recipe_differences(state, config, ranks)
    if refused or (harmless and not override):
        raise CheckpointError(_other_recipe_message(path, checkpoint, refused, harmless))
    for difference in harmless:
        log.warning("overridden: %s", difference)
    finished = state.step >= state.resumed_total_steps(config, ranks) or ended_early(path, checkpoint, config.train)
    if finished and config.data.validation is not None and read_validation_score(checkpoint) is None:
        finished = False  # the last validation is missing
    if finished and config.data.fold is not None and not (path / OUT_OF_FOLD_FILE).is_file():
        finished = False  # the losses of its fold are missing
    return RunDirectory(path, checkpoint, state, finished)


def _other_recipe_message(path: Path, checkpoint: Path, refused: list[str], harmless: list[str]) -> str:
    """Return the message for a directory whose run has another recipe."""
    lines = [f"{path} holds a run of another recipe:", *(f"  - {difference}" for difference in refused + harmless)]
    if refused:
        lines.append(
            "Choose another --output.dir, or run its own config.yaml; a new run may start from these weights alone "
            f"with --model.delta {checkpoint}"
        )
    else:
        lines.append("Choose another --output.dir, run its own config.yaml, or go on with these with --resume-override")
    return "\n".join(lines)


def fold_runs(path: Path) -> list[Path]:
    """Return the runs of ``data.folds`` in a directory, in the order of their folds; none if it holds no folds."""
    runs = (config.parent for config in path.glob("fold-*/config.yaml"))
    return sorted(runs, key=lambda run: (len(run.name), run))


def write_config(path: Path, config: RunConfig) -> None:
    """Write the resolved recipe to ``config.yaml`` with ``output.dir`` set, so that ``--config`` resumes the run."""
    output = config.output.model_copy(update={"dir": str(path)})
    replace_text(path / "config.yaml", dump(config.model_copy(update={"output": output})))
