"""Find the checkpoints of a run directory, choose which one to resume from, and remove those no longer kept."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from toolkit.checkpoint.manifest import NewerVersionError, verify
from toolkit.checkpoint.state import read_state
from toolkit.checkpoint.validation_score import ValidationScore, read_validation_score
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.paths import replace_text

log = logging.getLogger("frostline")

LATEST_FILE, _BEST_FILE = "latest", "best"
"""Files in ``checkpoints`` that hold the name of a checkpoint."""


def checkpoints_of(run: Path) -> list[Path]:
    """Return the committed checkpoints of a run directory, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def latest_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names, or the newest where no such file is; None if there are none.

    Raises:
        CheckpointError: ``latest`` names a checkpoint that is not there.
    """
    present = checkpoints_of(run)
    name = _latest_name(run)
    if name is None:
        return present[-1] if present else None
    for checkpoint in present:
        if checkpoint.name == name:
            return checkpoint
    raise CheckpointError(
        f"{run / 'checkpoints' / LATEST_FILE} names {name[:100]!r}, which is not there; checkpoints present: "
        f"{', '.join(path.name for path in present) or 'none'}. Write one of those names into the file, or start "
        "a new run with another --output.dir"
    )


def newest_usable(run: Path, must_be_latest: bool) -> Path | None:
    """Return the newest checkpoint that passes verification, to resume from; None if there are no checkpoints.

    Damaged or missing checkpoints are skipped with a warning, unless ``must_be_latest``.

    Raises:
        CheckpointError: no checkpoint is usable, or the latest is not and ``must_be_latest``.
        NewerVersionError: the newest undamaged one is of a newer version.
    """
    faults = []
    try:
        latest_checkpoint(run)
    except CheckpointError as error:
        if must_be_latest:
            raise
        faults.append(str(error))
    latest_name = _latest_name(run)
    candidates = [path for path in checkpoints_of(run) if latest_name is None or path.name <= latest_name]
    for checkpoint in reversed(candidates):
        try:
            verify(checkpoint)
            read_state(checkpoint)
        except NewerVersionError:  # whole: going on from an older one would drop its steps, and remove it
            raise
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


def prune(run: Path, current: Path, keep: int) -> None:
    """Remove old checkpoints, and write the name of the best one to the file ``best``.

    Keeps the newest ``keep`` and the one with the best validation score. Called after a commit, and after the
    validation if one was due with it. Checkpoints of later steps than ``current`` date from before the run was
    resumed at an earlier step; they are removed too.
    """
    present = checkpoints_of(run)
    valid = [path for path in present if path.name <= current.name]
    best = best_of(validation_scores(valid))
    try:
        if best is not None:
            replace_text(run / "checkpoints" / _BEST_FILE, best.name)
        for path in present:
            if path not in valid[-keep:] and path != best:
                remove(path)
    except OSError as error:  # the new checkpoint is committed already
        log.warning("an old checkpoint could not be removed: %s", error)


def finish_pruning(run: Path, keep: int) -> None:
    """Prune a finished run, in case it was killed between its last commit and ``prune``."""
    present = checkpoints_of(run)
    if present and _latest_name(run) == present[-1].name:
        prune(run, present[-1], keep)
    clear_leftovers(run)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; rename it first, so that a partly removed one is never taken for a checkpoint.

    Raises:
        OSError: it cannot be renamed or removed.
    """
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(run: Path) -> None:
    """Remove staging and renamed directories that a killed commit or removal has left."""
    for path in (run / "checkpoints").glob(".*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def validation_scores(checkpoints: Iterable[Path]) -> dict[Path, ValidationScore]:
    """Return the validation score of each checkpoint that has a finite one."""
    found = {path: read_validation_score(path) for path in checkpoints}
    return {path: score for path, score in found.items() if score is not None and math.isfinite(score.rank)}


def best_of(scores: Mapping[Path, ValidationScore]) -> Path | None:
    """Return the checkpoint with the best score by the newest one's metric, on a tie the earliest; None for none."""
    if not scores:
        return None
    metric = scores[max(scores)].metric
    return min((path for path in scores if scores[path].metric == metric), key=lambda path: scores[path].rank)


def _latest_name(run: Path) -> str | None:
    """Return the content of the file ``latest``; None if it cannot be read."""
    try:
        return (run / "checkpoints" / LATEST_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
