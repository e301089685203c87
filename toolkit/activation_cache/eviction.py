"""Who uses the store, and what goes when it is full: leases, leftovers, least recently used first.

A run holds a lease in its namespace's directory: a file under an exclusive ``flock``. The kernel drops the lock when
the process ends, however it ends, so a dead run needs no time-out to be known as dead. Files of a writer are named
after its lease. Everything here runs under one lock for the whole root.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from toolkit.activation_cache.namespace import NAMESPACE_NAME
from toolkit.activation_cache.shard import SHARD_NAME
from toolkit.activation_cache.statistics import mebibytes

_LEASE_NAME = re.compile(r"\.([0-9a-f]{16})\.lease")
_STAGING_NAME = re.compile(r"\.([0-9a-f]{16})-\d+\.partial")


class Lease:
    """A live run's hold on a namespace; the file's modification time is when the run began."""

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: the namespace's; the caller holds the root's lock, else a sweep could take the lease for a
                dead one's before it is locked.

        Raises:
            OSError: the directory is read-only, or its file system has no locks.
        """  # noqa: D205, D212
        self.identity = secrets.token_hex(8)
        self.path = directory / f".{self.identity}.lease"
        self._count = count()
        self._descriptor: int | None = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now = time.time_ns()
            os.utime(self._descriptor, ns=(now, now))
        except OSError:
            self.release()
            raise

    def staging(self) -> Path:
        """A name for a file that is being written; no other writer has it."""
        return self.path.with_name(f".{self.identity}-{next(self._count)}.partial")

    def release(self) -> None:
        """Give the namespace free; a second call does nothing."""
        if self._descriptor is not None:
            with suppress(OSError):
                self.path.unlink()
            _unlock(self._descriptor)
            self._descriptor = None


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of the whole root; waits for whoever has it.

    Not filelock's: where a system has no locks, that leaves a file which a killed process never removes.

    Raises:
        OSError: read-only, or no locks there.
    """
    descriptor = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _unlock(descriptor)


def sweep(directory: Path) -> int | None:
    """Remove what killed runs left in a namespace: their leases and the files they were writing.

    Returns:
        When the oldest live run began, in nanoseconds; none without a live run.
    """
    starts: dict[str, int] = {}
    for path, match in _matching(directory, _LEASE_NAME):
        with suppress(FileNotFoundError):  # released meanwhile: that takes no lock
            if _is_live(path):
                starts[match[1]] = path.stat().st_mtime_ns
            else:
                path.unlink()
    for path, match in _matching(directory, _STAGING_NAME):
        if match[1] not in starts:
            path.unlink(missing_ok=True)
    return min(starts.values(), default=None)


@dataclass(frozen=True)
class _Candidate:
    """A shard on disk."""

    used: int
    """Nanoseconds: its access time."""
    size: int
    path: Path
    needed: bool
    """A live run has used it since it began."""


@contextmanager
def room(root: Path, incoming: int, limit: int | None, keep: int) -> Iterator[int]:
    """Make room for ``incoming`` bytes, and see that they fit while the block runs.

    Under a limit, least recently used shards of any namespace are evicted until they fit, and the root stays locked,
    so that the limit holds exactly. A shard that was used since the oldest live run of its namespace began stays.
    Where that leaves too little, nothing is evicted.

    Args:
        root: the store's.
        incoming: bytes about to be written.
        limit: bytes that all shards may take; none sets no limit and evicts nothing.
        keep: bytes of the disk that stay free.

    Yields:
        Number of shards evicted.

    Raises:
        OSError: they do not fit, or the root cannot be locked.
    """
    free = shutil.disk_usage(root).free - keep
    if limit is None:
        if incoming > free:
            raise _no_room(root, incoming, free, keep, "no limit")
        yield 0
        return
    with locked(root):
        candidates = list(_candidates(root))
        evictable = sum(candidate.size for candidate in candidates if not candidate.needed)
        excess = max(sum(candidate.size for candidate in candidates) + incoming - limit, incoming - free)
        if excess > evictable:
            raise _no_room(root, incoming, free + evictable, keep, f"a limit of {mebibytes(limit)}")
        yield _evict(candidates, excess)


def trim(root: Path, limit: int) -> int:
    """Evict least recently used shards as far as needed, and as far as live runs let, to keep to the limit.

    Returns:
        Number of shards evicted.

    Raises:
        OSError: the root cannot be locked.
    """
    with locked(root):
        candidates = list(_candidates(root))
        return _evict(candidates, sum(candidate.size for candidate in candidates) - limit)


def available_bytes(root: Path, limit: int | None, keep: int) -> int:
    """The most bytes that ``room`` could make room for; the arguments are its.

    Raises:
        OSError: the root cannot be locked.
    """
    free = shutil.disk_usage(root).free - keep
    if limit is not None:
        with locked(root):
            candidates = list(_candidates(root))
        total = sum(candidate.size for candidate in candidates)
        free = min(limit, total + free) - sum(candidate.size for candidate in candidates if candidate.needed)
    return max(free, 0)


def _evict(candidates: list[_Candidate], excess: int) -> int:
    """Remove shards that no live run needs, the least recently used first, until ``excess`` bytes are gone."""
    evicted = 0
    for candidate in sorted(candidates, key=lambda candidate: candidate.used):
        if excess <= 0:
            break
        if not candidate.needed:
            candidate.path.unlink(missing_ok=True)
            excess -= candidate.size
            evicted += 1
    return evicted


def _no_room(root: Path, incoming: int, free: int, keep: int, limit: str) -> OSError:
    found = f"{mebibytes(incoming)} do not fit under {limit} beside what live runs use"
    disk = f"{mebibytes(max(free, 0))} of disk beside the {mebibytes(keep)} that stay free"
    return OSError(errno.ENOSPC, f"{found}, with {disk}", str(root))


def _candidates(root: Path) -> Iterator[_Candidate]:
    for directory in root.iterdir():
        if not NAMESPACE_NAME.fullmatch(directory.name):
            continue
        oldest = sweep(directory)
        for path, _ in _matching(directory, SHARD_NAME):
            with suppress(FileNotFoundError):
                stat = path.stat()
                needed = oldest is not None and stat.st_atime_ns >= oldest
                yield _Candidate(stat.st_atime_ns, stat.st_size, path, needed)


def _matching(directory: Path, name: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    with os.scandir(directory) as listing:
        return [(Path(entry.path), match) for entry in listing if (match := name.fullmatch(entry.name))]


def _is_live(lease: Path) -> bool:
    """True if a process holds the lease.

    Raises:
        FileNotFoundError: it was released.
    """
    descriptor = os.open(lease, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _unlock(descriptor: int) -> None:
    """Release and close. Closing alone does not release what a forked process has inherited."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
