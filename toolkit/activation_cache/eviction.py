"""Track the runs that use an activation cache, and evict the least recently used shards when it is full.

A run holds a lease in its namespace's directory: a locked file, one a node, so that a dead run is known without a
time-out. The staging files of its processes are named after it. Eviction runs under one lock for the whole root.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from toolkit.activation_cache.namespace import NAMESPACE_NAME
from toolkit.activation_cache.shard import SHARD_NAME
from toolkit.activation_cache.statistics import mebibytes
from toolkit.runtime.distributed import World
from toolkit.runtime.file_lock import FileLock, is_locked

_LEASE_NAME = re.compile(r"\.([0-9a-f]{16})\.lease")
_STAGING_NAME = re.compile(r"\.([0-9a-f]{16})-\d+\.partial")


@dataclass(frozen=True)
class CacheWriter:
    """A process that writes to a cache; by default the only one of its run."""

    lease: str = field(default_factory=lambda: secrets.token_hex(8))
    """Names the lease of its node: 16 hexadecimal digits."""
    local_rank: int = 0
    """Tells the processes of a lease apart."""
    holds_lease: bool = True
    """It locks the lease, for all of its node."""


def cache_writer(world: World) -> CacheWriter:
    """Return this rank's writer: the first of each node holds the lease for all. Every rank calls it.

    A lease for each rank would have every rank try the lock of every other: 131,000 of them at 512 ranks.
    """
    host, own = socket.gethostname(), secrets.token_hex(8)
    before = world.all_gather_object((host, world.local_rank, own))[: world.rank + 1]
    firsts = [lease for place, local_rank, lease in before if place == host and local_rank == 0]
    lease = firsts[-1] if firsts else own
    return CacheWriter(lease, world.local_rank, lease == own)


class Lease:
    """Marks a namespace as used by a live run; the file's modification time is when the run began.

    Args:
        directory: the namespace's.
        writer: this process. The one that holds the lease also removes what dead runs left there.

    Raises:
        OSError: the directory is read-only, or its file system has no locks.
    """

    def __init__(self, directory: Path, writer: CacheWriter) -> None:
        self._directory, self._writer, self._count = directory, writer, count(10**9 * writer.local_rank)
        self._lock: FileLock | None = None
        if not writer.holds_lease:
            return
        with locked(directory.parent):  # else another's sweep could take the lease for a dead run's before it is locked
            sweep(directory)
            self._lock = FileLock(directory / f".{writer.lease}.lease", os.O_EXCL)
            try:
                self._lock.acquire()
                now = time.time_ns()
                os.utime(self._lock.descriptor, ns=(now, now))
            except OSError:
                self.release()
                raise

    def staging(self) -> Path:
        """Return a name for a file that is being written; no other writer has it."""
        return self._directory / f".{self._writer.lease}-{next(self._count)}.partial"

    def release(self) -> None:
        """End the lease; a second call does nothing."""
        if self._lock is not None:
            self._lock.release(remove=True)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of the whole root; waits for whoever has it.

    Raises:
        OSError: read-only, or no locks there.
    """
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(wait=True)
        yield
    finally:
        lock.release()


def sweep(directory: Path) -> int | None:
    """Remove what killed runs left in a namespace: their leases and the files they were writing.

    Returns:
        When the oldest live run began, in nanoseconds; None without a live run.
    """
    starts: dict[str, int] = {}
    for path, match in _matching(directory, _LEASE_NAME):
        with suppress(FileNotFoundError):  # released meanwhile: that takes no lock
            if is_locked(path):
                starts[match[1]] = path.stat().st_mtime_ns
            else:
                path.unlink()
    for path, match in _matching(directory, _STAGING_NAME):
        if match[1] not in starts:
            path.unlink(missing_ok=True)
    return min(starts.values(), default=None)


