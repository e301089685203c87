"""Tell a run directory from a folder that is used for something else, in which nothing may be overwritten."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from toolkit.checkpoint.catalog import LATEST_FILE, checkpoints_of, has_own_checkpoint, is_pointer, step_directories
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.file_lock import LOCK_FILE_NAME
from toolkit.runtime.own_files import is_real_directory, is_real_file, is_same_directory
from toolkit.runtime.paths import explain_refused_write, replace_bytes

_EARLY = re.compile(
    r"rendering\.json|gradients\.json|trackers\.json|wandb|mlflow.*|\..+\.[0-9a-f]{32}\.staging|"
    r"\.gitkeep|\.gitignore|\.DS_Store|\.nfs.*|lost\+found|.+\.(log|out|err)"
)
"""What a run writes before its config.yaml, and what is no use of a folder: marks of systems, and the output of the
command itself, as ``> runs/x/train.log`` makes."""
_OWNER_FILE = ".frostline-run"
"""In the directory that a link ``checkpoints`` leads to: the run whose checkpoints it holds."""
_MOST_BYTES = 2**18
"""Largest config.yaml; those of runs have some 5 KiB."""


def require_run_or_unused(path: Path) -> None:
    """Check that a directory is a run's, or not used yet; a missing one is not.

    Raises:
        CheckpointError: it holds something else, ``checkpoints`` is none, or holds another's files of our names, or is
            a link to the checkpoints of another run.
    """
    if not path.is_dir():
        return
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"run directory {path} cannot be read ({error.strerror}); choose another --output.dir"
        ) from None
    if not holds_run(path):
        others = [name for name in names if not (_EARLY.fullmatch(name) or _is_unused(path / name))]
        if others:
            own = " (a config.yaml is there, but not as a run writes it)" if "config.yaml" in others else ""
            raise CheckpointError(
                f"{path} is no run directory and holds {', '.join(others[:4])}{' …' if others[4:] else ''}{own}; "
                "expected one that is empty, does not exist, or holds a run. Choose another --output.dir"
            )
    _require_own_checkpoints(path)
    claim_linked_checkpoints(path, mark=False)


def holds_run(path: Path) -> bool:
    """Return whether a run has written into a directory: a checkpoint, or its config.yaml."""
    return has_own_checkpoint(path) or is_written_config(path / "config.yaml")


def claim_linked_checkpoints(path: Path, mark: bool) -> None:
    """Refuse a run whose link ``checkpoints`` leads to those of another run, which both would prune.

    ``mark`` writes there which run they belong to, if they are a link's. A run that was moved, or whose link leads
    elsewhere now, has given them up.

    Raises:
        CheckpointError: they belong to another run.
        DiskError: the mark cannot be read or written.
    """
    folder = path / "checkpoints"
    if not folder.is_symlink():
        return
    owner_file, own = folder / _OWNER_FILE, os.fsencode(path.resolve())
    with explain_refused_write(folder):
        owner = owner_file.read_bytes()[:_MOST_BYTES] if is_real_file(owner_file) else b""
        if owner != own and is_same_directory(Path(os.fsdecode(owner)) / "checkpoints", folder):
            raise CheckpointError(
                f"{folder} leads to {folder.resolve()}, which holds the checkpoints of {os.fsdecode(owner)}; each run "
                "would remove the other's. Let the link lead to a directory of its own"
            )
        if mark and owner != own:
            replace_bytes(owner_file, own)


def is_written_config(path: Path) -> bool:
    """Return whether a file is a config.yaml as runs of any version write it, with ``output.dir`` set.

    A recipe that people wrote has comments, other blanks, or not every section.
    """
    try:
        if not is_real_file(path) or path.stat().st_size > _MOST_BYTES:
            return False
        text = path.read_text(encoding="utf-8")
        if not text.startswith("model:\n"):
            return False  # before YAML, which takes long to find out what is none
        values = yaml.safe_load(text)
        is_recipe = isinstance(values, dict) and all(
            isinstance(values.get(section), dict) for section in ("model", "data", "mask", "train", "output")
        )
        if not is_recipe or not isinstance(values["output"].get("dir"), str):
            return False
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True) == text
    except (OSError, ValueError, yaml.YAMLError, RecursionError, TypeError):
        return False


def _is_unused(path: Path) -> bool:
    """Return whether a path is the lock of a run directory, or a place that a user has made for its checkpoints."""
    try:
        if path.name == "checkpoints":
            return path.is_dir() and (path.is_symlink() or not any(path.iterdir()))
        if path.name != LOCK_FILE_NAME or not is_real_file(path):
            return False
        return path.stat().st_size == 0 or path.read_bytes()[:9] == b'{"host": '
    except OSError:
        return False


def _require_own_checkpoints(path: Path) -> None:
    """Raise CheckpointError where ``checkpoints`` is no directory, or its ``latest`` or ``best`` is not a run's.

    It may be a link that the user made, to a directory on another disk.
    """
    folder = path / "checkpoints"
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        what = f"leads to {folder.readlink()}, which is no directory" if folder.is_symlink() else "is no directory"
        raise CheckpointError(f"{folder} {what}; make that directory, or remove {folder.name}")
    if others := sorted(set(step_directories(path)) - set(checkpoints_of(path))):
        raise CheckpointError(
            f"{others[0]} has the name of a checkpoint and holds none; move it, or choose another directory for "
            "checkpoints"
        )
    for pointer in (folder / LATEST_FILE, folder / "best"):
        if not os.path.lexists(pointer) or has_own_checkpoint(path):
            continue
        if is_real_directory(pointer) or not _holds_pointer(pointer):
            raise CheckpointError(
                f"{pointer} is not a run's, and would be overwritten; move it, or choose another directory for "
                "checkpoints"
            )


def _holds_pointer(path: Path) -> bool:
    try:
        return is_real_file(path) and path.stat().st_size < 100 and is_pointer(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
