"""Choose the directory that a run writes to, and whether it continues what is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from toolkit.checkpoint.catalog import checkpoints_of, newest_usable
from toolkit.checkpoint.evaluation import read_loss
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
    """The directory that a run writes to, and the checkpoint it continues from."""

    path: Path
    checkpoint: Path | None
    """None starts from the beginning."""
    state: CheckpointState | None
    """Of the checkpoint."""
    finished: bool
    """The run in it is already done: nothing to train, and nothing to validate."""
    overridden: tuple[str, ...] = ()
    """In what the rest of the run will differ from what the checkpoint was written under."""


def _by_nobody(path: Path) -> str | None:
    return None


@dataclass(frozen=True)
class _Request:
    """A run that wants a directory."""

    config: RunConfig
    recipe: Path
    ranks: int
    held_by: Callable[[Path], str | None]
    create: bool
    override: bool


@dataclass
class _LockedDirectory:
    """A directory that was chosen, and what has to be undone."""

    directory: RunDirectory
    lock: RunLock | None
    created: list[Path] = field(default_factory=list)


@contextmanager
def claim(
    config: RunConfig,
    recipe: Path,
    world: World,
    held_by: Callable[[Path], str | None] = _by_nobody,
    create: bool = True,
    ranks: int | None = None,
    override: bool = False,
) -> Iterator[RunDirectory]:
    """Pick the directory of a run, the same on every rank, and keep other runs out of it while entered.

    With ``output.dir`` that directory, else ``runs/RECIPE``, or the first ``runs/RECIPE-N`` that is free or holds an
    interrupted run of the same recipe. The checkpoint to continue from is verified to the last byte. A directory made
    for this and left without anything in it is removed again.

    Args:
        config: the run.
        recipe: the file it was read from; names the directory where the recipe does not.
        world: this process among the run's.
        held_by: who has a directory although no process runs there yet, such as a job in a queue; none for nobody.
        create: false leaves a directory that does not exist as it is.
        ranks: that will train, if not those of ``world``.
        override: go on under a recipe that differs in what ``recipe_differences`` calls harmless.

    Raises:
        CheckpointError: the directory holds another recipe's run, is in use, or ``output.resume`` forbids it; or its
            checkpoints are damaged.
    """
    claimed = error = None
    if world.is_main:
        try:
            claimed = _choose(_Request(config, recipe, ranks or world.size, held_by, create, override))
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
            _release(claimed)


def _choose(request: _Request) -> _LockedDirectory:
    output = request.config.output
    if output.dir:
        claimed = _lock(Path(output.dir), request)
        if isinstance(claimed, str):
            raise CheckpointError(
                f"{output.dir} is being written by another run: {claimed}. Wait for it, or choose another --output.dir"
            )
        with _released_on_error(claimed):
            if holder := request.held_by(claimed.directory.path):
                raise CheckpointError(
                    f"{output.dir} belongs to {holder}; wait for it, cancel it, or choose another --output.dir"
                )
            claimed.directory = _inspect(claimed.directory.path, request)
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
        claimed = _lock(path, request)
        if isinstance(claimed, str):
            continue
        with _released_on_error(claimed):
            found = None if request.held_by(path) else _inspect_if_fits(path, request)
            if found is not None:
                claimed.directory = found
                return claimed
        _release(claimed)
    raise AssertionError("unreachable")


def _lock(path: Path, request: _Request) -> _LockedDirectory | str:
    """Return the directory, locked; or who holds it."""
    claimed = _LockedDirectory(RunDirectory(path, None, None, finished=False), None)
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


def _release(claimed: _LockedDirectory) -> None:
    """Release the lock; a directory that was made for the run and holds nothing else goes with it."""
    if claimed.lock is None:
        return
    path = claimed.directory.path
    unused = path in claimed.created and {entry.name for entry in path.iterdir()} <= {LOCK}
    claimed.lock.release(remove=unused)
    if unused:
        with suppress(OSError):  # another run has come in
            for folder in claimed.created:
                folder.rmdir()


@contextmanager
def _released_on_error(claimed: _LockedDirectory) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _release(claimed)
        raise


def _inspect_if_fits(path: Path, request: _Request) -> RunDirectory | None:
    """Return an unused directory, or an unfinished run of the same recipe that may be continued; else None."""
    resume = request.config.output.resume
    if not checkpoints_of(path):
        return None if resume == "must" else RunDirectory(path, None, None, finished=False)
    if resume == "never" or not any(_is_of_recipe(checkpoint, request) for checkpoint in checkpoints_of(path)):
        return None
    found = _inspect(path, request)
    return None if found.finished else found


def _is_of_recipe(checkpoint: Path, request: _Request) -> bool:
    try:
        return not any(recipe_differences(read_state(checkpoint), request.config, request.ranks))
    except CheckpointError:
        return False


def _inspect(path: Path, request: _Request) -> RunDirectory:
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
        finished = False  # its last validation is still to be done
    return RunDirectory(path, checkpoint, state, finished, tuple(harmless))


def _refusal(path: Path, checkpoint: Path, refused: list[str], harmless: list[str]) -> str:
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
    """Save the resolved recipe with the directory it runs in; a valid ``--config`` that continues the run."""
    output = config.output.model_copy(update={"dir": str(path)})
    replace_text(path / "config.yaml", dump(config.model_copy(update={"output": output})))
