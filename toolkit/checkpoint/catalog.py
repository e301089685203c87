"""The checkpoints of a run directory: which there are, which one to go on from, and which may go."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from toolkit.checkpoint.evaluation import read_loss
from toolkit.checkpoint.manifest import verify
from toolkit.checkpoint.state import read_state
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.hashed_files import sync_directory
from toolkit.runtime.paths import replace_text

log = logging.getLogger("frostline")

_LATEST, _BEST = "latest", "best"


def checkpoints_of(run: Path) -> list[Path]:
    """Committed checkpoints of a run directory, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that ``latest`` names, or the newest where no such file is; none if there are no checkpoints.

    Raises:
        CheckpointError: ``latest`` names a checkpoint that is not there.
    """
    present = checkpoints_of(run)
    name = _pointed_at(run)
    if name is None:
        return present[-1] if present else None
    found = next((path for path in present if path.name == name), None)
    if found is None:
        raise CheckpointError(
            f"{run / 'checkpoints' / _LATEST} names {name[:100]!r}, which is not there; checkpoints present: "
            f"{', '.join(path.name for path in present) or 'none'}. Write one of those names into the file, or start "
            "a new run with another --output.dir"
        )
    return found


def newest_usable(run: Path, must_be_latest: bool) -> Path | None:
    """The checkpoint to go on from, every byte of it verified; none if there are no checkpoints.

    A damaged or lost one is named in the log and the one before it taken.

    Args:
        run: the run directory.
        must_be_latest: a damaged or lost one is an error.

    Raises:
        CheckpointError: that, or none of the checkpoints is usable.
    """
    faults = []
    try:
        latest = latest_checkpoint(run)
        candidates = [path for path in checkpoints_of(run) if latest and path.name <= latest.name]
    except CheckpointError as error:
        if must_be_latest:
            raise
        faults.append(str(error))
        candidates = [path for path in checkpoints_of(run) if path.name < (_pointed_at(run) or "")]
    for checkpoint in reversed(candidates):
        try:
            verify(checkpoint)
            read_state(checkpoint)
        except CheckpointError as error:
            if must_be_latest:
                raise CheckpointError(
                    f"{error}\noutput.resume is must, so no other is taken; resume: auto goes on from the one before it"
                ) from None
            faults.append(str(error))
            continue
        for fault in faults:
            log.warning("%s", fault)
        if faults:
            log.warning("going on from %s, the newest before it that is whole", checkpoint.name)
        return checkpoint
    if faults:
        raise CheckpointError(
            "\n".join([*faults, f"{run} has no checkpoint that can be used; start anew with another --output.dir"])
        )
    return None


def point_at(run: Path, checkpoint: Path) -> None:
    """Let ``latest`` name ``checkpoint``, also after a power cut.

    Raises:
        OSError: the disk.
    """
    replace_text(run / "checkpoints" / _LATEST, checkpoint.name)
    sync_directory(run / "checkpoints")


def prune(run: Path, current: Path, keep: int) -> None:
    """Keep the newest ``keep`` and the one of the lowest validation loss, and say which that is.

    After a commit, once the validation that was due with it is known.

    Checkpoints of later steps than ``current`` are of a run that was gone on from before them; they go too.
    """
    present = checkpoints_of(run)
    valid = [path for path in present if path.name <= current.name]
    best = best_of(validation_losses(valid))
    try:
        if best is not None:
            replace_text(run / "checkpoints" / _BEST, best.name)
        for path in present:
            if path not in valid[-keep:] and path != best:
                remove(path)
    except OSError as error:  # the commit stands
        log.warning("an old checkpoint could not be removed: %s", error)


def finish_pruning(run: Path, keep: int) -> None:
    """Do what a kill between the last commit and its pruning has left undone; see ``prune``."""
    present = checkpoints_of(run)
    if present and _pointed_at(run) == present[-1].name:
        prune(run, present[-1], keep)
    clear_leftovers(run)


def remove(checkpoint: Path) -> None:
    """Take the name away first, so that no part of it is ever taken for a checkpoint.

    Raises:
        OSError: the disk.
    """
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(run: Path) -> None:
    """Remove what a killed commit has left."""
    for path in (run / "checkpoints").glob(".*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def validation_losses(checkpoints: Iterable[Path]) -> dict[Path, float]:
    """The validation loss of each checkpoint that has one, where it is finite."""
    return {path: loss for path in checkpoints if (loss := read_loss(path)) is not None and math.isfinite(loss)}


def best_of(losses: Mapping[Path, float]) -> Path | None:
    """The checkpoint of the lowest loss, the earliest of several; none of none."""
    return min(losses, key=lambda path: losses[path]) if losses else None


def _pointed_at(run: Path) -> str | None:
    try:
        return (run / "checkpoints" / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
