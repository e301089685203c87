"""File locks that end with their process: of a run directory, of an activation cache, of the cache's live runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from typing_extensions import override

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class FileLock:
    """An exclusive ``flock``: the kernel drops it when the process ends, however that ends.

    Not filelock's: where a file system has no locks, that falls back to a file which a killed process never removes,
    and it cannot ask whether a lock is held without waiting for it or taking it.

    Args:
        path: the file; made if it is not there.
        flags: more of ``os.open``'s, such as ``os.O_EXCL``.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; return False if another process holds it.

        Args:
            wait: until it is free.

        Raises:
            OSError: the file system has no locks.
        """
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def release(self, remove: bool = False) -> None:
        """Release the lock and close the file; a second call does nothing.

        Args:
            remove: the file too.
        """
        if self.descriptor < 0:
            return
        if remove:
            with suppress(OSError):
                self.path.unlink()
        with suppress(OSError):  # closing alone does not release what a forked process has inherited
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)
        self.descriptor = -1


def is_locked(path: Path) -> bool:
    """Return True if a process holds the lock of a file, which need not be writable.

    Raises:
        FileNotFoundError: there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@dataclass(frozen=True)
class LockHolder:
    """The process that writes to a run directory."""

    host: str
    pid: int
    started: float
    """When the process began, in seconds since the epoch: a pid alone may be another process by now."""
    job: str | None
    """SLURM's job number."""

    def __str__(self) -> str:
        job = f" (SLURM job {self.job})" if self.job else ""
        since = datetime.fromtimestamp(self.started).isoformat(" ", "seconds")
        return f"process {self.pid} on {self.host}{job}, which began {since}"

    def may_run(self, own: LockHolder) -> bool:
        """Return False if it has certainly ended."""
        if self.host != own.host:
            return self.job is None or self.job != own.job  # a job that SLURM starts again has left its old nodes
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.Error:
            return False


class RunLock(FileLock):
    """The lock of a run directory, whose file names its holder; see ``take``."""

    @classmethod
    def take(cls, directory: Path) -> RunLock | str:
        """Lock an existing directory until ``release`` or the process's end; return who holds it, if somebody does.

        A file system without flock is served by the file's text alone: a holder that has certainly ended is passed
        over, any other keeps the lock.

        Raises:
            OSError: the directory cannot be written.
        """
        while True:
            lock = cls(directory / NAME)
            try:
                if (holder := lock._claim()) is None:
                    return lock
            except FileNotFoundError:  # its last holder removed the file in this moment
                holder = None
            except BaseException:
                os.close(lock.descriptor)
                raise
            os.close(lock.descriptor)
            if holder is not None:
                return holder

    def _claim(self) -> str | None:
        """Take the lock and write this process into it; or return who holds it.

        Raises:
            FileNotFoundError: the file has been removed or replaced.
            OSError: it cannot be written.
        """
        job = os.environ.get("SLURM_JOB_ID") or None
        own = LockHolder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), job)
        try:
            taken: bool | None = self.acquire()
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            taken = None
        holder = _read(self.descriptor)
        if taken is False:
            return str(holder or "another process")
        if taken is None and holder is not None and holder.may_run(own):
            return f"{holder}; if that has ended, remove {self.path}"
        if not os.path.samestat(os.fstat(self.descriptor), self.path.stat()):
            raise FileNotFoundError(self.path)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(asdict(own)).encode(), 0)
        return None

    @override
    def release(self, remove: bool = False) -> None:
        if self.descriptor >= 0:
            os.ftruncate(self.descriptor, 0)
        super().release(remove)


def _read(descriptor: int) -> LockHolder | None:
    try:
        return LockHolder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None
