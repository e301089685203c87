"""File locks that the kernel releases when their process ends; used for run directories and activation caches."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from typing_extensions import override

from toolkit.runtime import signals
from toolkit.runtime.own_files import open_own
from toolkit.runtime.privacy import share_file

log = logging.getLogger("frostline")

_POLL_SECONDS, _SAY_SECONDS = 0.05, 10.0
LOCK_FILE_NAME = ".lock"
NO_LOCK_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
"""Errors of ``flock`` on a file system without locks."""


class FileLock:
    """An exclusive ``flock``, which the kernel releases when the process ends for any reason.

    Not filelock's: on a file system without locks, that falls back to a lock file which a killed process leaves
    behind, and it cannot test whether a lock is held without acquiring it.

    The file is created if it does not exist, with ``mode`` less the umask, or for the group too in a directory that is
    shared with it: who may open a lock may hold it. ``flags`` are further ones of ``os.open``, such as ``os.O_EXCL``.

    Raises:
        NotOwnError: it is a link, or no regular file.
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, flags: int = 0, mode: int = 0o600) -> None:
        self.path = path
        self.descriptor = open_own(path, os.O_RDWR | os.O_CREAT | flags, mode)
        share_file(self.descriptor, path.parent)

    def acquire(self) -> bool:
        """Acquire the lock; return False if another process holds it.

        Raises:
            OSError: the file system has no locks.
        """
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Acquire the lock; say after 10 s who holds it.

        Raises:
            TimeoutError: it was held for ``seconds``.
            InterruptedError: a signal asked the run to stop meanwhile.
            OSError: the file system has no locks.
        """
        began, has_said = time.monotonic(), False
        while not self.acquire():
            waited = time.monotonic() - began
            if signals.stop_requested():
                raise InterruptedError(errno.EINTR, "the run was asked to stop while it waited", str(self.path))
            if waited > seconds:
                fault = f"{describe_holder(self.path)} has held its lock for {waited:.0f} s"
                raise TimeoutError(errno.ETIMEDOUT, fault, str(self.path))
            if waited > _SAY_SECONDS and not has_said:
                has_said = True
                log.warning("waiting for the lock %s, which %s holds; for %.0f s at most", self.path,
                            describe_holder(self.path), seconds)  # fmt: skip
            time.sleep(_POLL_SECONDS)

    def wait_or_do_without(self, seconds: float) -> bool:
        """Acquire the lock as ``wait`` does; return False where there can be none, so that others may do the same now.

        Raises:
            TimeoutError: it was held for ``seconds``.
            StopRequested: a signal asked the run to stop meanwhile.
        """
        try:
            self.wait(seconds)
        except InterruptedError:
            raise signals.StopRequested from None
        except TimeoutError:
            raise
        except OSError:
            return False
        return True

    def release(self, remove: bool = False) -> None:
        """Release the lock and close the file, which ``remove`` deletes; a second call does nothing."""
        if self.descriptor < 0:
            return
        if remove:
            with suppress(OSError):
                self.path.unlink()
        with suppress(OSError):  # closing alone does not release what a forked process has inherited
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)
        self.descriptor = -1


def describe_holder(path: Path) -> str:
    """Name the process of this machine that holds a lock of a file; "another process" if the kernel does not tell."""
    with suppress(OSError, ValueError, psutil.Error):
        inode = path.stat().st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()  # "1: FLOCK ADVISORY WRITE pid major:minor:inode start end"
            if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                process = psutil.Process(int(fields[4]))
                return f"process {process.pid} ({process.name()}, of {process.username()})"
    return "another process"


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
    """The process that holds the lock of a run directory."""

    host: str
    pid: int
    started: float
    """Start time of the process in seconds since the epoch, because a pid is reused."""
    job: str | None
    """SLURM job id; None outside a job."""

    def __str__(self) -> str:
        job = f" (SLURM job {self.job})" if self.job else ""
        since = datetime.fromtimestamp(self.started).isoformat(" ", "seconds")
        return f"process {self.pid} on {self.host}{job}, which began {since}"

    def may_run(self, this_process: LockHolder) -> bool:
        """Return False if this holder has certainly ended, as far as ``this_process`` can see."""
        if self.host != this_process.host:
            return self.job is None or self.job != this_process.job  # a requeued job has left its former nodes
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.Error:
            return False


class RunLock(FileLock):
    """The lock of a run directory; its file holds a ``LockHolder`` as JSON."""

    @classmethod
    def take(cls, directory: Path) -> RunLock | str:
        """Lock an existing directory until ``release`` or the end of the process.

        On a file system without flock the holder written in the file decides: one that has certainly ended is
        replaced, any other keeps the lock.

        Returns:
            The lock, or a description of its holder if another process has it.

        Raises:
            OSError: the directory cannot be written.
        """
        while True:
            lock = cls(directory / LOCK_FILE_NAME)
            try:
                if (holder := lock._acquire_or_holder()) is None:
                    return lock
            except FileNotFoundError:  # the previous holder removed the file between open and acquire; open it again
                holder = None
            except BaseException:
                os.close(lock.descriptor)
                raise
            os.close(lock.descriptor)
            if holder is not None:
                return holder

    def _acquire_or_holder(self) -> str | None:
        """Acquire the lock and write this process into its file; return None, or a description of the holder.

        Raises:
            FileNotFoundError: the file was removed or replaced since it was opened.
            OSError: the file cannot be written.
        """
        job = os.environ.get("SLURM_JOB_ID") or None
        this_process = LockHolder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), job)
        try:
            acquired: bool | None = self.acquire()
        except OSError as error:
            if error.errno not in NO_LOCK_ERRORS:
                raise
            acquired = None  # unknown: this file system has no locks
        holder = None
        with suppress(ValueError, TypeError):  # empty or malformed
            holder = LockHolder(**json.loads(os.pread(self.descriptor, 4096, 0)))
        if acquired is False:
            return str(holder or "another process")
        if acquired is None and holder is not None and holder.may_run(this_process):
            return f"{holder}; if that has ended, remove {self.path}"
        if not os.path.samestat(os.fstat(self.descriptor), self.path.stat()):
            raise FileNotFoundError(self.path)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(asdict(this_process)).encode(), 0)
        return None

    @override
    def release(self, remove: bool = False) -> None:
        """Release the lock and erase the holder from its file."""
        if self.descriptor >= 0:
            with suppress(OSError):  # a failing disk: the first error is the one to tell
                os.ftruncate(self.descriptor, 0)
        super().release(remove)
