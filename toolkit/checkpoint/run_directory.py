"""The run directory: which one a run writes to, and whether it continues what is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from toolkit.checkpoint.catalog import checkpoints_of, newest_usable
from toolkit.checkpoint.evaluation import read_loss
from toolkit.checkpoint.state import State, read_state, recipe_differences
from toolkit.config.recipe import dump
from toolkit.config.schema import RunConfig
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.file_lock import NAME as LOCK
from toolkit.runtime.file_lock import RunLock
from toolkit.runtime.paths import replace_text

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes, and the checkpoint it continues from."""

    path: Path
    checkpoint: Path | None
    """None starts from the beginning."""
    state: State | None
    """Of the checkpoint."""
    finished: bool
    """The run in it is already done: nothing to train, and nothing to validate."""
    overridden: tuple[str, ...] = ()
    """In what the rest of the run will differ from what the checkpoint was written under."""


def _by_nobody(path: Path) -> str | None:
    return None


@dataclass(frozen=True)
class _Wish:
    """Who wants a directory."""

    config: RunConfig
    recipe: Path
    ranks: int
    held_by: Callable[[Path], str | None]
    create: bool
    override: bool


@dataclass
class _Claimed:
    """A directory that was picked, and what has to be undone."""

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
            claimed = _choose(_Wish(config, recipe, ranks or world.size, held_by, create, override))
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
            _let_go(claimed)


def _choose(wish: _Wish) -> _Claimed:
    output = wish.config.output
    if output.dir:
        claimed = _lock(Path(output.dir), wish)
        if isinstance(claimed, str):
            raise CheckpointError(
                f"{output.dir} is being written by another run: {claimed}. Wait for it, or choose another --output.dir"
            )
        with _undone_if_refused(claimed):
            if holder := wish.held_by(claimed.directory.path):
                raise CheckpointError(
                    f"{output.dir} belongs to {holder}; wait for it, cancel it, or choose another --output.dir"
                )
            claimed.directory = _inspect(claimed.directory.path, wish)
        return claimed
    if wish.override:
        raise CheckpointError("--resume-override goes on with a run that you name: add its --output.dir")
    for number in count(1):
        path = Path("runs") / (wish.recipe.stem if number == 1 else f"{wish.recipe.stem}-{number}")
        if output.resume == "must" and not path.exists():
            raise CheckpointError(
                f"output.resume is must, but no directory up to {path} holds an interrupted run of this recipe; "
                "name the run with --output.dir"
            )
        claimed = _lock(path, wish)
        if isinstance(claimed, str):
            continue
        with _undone_if_refused(claimed):
            found = None if wish.held_by(path) else _inspect_if_fits(path, wish)
            if found is not None:
                claimed.directory = found
                return claimed
        _let_go(claimed)
    raise AssertionError("unreachable")


def _lock(path: Path, wish: _Wish) -> _Claimed | str:
    """The directory, locked; or who holds it."""
    claimed = _Claimed(RunDirectory(path, None, None, finished=False), None)
    if not wish.create and not path.exists():
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


def _let_go(claimed: _Claimed) -> None:
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
def _undone_if_refused(claimed: _Claimed) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _let_go(claimed)
        raise


def _inspect_if_fits(path: Path, wish: _Wish) -> RunDirectory | None:
    """The automatic choice: an unused directory, or an unfinished run of the same recipe that may be continued."""
    resume = wish.config.output.resume
    if not checkpoints_of(path):
        return None if resume == "must" else RunDirectory(path, None, None, finished=False)
    if resume == "never" or not any(_is_of_recipe(checkpoint, wish) for checkpoint in checkpoints_of(path)):
        return None
    found = _inspect(path, wish)
    return None if found.finished else found


def _is_of_recipe(checkpoint: Path, wish: _Wish) -> bool:
    try:
        return not any(recipe_differences(read_state(checkpoint), wish.config, wish.ranks))
    except CheckpointError:
        return False


def _inspect(path: Path, wish: _Wish) -> RunDirectory:
    resume = wish.config.output.resume
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
    refused, harmless = recipe_differences(state, wish.config, wish.ranks)
    if refused or (harmless and not wish.override):
        raise CheckpointError(_refusal(path, checkpoint, refused, harmless))
    finished = state.step >= state.steps_in_all(wish.config, wish.ranks)
    if finished and wish.config.data.validation is not None and read_loss(checkpoint) is None:
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
