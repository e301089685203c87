"""Find the checkpoints of a run directory, choose which one to resume from, and remove those no longer kept."""

from __future__ import annotations

import logging
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from toolkit.checkpoint.manifest import MANIFEST_FILE, NewerVersionError, verify
from toolkit.checkpoint.state import read_state
from toolkit.checkpoint.validation_score import ValidationScore, read_validation_score
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.own_files import (
    NotOwnError,
    is_real_directory,
    is_real_file,
    remove_own_file,
    remove_own_tree,
    require_own_tree,
)
from toolkit.runtime.paths import replace_text

log = logging.getLogger("frostline")

LATEST_FILE, _BEST_FILE = "latest", "best"
"""Files in ``checkpoints`` that hold the name of a checkpoint."""
_NAME = re.compile(r"step-\d{8,}", re.ASCII)
_LEFT_FOLDER = re.compile(r"\.step-\d{8,}\.(staging|replaced|removed)", re.ASCII)
_LEFT_FILE = re.compile(r"\.step-\d{8,}\.evaluation\.json|\.(latest|best)\.[0-9a-f]{32}\.staging", re.ASCII)
_RANK = r"rank-\d{5,}-of-\d{5,}"
_CONTENT = re.compile(
    rf"(MANIFEST|evaluation|state|mask|base|rng-\d{{5,}}-of-\d{{5,}})\.json|optimizer(/{_RANK}\.(safetensors|json))?",
    re.ASCII,
)
"""All that is ever written into a checkpoint. Nothing else is deleted, nor a directory that holds it."""


def checkpoints_of(run: Path) -> list[Path]:
    """Return the committed checkpoints of a run directory, oldest first."""
    return [path for path in step_directories(run) if _holds_content(path)]


def step_directories(run: Path) -> list[Path]:
    """Return the directories that have a checkpoint's name, oldest first, whatever they hold."""
    try:
        present = sorted((run / "checkpoints").iterdir())
    except OSError:
        return []
    return [path for path in present if _NAME.fullmatch(path.name) and path.is_dir()]


def _holds_content(path: Path) -> bool:
    """Return whether a directory holds any file that a run writes into a checkpoint, which may be damaged."""
    try:
        return any(is_content(entry.name) for entry in path.iterdir())
    except OSError as error:
        return not isinstance(error, FileNotFoundError)  # unreadable, which is said when it is read


def has_own_checkpoint(run: Path) -> bool:
    """Return whether a directory holds a checkpoint that a run has published there, whole or damaged."""
    return any(is_real_directory(path) and is_real_file(path / MANIFEST_FILE) for path in checkpoints_of(run))


def is_pointer(text: str) -> bool:
    """Return whether a text is what ``latest`` and ``best`` hold: the name of a checkpoint."""
    return _NAME.fullmatch(text.strip()) is not None


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
    resumed at an earlier step; they are removed too. One that is a link, or holds a file of the user's, stays.
    """
    present = checkpoints_of(run)
    valid = [path for path in present if path.name <= current.name]
    best = best_of(validation_scores(valid))
    try:
        if best is not None:
            replace_text(run / "checkpoints" / _BEST_FILE, best.name)
        for path in present:
            if path not in valid[-keep:] and path != best:
                _remove_if_own(path)
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
        NotOwnError: it is a link, or holds what no run writes; it stays.
        OSError: it cannot be renamed or removed.
    """
    require_own_tree(checkpoint, is_content)
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    with suppress(OSError):
        remove_own_tree(aside, is_content)
    checkpoint.rename(aside)
    remove_own_tree(aside, is_content)


def _remove_if_own(checkpoint: Path) -> None:
    """Remove a checkpoint; say why one stays that is a link or holds a file of the user's."""
    try:
        remove(checkpoint)
    except NotOwnError as error:
        log.info("%s is kept: %s", checkpoint, error.strerror)


def make_way(final: Path) -> None:
    """Move what is in the place of a checkpoint that is to be published; what is not ours stays under another name.

    Raises:
        OSError: it cannot be renamed.
    """
    if not os.path.lexists(final):
        return
    try:
        require_own_tree(final, is_content)
        aside = final.with_name(f".{final.name}.replaced")  # written before the run resumed from an earlier step
    except NotOwnError as error:
        aside = final.with_name(f"{final.name}-moved-{uuid.uuid4().hex[:8]}")
        log.warning("%s is in the way of a checkpoint: %s; it is now %s", final, error.strerror, aside.name)
    final.rename(aside)


def is_content(relative: str) -> bool:
    """Return whether a path below a checkpoint is one that a run writes there."""
    return _CONTENT.fullmatch(relative) is not None


def clear_leftovers(run: Path) -> None:
    """Remove staging and renamed directories that a killed commit or removal has left; everything else stays."""
    folder = run / "checkpoints"
    with suppress(OSError):  # the next time, or a user, clears the rest
        for path in list(folder.iterdir()):
            with suppress(OSError):
                if _LEFT_FOLDER.fullmatch(path.name):
                    remove_own_tree(path, is_content)
                elif _LEFT_FILE.fullmatch(path.name):
                    remove_own_file(path)


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
