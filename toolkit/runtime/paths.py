"""Small file helpers: atomic replacement, and lines that outlast a full disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.runtime.errors import DiskError, UsageError

log = logging.getLogger("frostline")


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as ``publish`` does. Any number of processes may do so at once; the last one stays."""
    publish(text.encode(), path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.staging"))


def publish(content: bytes, final: Path, staging: Path) -> None:
    """Write a file so that a reader, also after a power cut, sees the old content or the new, never a part.

    Args:
        content: the whole file.
        final: replaced if it is there.
        staging: a name on the same file system that nobody else uses; gone afterwards unless the process was killed.

    Raises:
        OSError: full, read-only, a quota …
    """
    descriptor = os.open(staging, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]
            now = time.time_ns()  # the file system's own clock ticks too slowly to order what follows closely
            os.utime(descriptor, ns=(now, now))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(staging, final)  # noqa: PTH105 - a test counts the calls of os
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync_directory(final.parent)


def sync_directory(directory: Path) -> None:
    """Force the names in ``directory`` to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sources_hash(root: Path, *parts: str) -> str:
    """Return the SHA-256, to 12 digits, of Python files, names included: all of ``root``, or these parts of it."""
    sha = hashlib.sha256()
    for part in parts or (".",):
        for path in sorted([root / part] if part.endswith(".py") else (root / part).rglob("*.py")):
            sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def make_parent(output: Path) -> None:
    """Make the directory of ``output`` before any work is done for it.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output.parent} cannot be made ({error.strerror}); choose another --output") from None


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Let others read the file that the body writes at ``path``, as far as the umask does."""
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
        """Try to write what waits; return True if nothing does any more."""
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
        """Return all lines: those in the file, then those that wait."""
        written = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        return [*written, *self._waiting]

    def close(self) -> None:
        """Try once more, and say what is lost."""
        if not self.flush():
            log.warning("%s lacks its last %d lines: the disk refused them", self._path, len(self._waiting))

    def _append(self, content: bytes) -> None:
        """Append bytes to the file, or leave it as it was.

        Raises:
            OSError: the disk refuses.
        """
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
    """Return True if ``path`` is a file; False where it cannot even be one (too long, a NUL in it, no permission)."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_directory(path: str | Path) -> bool:
    """Return True if ``path`` is a directory; False where it cannot even be one."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False
