"""Small file helpers: atomic replacement, and lines that outlast a full disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.runtime.errors import DiskError, UsageError

log = logging.getLogger("frostline")


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old content or the new, never a part.

    Any number of processes may do so at once; the last one stays.
    """
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}.staging")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def sources_hash(root: Path, *parts: str) -> str:
    """SHA-256, to 12 digits, over names and contents of the Python files of ``root``, or of these parts of it alone."""
    sha = hashlib.sha256()
    for part in parts or (".",):
        for path in sorted([root / part] if part.endswith(".py") else (root / part).rglob("*.py")):
            sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def make_parent(output: Path) -> None:
    """Make the directory that ``output`` is to lie in, before work is done for it.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output.parent} cannot be made ({error.strerror}); choose another --output") from None


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Let others read the file that the body writes at ``path`` as far as the umask does; safetensors would not."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn a refused write of the body into one clear error.

    Raises:
        DiskError: the disk is full, over quota or gone; names ``place``.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{error.filename or place} cannot be written ({error.strerror or error}); {_free(place)} free there. "
            "Committed checkpoints are kept: make room, then start the same command again"
        ) from None


class LineFile:
    """Appends lines to a text file; while the disk refuses them they wait in memory and are written later.

    A line is in the file whole or not at all. Nothing here raises for the disk's sake: what is logged is worth less
    than the training it tells of.

    Args:
        path: of the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._warned = False

    def write(self, line: str) -> None:
        """Append a line, after those that wait."""
        self._waiting.append(line)
        self.flush()

    def flush(self) -> bool:
        """Try to write what waits; true if nothing does any more."""
        if not self._waiting:
            return True
        try:
            self._append("".join(f"{line}\n" for line in self._waiting).encode())
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); training goes on, and what is missing is written once "
                            "there is room", self._path, error.strerror)  # fmt: skip
            self._warned = True
            return False
        self._waiting.clear()
        self._warned = False
        return True

    def lines(self) -> list[str]:
        """All lines: those in the file, then those that wait."""
        written = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        return [*written, *self._waiting]

    def close(self) -> None:
        """Try once more, and say what is lost."""
        if not self.flush():
            log.warning("%s lacks its last %d lines: the disk refused them", self._path, len(self._waiting))

    def _append(self, content: bytes) -> None:
        """
        Raises:
            OSError: the disk refuses; the file is as it was before.
        """  # noqa: D205, D212
        with self._path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            left = memoryview(content)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)  # no part of a line stays
                raise


def _free(place: Path) -> str:
    """Free space where ``place`` is, or would be, in words."""
    for folder in (place, *place.parents):
        if folder.exists():
            return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
    return "unknown"


def is_file(path: str | Path) -> bool:
    """Whether ``path`` is a file; false where it cannot even be one (too long, a NUL in it, no permission)."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_directory(path: str | Path) -> bool:
    """Whether ``path`` is a directory; false where it cannot even be one."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False
