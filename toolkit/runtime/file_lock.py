"""The lock of a run directory: one writer, who is named to everyone that comes after."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who writes to a directory."""

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

    def may_run(self, own: Holder) -> bool:
        """False if it has certainly ended."""
        if self.host != own.host:
            return self.job is None or self.job != own.job  # a job that SLURM starts again has left its old nodes
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.Error:
            return False


class Lock:
    """A lock on a directory, held by this process until ``release`` or its end.

    The file is locked with flock, which ends with the process however that ends. A file system without flock is
    served by the file's text alone: a holder that has certainly ended is passed over, any other keeps the lock.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path

    @classmethod
    def take(cls, directory: Path) -> Lock | str:
        """The lock of an existing directory, or who holds it, in words.

        Raises:
            OSError: the directory cannot be written.
        """
        path = directory / NAME
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                taken = cls._take(descriptor, path)
            except BaseException:
                os.close(descriptor)
                raise
            if taken is not None:
                if isinstance(taken, str):
                    os.close(descriptor)
                return taken
            os.close(descriptor)  # its last holder removed the file in this moment

    @classmethod
    def _take(cls, descriptor: int, path: Path) -> Lock | str | None:
        own = _own()
        held = False
        supported = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            supported = False
        holder = _read(descriptor)
        if held or (not supported and holder is not None and holder.may_run(own)):
            remedy = "" if held else f"; if that has ended, remove {path}"
            return f"{holder or 'another process'}{remedy}"
        try:
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                return None
        except FileNotFoundError:
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(own)).encode(), 0)
        return cls(descriptor, path)

    def release(self, forget: bool = False) -> None:
        """Let go of the directory; twice does no harm.

        Args:
            forget: also remove the file, so that nothing of the lock is left.
        """
        if self._descriptor < 0:
            return
        if forget:
            self._path.unlink(missing_ok=True)
        else:
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = -1


def _own() -> Holder:
    job = os.environ.get("SLURM_JOB_ID") or None
    return Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), job)


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None
