"""The run directory: which one a run writes to, and whether it continues what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from toolkit.checkpoint import latest_checkpoint, read_state
from toolkit.config.load import build, dump, read_recipe
from toolkit.config.schema import RunConfig
from toolkit.distributed import World
from toolkit.errors import CheckpointError, ConfigError
from toolkit.files import replace_text

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes, and the checkpoint it continues from."""

    path: Path
    checkpoint: Path | None
    """None starts from the beginning."""
    finished: bool
    """The run in it is already done: nothing to train."""


def _by_nobody(path: Path) -> str | None:
    return None


@contextmanager
def claim(
    config: RunConfig,
    recipe: Path,
    world: World,
    held_by: Callable[[Path], str | None] = _by_nobody,
    create: bool = True,
) -> Iterator[RunDirectory]:
    """Pick the directory of a run, the same on every rank, and keep other runs out of it while entered.

    With ``output.dir`` that directory, else ``runs/RECIPE``, or the first ``runs/RECIPE-N`` that is free or holds an
    interrupted run of the same recipe.

    Args:
        config: the run.
        recipe: the file it was read from; names the directory where the recipe does not.
        world: this process among the run's.
        held_by: who has a directory although no process runs there yet, such as a job in a queue; none for nobody.
        create: false leaves a directory that does not exist as it is.

    Raises:
        CheckpointError: the directory holds another recipe's run, is in use, or ``output.resume`` forbids it.
    """
    directory = lock = error = None
    if world.is_main:
        try:
            directory, lock = _choose(config, recipe, held_by, create)
        except CheckpointError as refused:
            error = refused
    try:
        directory, error = world.share((directory, error))
        if error is not None:
            raise error
        yield directory
    finally:
        if lock is not None:
            lock.release()


def _choose(
    config: RunConfig, recipe: Path, held_by: Callable[[Path], str | None], create: bool
) -> tuple[RunDirectory, FileLock]:
    if config.output.dir:
        path = Path(config.output.dir)
        lock = _lock(path, create)
        if lock is None:
            raise CheckpointError(
                f"{path} is being written by another run; wait for it, or choose another --output.dir"
            )
        if holder := _inspect_locked(lambda path, _: held_by(path), path, config, lock):
            lock.release()
            raise CheckpointError(f"{path} belongs to {holder}; wait for it, cancel it, or choose another --output.dir")
        return _inspect_locked(_inspect, path, config, lock), lock
    for number in count(1):
        path = Path("runs") / (recipe.stem if number == 1 else f"{recipe.stem}-{number}")
        if config.output.resume == "must" and not path.exists():
            raise CheckpointError(
                f"output.resume is must, but no directory up to {path} holds an interrupted run of this recipe; "
                "name the run with --output.dir"
            )
        lock = _lock(path, create)
        if lock is None:
            continue
        taken = _inspect_locked(lambda path, _: held_by(path), path, config, lock)
        found = None if taken else _inspect_locked(_inspect_if_fits, path, config, lock)
        if found is not None:
            return found, lock
        lock.release()
    raise AssertionError("unreachable")


def _lock(path: Path, create: bool) -> FileLock | None:
    if not create and not path.exists():
        return FileLock(path / ".lock")  # never acquired: nobody can hold what does not exist
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise CheckpointError(
            f"run directory {path} cannot be written ({error}); choose another --output.dir"
        ) from None
    return lock


def _inspect_locked(
    inspect: Callable[[Path, RunConfig], _Found], path: Path, config: RunConfig, lock: FileLock
) -> _Found:
    """What ``inspect`` finds; a directory that it refuses is not kept locked."""
    try:
        return inspect(path, config)
    except BaseException:
        lock.release()
        raise


def _inspect_if_fits(path: Path, config: RunConfig) -> RunDirectory | None:
    """The automatic choice: an unused directory, or an unfinished run of the same recipe that may be continued."""
    if latest_checkpoint(path) is None:
        return None if config.output.resume == "must" else RunDirectory(path, None, finished=False)
    if config.output.resume == "never" or differences(path, config):
        return None
    found = _inspect(path, config)
    return None if found.finished else found


def _inspect(path: Path, config: RunConfig) -> RunDirectory:
    checkpoint = latest_checkpoint(path)
    resume = config.output.resume
    if checkpoint is None:
        if resume == "must":
            raise CheckpointError(f"output.resume is must, but {path} holds no checkpoint; expected an interrupted run")
        return RunDirectory(path, None, finished=False)
    if resume == "never":
        raise CheckpointError(
            f"output.resume is never, but {path} holds {checkpoint.name}; choose another --output.dir, or resume: auto"
        )
    if changed := differences(path, config):
        raise CheckpointError(
            "\n".join(
                [
                    f"{path} holds a run of another recipe:",
                    *changed,
                    "Choose another --output.dir, or run its own config.yaml",
                ]
            )
        )
    return RunDirectory(path, checkpoint, read_state(checkpoint).finished)


def differences(path: Path, config: RunConfig) -> list[str]:
    """The recipe keys in which the run in ``path`` differs from ``config``.

    Where output goes, and where hidden states are kept, is left aside: neither changes what is learned.
    """
    try:
        there = build(read_recipe(path / "config.yaml"), f"recipe {path}/config.yaml")
    except ConfigError as error:
        return [f"  - {error}"]
    old, new = _flat(there.model_dump()), _flat(config.model_dump())
    return [
        f"  - {key} was {old[key]!r}, is now {new[key]!r}"
        for key in old
        if old[key] != new[key] and not key.startswith(("output.", "prefix.cache", "prefix.placement"))
    ]


def write_config(path: Path, config: RunConfig) -> None:
    """Save the resolved recipe with the directory it runs in; a valid ``--config`` that continues the run."""
    output = config.output.model_copy(update={"dir": str(path)})
    replace_text(path / "config.yaml", dump(config.model_copy(update={"output": output})))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}
