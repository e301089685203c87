"""Choose and lock the directory that a run writes to, and find the checkpoint to resume from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from toolkit.checkpoint.catalog import checkpoints_of, newest_usable
from toolkit.checkpoint.evaluation import read_loss
from toolkit.checkpoint.manifest import NewerVersionError
from toolkit.checkpoint.state import CheckpointState, read_state, recipe_differences
from toolkit.config.recipe import dump
from toolkit.config.schema import RunConfig
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.file_lock import LOCK_FILE_NAME as LOCK
from toolkit.runtime.file_lock import RunLock
from toolkit.runtime.paths import replace_text

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class RunDirectory:
    """The directory that a run writes to, and the checkpoint that it resumes from."""

    path: Path
    checkpoint: Path | None
    """Verified checkpoint to resume from; None for a new run."""
    state: CheckpointState | None
    """State of the checkpoint; None for a new run."""
    finished: bool
    """True if its run is complete: nothing is left to train or to validate."""
    overridden: tuple[str, ...] = ()
    """Differences from the checkpoint's recipe that ``--resume-override`` accepted, one line each."""


def _no_holder(path: Path) -> str | None:
    """Return None: the default of ``claim`` for callers without a job queue."""
    return None


@dataclass(frozen=True)
class _ClaimRequest:
    """The arguments of ``claim``; that function documents them."""

    config: RunConfig
    recipe: Path
    ranks: int
    held_by: Callable[[Path], str | None]
    create: bool
    override: bool


@dataclass
class _ClaimedDirectory:
    """A locked run directory, and what ``_release_claim`` has to undo."""

    directory: RunDirectory
    lock: RunLock | None
    """None if the directory does not exist and is not to be created."""
    created: list[Path] = field(default_factory=list)
    """Directories that were created for the claim, deepest first."""


