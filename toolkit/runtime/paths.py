"""File helpers: atomic replacement, line files that survive a full disk, and path checks that never raise."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from toolkit.runtime.errors import DiskError, InTheWayError, UsageError
from toolkit.runtime.own_files import NotOwnError, is_real_file, open_own
from toolkit.runtime.privacy import share_file

log = logging.getLogger("frostline")

is_file, is_directory = os.path.isfile, os.path.isdir
"""False also for an invalid or unreadable path (too long, a NUL in it), where those of pathlib raise."""


def read_regular(path: Path, most: int) -> str:
    """Read a text file in UTF-8 of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, such as a FIFO, which could wait for ever; it is longer, or not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes; raises as ``require_regular``, and OSError if it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(status: os.stat_result, path: Path) -> None:
    """Raise ValueError for the status of what is no regular file; a directory is an OSError."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "no file")
        raise ValueError(f"{path.name} is {kind}; expected a regular file")


def replace_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write ``text`` to ``path`` atomically, see ``publish``; of several processes at once the last one wins."""
    replace_bytes(path, text.encode(), mode)


def replace_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write ``content`` to ``path`` as ``replace_text`` does a text."""
    publish(content, path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.staging"), mode)


def publish(content: bytes, final: Path, staging: Path, mode: int = 0o666) -> None:
    """Write a file atomically and durably: a reader sees the old content or the new, also after a power cut.

    It is written at ``staging``, an unused path on the same file system, and then renamed to ``final``. Its mode is
    ``mode`` less the umask, and open to the group in a directory that is shared with it.

    Raises:
        OSError: the file cannot be written, as on a full or read-only disk.
    """
    descriptor = os.open(staging, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        try:
            share_file(descriptor, final.parent)
            unwritten = memoryview(content)
            while unwritten:
                unwritten = unwritten[os.write(descriptor, unwritten) :]
            now = time.time_ns()  # the kernel's own timestamps are too coarse to order files written quickly
            os.utime(descriptor, ns=(now, now))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(staging, final)  # noqa: PTH105 - a test counts the calls of os
    except BaseException:
        with suppress(OSError):  # of a failing disk the first error is told
            staging.unlink()
        raise
    sync_directory(final.parent)


def sync_file(path: Path) -> None:
    """Fsync a file that another library has written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Fsync a directory, so that renamed and new files in it survive a power cut."""
    sync_file(directory)


def sources_hash(root: Path, *parts: str) -> str:
    """Return 12 hex digits of the SHA-256 over names and contents of Python files.

    ``parts`` are files or directories below ``root``; without any, all of ``root`` is hashed.
    """
    sha = hashlib.sha256()
    for part in parts or (".",):
        for path in sorted([root / part] if part.endswith(".py") else (root / part).rglob("*.py")):
            sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def make_parent(output: Path) -> None:
    """Create the parent directory of an output path, before any work is done for it.

    Raises:
        UsageError: the directory cannot be created.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output.parent} cannot be made ({error.strerror}); choose another --output") from None


def output_file(path: Path, overwrite: bool, option: str = "--output", reads: Iterable[str | Path | None] = ()) -> Path:
    """Make the parent of a file that an option names, before any work is done for it; return what a link leads to.

    Args:
        path: the file.
        overwrite: whether one that is there may be replaced.
        option: the option.
        reads: files that the command reads, which are never replaced.

    Raises:
        UsageError: a file is there and may not be replaced, it is no regular file, or its parent cannot be made.
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path):
        if not is_real_file(path):  # as /dev/null, which a rename would replace
            raise UsageError(f"{option} {path} is no regular file; name one, or leave {option} out")
        if any(is_file(file) and path.samefile(file) for file in reads if file is not None):
            raise UsageError(f"{option} {path} is a file that is read; choose another")
        if not overwrite:
            raise UsageError(f"{option} {path} exists; --overwrite replaces it, another {option} leaves it")
    make_parent(path)
    return path


def require_unused_folder(folder: Path, overwrite: bool, option: str = "--output") -> None:
    """Check that a folder that an option names is not there, or empty; or that files in it may be replaced.

    Raises:
        UsageError: it holds something and ``overwrite`` is not set, or it cannot be read.
    """
    try:
        found = sorted(entry.name for entry in folder.iterdir()) if folder.exists() and not overwrite else []
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be read ({error.strerror}); choose another") from None
    if found:
        raise UsageError(
            f"{option} {folder} holds {', '.join(found[:3])}{' …' if found[3:] else ''}; --overwrite replaces files "
            f"of the names that are written, another {option} leaves them"
        )


@contextmanager
def explain_refused_write(place: Path) -> Iterator[None]:
    """Turn an OSError of the body into a DiskError with its path, else ``place``, and the free space at ``place``.

    An InTheWayError is what is not ours and would have to be written, a directory where a file goes, and the reverse.
    """
    try:
        yield
    except NotOwnError as error:
        raise InTheWayError(f"{error.filename} is not written: {error.strerror}. Move or remove it") from None
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        path = error.filename2 or error.filename or place
        found, goes = ("a directory", "a file") if isinstance(error, IsADirectoryError) else ("a file", "a directory")
        raise InTheWayError(f"{path} cannot be written: {found} is where {goes} goes. Move or rename it") from None
    except OSError as error:
        free = ""
        with suppress(OSError):  # a disk that fails may not tell
            folder = next(folder for folder in (place, *place.parents) if folder.exists())  # at the last / or .
            free = f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB free there"
        path = error.filename2 or error.filename or place
        raise DiskError(
            f"{path} cannot be written ({error.strerror or error}){free}. Committed checkpoints are kept: make room, "
            "then start the same command again"
        ) from None


class LineFile:
    """A text file that lines are appended to; lines that cannot be written are kept in memory and retried.

    A line is in the file whole or not at all. A full disk raises nothing here: logs must not end the training.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: list[str] = []
        """Lines that could not be written yet."""
        self._warned = False

    def write(self, line: str) -> None:
        """Append a line, after the pending ones."""
        self.pending.append(line)
        self.flush()

    def flush(self) -> None:
        """Try to write the pending lines."""
        if not self.pending:
            return
        try:
            self._append("".join(f"{line}\n" for line in self.pending).encode())
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); training goes on, and what is missing is written once "
                            "there is room", self.path, error.strerror)  # fmt: skip
            self._warned = True
        else:
            self.pending.clear()
            self._warned = False

    def sync(self) -> None:
        """Let the lines that are written survive a power cut, as far as the disk can; a file of no lines stays away."""
        self.flush()
        with suppress(OSError):  # a log must not end the training
            descriptor = open_own(self.path, os.O_WRONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_directory(self.path.parent)

    def close(self) -> None:
        """Try to write the pending lines a last time, and warn if they are lost."""
        self.flush()
        if self.pending:
            log.warning("%s lacks its last %d lines: the disk refused them", self.path, len(self.pending))

    def _append(self, content: bytes) -> None:
        """Append bytes to the file, all or (OSError) none."""
        descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(descriptor, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            unwritten = memoryview(content)
            try:
                while unwritten:
                    unwritten = unwritten[file.write(unwritten) :]
            except OSError:
                with suppress(OSError):  # the first error is the one to tell
                    file.truncate(size)  # drop a part of a line
                raise
