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

from toolkit.activation_cache.namespace import SHA256
from toolkit.activation_cache.shard import SHARD_NAME
from toolkit.runtime.distributed import World
from toolkit.runtime.file_lock import FileLock, is_locked

_MOST_SECONDS = 60.0
"""Longest wait for the lock of a root, which is held while files are listed and one shard is written."""
_LEASE_NAME = re.compile(r"\.([0-9a-f]{16})\.lease")
_STAGING_NAME = re.compile(r"\.([0-9a-f]{16})-\d+\.partial")


@dataclass(frozen=True)
class CacheWriter:
    """A process that writes to a cache; by default the only one of its run."""

    lease: str = field(default_factory=lambda: secrets.token_hex(8))
    """Name of its node's lease: 16 hexadecimal digits."""
    local_rank: int = 0
    holds_lease: bool = True
    """True if this process locks the lease, for all processes of its node."""


def cache_writer(world: World) -> CacheWriter:
    """Return this rank's writer: the first of each node holds the lease for all. Every rank calls it.

    A lease for each rank would have every rank try the lock of every other: 131,000 of them at 512 ranks.
    """
    host, own_lease = socket.gethostname(), secrets.token_hex(8)
    up_to_this_rank = world.all_gather_object((host, world.local_rank, own_lease))[: world.rank + 1]
    node_leases = [lease for node, local_rank, lease in up_to_this_rank if node == host and local_rank == 0]
    lease = node_leases[-1] if node_leases else own_lease
    return CacheWriter(lease, world.local_rank, lease == own_lease)


class Lease:
    """Marks a namespace's directory as used by a live run; the file's modification time is when the run began.

    A writer that holds the lease also removes the files that dead runs left.

    Raises:
        OSError: the directory is read-only, or its file system has no locks.
    """

    def __init__(self, directory: Path, writer: CacheWriter) -> None:
        self._directory, self._writer, self._count = directory, writer, count(10**9 * writer.local_rank)
        self._lock: FileLock | None = None
        if not writer.holds_lease:
            return
        with locked(directory.parent):  # else another process could sweep the new lease away before it is locked
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
        """Return a path to write a file at, which no other writer uses."""
        return self._directory / f".{self._writer.lease}-{next(self._count)}.partial"

    def release(self) -> None:
        """End the lease; a second call does nothing."""
        if self._lock is not None:
            self._lock.release(remove=True)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of the cache's root directory.

    Raises:
        TimeoutError: another process has held it for a minute.
        OSError: the directory is read-only, its file system has no locks, or the run was asked to stop meanwhile.
    """
    lock = FileLock(root / ".lock", mode=0o660 & root.stat().st_mode)
    try:
        lock.wait(_MOST_SECONDS)
        yield
    finally:
        lock.release()


def sweep(directory: Path) -> int | None:
    """Remove the leases and staging files that killed runs left in a namespace.

    Returns the start of the oldest live run, in nanoseconds since the epoch; None if no run is alive.
    """
    starts: dict[str, int] = {}
    for path, match in _files_matching(directory, _LEASE_NAME):
        with suppress(FileNotFoundError):  # a lease can be released meanwhile, which takes no lock
            if is_locked(path):
                starts[match[1]] = path.stat().st_mtime_ns
            else:
                path.unlink()
    for path, match in _files_matching(directory, _STAGING_NAME):
        if match[1] not in starts:
            path.unlink(missing_ok=True)
    return min(starts.values(), default=None)


class CacheQuota:
    """Keeps the shards of all namespaces of a root within a limit of bytes.

    Shards are evicted by time of last use, whatever their namespace; one that was used since the oldest live run of its
    namespace began stays. Each process asks the file system about a shard once, and again before evicting it, so that
    filling a cache of n shards takes O(n) calls of ``stat``.

    ``limit_bytes`` None sets no limit and evicts nothing; ``reserved_bytes`` of the disk stay free.
    """

    def __init__(self, root: Path, limit_bytes: int | None, reserved_bytes: int) -> None:
        self._root, self._limit_bytes, self._reserved_bytes = root, limit_bytes, reserved_bytes
        self._shards: dict[Path, os.stat_result] = {}

    @contextmanager
    def room(self, incoming: int) -> Iterator[int]:
        """Evict shards so that ``incoming`` bytes fit, and yield their number; the caller writes within the block.

        Under a limit the root stays locked meanwhile, so that the limit holds exactly. If evicting every shard that no
        live run needs would not suffice, nothing is evicted.

        Raises:
            OSError: they do not fit, or the root cannot be locked.
        """
        free = self._free_bytes()
        if self._limit_bytes is None:
            if incoming > free:
                raise self._no_space_error(incoming, free, "no limit")
            yield 0
            return
        with locked(self._root):
            excess = max(self._list_shards() + incoming - self._limit_bytes, incoming - free)
            victims, lacking = self._choose_victims(excess)
            if lacking > 0:
                raise self._no_space_error(incoming, free, f"a limit of {mebibytes(self._limit_bytes)}")
            yield _delete(victims)

    def trim(self) -> int:
        """Evict shards until the limit holds or live runs need all that are left; return the number evicted.

        Raises:
            OSError: the root cannot be locked.
        """
        if self._limit_bytes is None:
            return 0
        with locked(self._root):
            excess = self._list_shards() - self._limit_bytes
            victims, _ = self._choose_victims(excess)
            return _delete(victims)

    def available_bytes(self) -> int:
        """Return the most bytes that ``room`` could make room for.

        Raises:
            OSError: the root cannot be locked.
        """
        free = self._free_bytes()
        if self._limit_bytes is not None:
            with locked(self._root):
                total = self._list_shards()
                _, needed_by_runs = self._choose_victims(total)
            free = min(self._limit_bytes, total + free) - needed_by_runs
        return max(free, 0)

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free - self._reserved_bytes

    def _list_shards(self) -> int:
        """List the shards of all namespaces, with ``stat`` on the new ones only; return their total bytes."""
        known, self._shards = self._shards, {}
        for directory in _namespaces(self._root):
            for path, _ in _files_matching(directory, SHARD_NAME):
                with suppress(FileNotFoundError):
                    self._shards[path] = known.get(path) or path.stat()
        return sum(stat.st_size for stat in self._shards.values())

    def _choose_victims(self, excess: int) -> tuple[list[Path], int]:
        """Choose the least recently used shards, of those that no live run needs, to evict ``excess`` bytes or more.

        Returns:
            The shards, and the bytes still lacking; 0 or less if there are enough.
        """
        victims: list[Path] = []
        if excess <= 0:
            return victims, excess
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
                victims.append(path)
                excess -= stat.st_size
        return victims, excess

    def _no_space_error(self, incoming: int, free: int, limit: str) -> OSError:
        fault = f"{mebibytes(incoming)} do not fit under {limit} beside what live runs use"
        disk = f"{mebibytes(max(free, 0))} of disk beside the {mebibytes(self._reserved_bytes)} that stay free"
        return OSError(errno.ENOSPC, f"{fault}, with {disk}", str(self._root))


def mebibytes(count: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"


def _delete(paths: list[Path]) -> int:
    """Delete files and return their number."""
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _namespaces(root: Path) -> list[Path]:
    """Return the directories of all namespaces."""
    return [path for path in root.iterdir() if SHA256.fullmatch(path.name)]


def _files_matching(directory: Path, name: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """Return the files of a directory whose whole name matches ``name``, with the matches."""
    with os.scandir(directory) as listing:
        return [(Path(entry.path), match) for entry in listing if (match := name.fullmatch(entry.name))]