@contextmanager
def claim(
    config: RunConfig,
    recipe: Path,
    world: World,
    held_by: Callable[[Path], str | None] = _no_holder,
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
        held_by: function that names who reserved a directory without a running process, such as a queued job, or
            returns None.
        create: False to leave a missing directory missing.
        ranks: number of ranks that will train; None for those of ``world``.
        override: True to accept the recipe differences that ``recipe_differences`` calls harmless.

    Raises:
        CheckpointError: the directory holds the run of another recipe, is in use, its checkpoints are damaged, or
            ``output.resume`` forbids it.
    """
    claimed = error = None
    if world.is_main:
        try:
            claimed = _claim_directory(_ClaimRequest(config, recipe, ranks or world.size, held_by, create, override))
        except CheckpointError as refused:
            error = refused
    try:
        directory, error = world.broadcast_object((claimed.directory if claimed else None, error))
        if error is not None:
            raise error
        for difference in directory.overridden:
            log.warning("overridden: %s", difference)
        yield directory
    finally:
        if claimed is not None:
            _release_claim(claimed)


def _claim_directory(request: _ClaimRequest) -> _ClaimedDirectory:
    """Lock the directory that ``output.dir`` names, or the first of the recipe's directories that fits; on rank 0."""
    output = request.config.output
    if output.dir:
        claimed = _lock_directory(Path(output.dir), request)
        if isinstance(claimed, str):
            raise CheckpointError(
                f"{output.dir} is being written by another run: {claimed}. Wait for it, or choose another --output.dir"
            )
        with _released_on_error(claimed):
            if holder := request.held_by(claimed.directory.path):
                raise CheckpointError(
                    f"{output.dir} belongs to {holder}; wait for it, cancel it, or choose another --output.dir"
                )
            claimed.directory = _read_run(claimed.directory.path, request)
        return claimed
    if request.override:
        raise CheckpointError("--resume-override goes on with a run that you name: add its --output.dir")
    for number in count(1):
        path = Path("runs") / (request.recipe.stem if number == 1 else f"{request.recipe.stem}-{number}")
        if output.resume == "must" and not path.exists():
            raise CheckpointError(
                f"output.resume is must, but no directory up to {path} holds an interrupted run of this recipe; "
                "name the run with --output.dir"
            )
        claimed = _lock_directory(path, request)
        if isinstance(claimed, str):
            continue
        with _released_on_error(claimed):
            directory = None if request.held_by(path) else _read_run_if_fits(path, request)
            if directory is not None:
                claimed.directory = directory
                return claimed
        _release_claim(claimed)
    raise AssertionError("unreachable")


def _lock_directory(path: Path, request: _ClaimRequest) -> _ClaimedDirectory | str:
    """Lock a directory, creating it if missing; return the claim, or a text that names who holds the lock."""
    claimed = _ClaimedDirectory(RunDirectory(path, None, None, finished=False), None)
    if not request.create and not path.exists():
        return claimed  # nobody can hold what does not exist
    claimed.created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock.take(path)
    except OSError as error:
        raise CheckpointError(
            f"run directory {path} cannot be written ({error}); choose another --output.dir"
        ) from None
    if isinstance(lock, str):
        return lock
    claimed.lock = lock
    return claimed


def _release_claim(claimed: _ClaimedDirectory) -> None:
    """Release the lock, and remove the directory if it was created for the claim and is still empty."""
    if claimed.lock is None:
        return
    path = claimed.directory.path
    unused = path in claimed.created and {entry.name for entry in path.iterdir()} <= {LOCK}
    claimed.lock.release(remove=unused)
    if unused:
        with suppress(OSError):  # another run has just started to use it
            for folder in claimed.created:
                folder.rmdir()


@contextmanager
def _released_on_error(claimed: _ClaimedDirectory) -> Iterator[None]:
    """Release the claim if the body of the context raises."""
    try:
        yield
    except BaseException:
        _release_claim(claimed)
        raise


def _read_run_if_fits(path: Path, request: _ClaimRequest) -> RunDirectory | None:
    """Return the directory if it is unused or holds an unfinished run of the same recipe to resume; else None."""
    resume = request.config.output.resume
    if not checkpoints_of(path):
        return None if resume == "must" else RunDirectory(path, None, None, finished=False)
    if resume == "never" or not any(_has_same_recipe(checkpoint, request) for checkpoint in checkpoints_of(path)):
        return None
    directory = _read_run(path, request)
    return None if directory.finished else directory


def _has_same_recipe(checkpoint: Path, request: _ClaimRequest) -> bool:
    """Return True if a checkpoint can be read and its recipe has no difference from the request's."""
    try:
        return not any(recipe_differences(read_state(checkpoint), request.config, request.ranks))
    except NewerVersionError as error:
        log.warning("its run is not taken up: %s", error)
        return False
    except CheckpointError:
        return False


def _read_run(path: Path, request: _ClaimRequest) -> RunDirectory:
    """Find the checkpoint to resume from in ``path``, and check ``output.resume`` and the recipe against it."""
    resume = request.config.output.resume
    if (present := checkpoints_of(path)) and resume == "never":
        raise CheckpointError(
            f"output.resume is never, but {path} holds {present[-1].name}; choose another --output.dir, or resume: auto"
        )
    checkpoint = newest_usable(path, must_be_latest=resume == "must")
    if checkpoint is None:
        if resume == "must":
            raise CheckpointError(f"output.resume is must, but {path} holds no checkpoint; expected an interrupted run")
        return RunDirectory(path, None, None, finished=False)
    state = read_state(checkpoint)
    refused, harmless = recipe_differences(state, request.config, request.ranks)
    if refused or (harmless and not request.override):
        raise CheckpointError(_refusal(path, checkpoint, refused, harmless))
    finished = state.step >= state.steps_in_all(request.config, request.ranks)
    if finished and request.config.data.validation is not None and read_loss(checkpoint) is None:
        finished = False  # the last validation is missing
    return RunDirectory(path, checkpoint, state, finished, tuple(harmless))


def _refusal(path: Path, checkpoint: Path, refused: list[str], harmless: list[str]) -> str:
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


def write_config(path: Path, config: RunConfig) -> None:
    """Write the resolved recipe to ``config.yaml`` with ``output.dir`` set, so that ``--config`` resumes the run."""
    output = config.output.model_copy(update={"dir": str(path)})
    replace_text(path / "config.yaml", dump(config.model_copy(update={"output": output})))