class CacheQuota:
    """Keeps the shards of all namespaces of a root within a limit of bytes.

    Shards are evicted by time of last use, whatever their namespace; one that was used since the oldest live run of its
    namespace began stays. Each process asks the file system about a shard once, and again before evicting it, so that
    filling a cache of n shards takes O(n) calls of ``stat``.

    Args:
        root: the directory of all namespaces.
        limit: bytes that all shards may take; None sets no limit and evicts nothing.
        keep_free: bytes of the disk that stay free.
    """

    def __init__(self, root: Path, limit: int | None, keep_free: int) -> None:
        self._root, self._limit, self._keep_free = root, limit, keep_free
        self._shards: dict[Path, os.stat_result] = {}

    @contextmanager
    def room(self, incoming: int) -> Iterator[int]:
        """Make room for ``incoming`` bytes, and see that they fit while the block runs.

        Under a limit the root stays locked, so that the limit holds exactly. Where evicting all that no live run needs
        leaves too little, nothing is evicted.

        Yields:
            Number of shards evicted.

        Raises:
            OSError: they do not fit, or the root cannot be locked.
        """
        free = self._free()
        if self._limit is None:
            if incoming > free:
                raise self._no_room(incoming, free, "no limit")
            yield 0
            return
        with locked(self._root):
            chosen, lacking = self._choose(max(self._update() + incoming - self._limit, incoming - free))
            if lacking > 0:
                raise self._no_room(incoming, free, f"a limit of {mebibytes(self._limit)}")
            yield self._evict(chosen)

    def trim(self) -> int:
        """Evict as far as needed, and as far as live runs let, to keep to the limit; return the number of shards.

        Raises:
            OSError: the root cannot be locked.
        """
        if self._limit is None:
            return 0
        with locked(self._root):
            chosen, _ = self._choose(self._update() - self._limit)
            return self._evict(chosen)

    def available_bytes(self) -> int:
        """Return the most bytes that ``room`` could make room for.

        Raises:
            OSError: the root cannot be locked.
        """
        free = self._free()
        if self._limit is not None:
            with locked(self._root):
                total = self._update()
                _, needed = self._choose(total)
            free = min(self._limit, total + free) - needed
        return max(free, 0)

    def _free(self) -> int:
        return shutil.disk_usage(self._root).free - self._keep_free

    def _update(self) -> int:
        """Look at the shards that are new, forget those that are gone, and return the bytes of all."""
        known, self._shards = self._shards, {}
        for directory in _namespaces(self._root):
            for path, _ in _matching(directory, SHARD_NAME):
                with suppress(FileNotFoundError):
                    self._shards[path] = known.get(path) or path.stat()
        return sum(stat.st_size for stat in self._shards.values())

    def _choose(self, excess: int) -> tuple[list[Path], int]:
        """Return the least recently used shards of ``excess`` bytes that no live run needs, and the bytes they lack."""
        chosen: list[Path] = []
        if excess <= 0:
            return chosen, excess
        starts = {directory: sweep(directory) for directory in _namespaces(self._root)}
        queue = [(stat.st_atime_ns, path) for path, stat in self._shards.items()]
        heapq.heapify(queue)
        while excess > 0 and queue:
            used, path = heapq.heappop(queue)
            start = starts.get(path.parent)
            if start is not None and used >= start:
                continue
            with suppress(FileNotFoundError):
                stat = self._shards[path] = path.stat()
                if stat.st_atime_ns != used:  # used since it was last looked at
                    heapq.heappush(queue, (stat.st_atime_ns, path))
                    continue
                chosen.append(path)
                excess -= stat.st_size
        return chosen, excess

    def _evict(self, chosen: list[Path]) -> int:
        for path in chosen:
            path.unlink(missing_ok=True)
        return len(chosen)

    def _no_room(self, incoming: int, free: int, limit: str) -> OSError:
        found = f"{mebibytes(incoming)} do not fit under {limit} beside what live runs use"
        disk = f"{mebibytes(max(free, 0))} of disk beside the {mebibytes(self._keep_free)} that stay free"
        return OSError(errno.ENOSPC, f"{found}, with {disk}", str(self._root))


def _namespaces(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if NAMESPACE_NAME.fullmatch(path.name)]


def _matching(directory: Path, name: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    with os.scandir(directory) as listing:
        return [(Path(entry.path), match) for entry in listing if (match := name.fullmatch(entry.name))]
