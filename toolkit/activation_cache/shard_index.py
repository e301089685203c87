"""Index which sample is in which shard of a directory, as far as one process knows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from toolkit.activation_cache.namespace import Namespace
from toolkit.activation_cache.shard import (
    SHARD_NAME,
    FileIdentity,
    ForeignShardError,
    Shard,
    ShardEntry,
    ShardError,
    read_shard_header,
)

_MTIME_RESOLUTION = 10**9  # nanoseconds within which a directory can change twice under one modification time


class ShardIndex:
    """Maps a key to its entries in a directory, which need not exist, the newest first. Thread-safe.

    ``report`` is called with the name of each damaged entry or shard and what is wrong with it.
    """

    def __init__(self, directory: Path, namespace: Namespace, report: Callable[[str, str], None]) -> None:
        self._directory, self._namespace, self._report = directory, namespace, report
        self._lock = threading.RLock()
        self._entries: dict[str, list[ShardEntry]] = {}
        self._shards: dict[str, Shard] = {}
        self._unreadable: dict[str, FileIdentity] = {}
        self._closed = False
        self._listing_times: tuple[int, int] | None = None
        """Modification time of the directory at its last listing, and time of that listing, in nanoseconds."""

    def entries(self, key: str) -> tuple[ShardEntry, ...]:
        """Return all entries of a key, the newest first."""
        with self._lock:
            return tuple(self._entries.get(key, ()))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of ``keys`` that have no entry; mark the shards of the others as used."""
        keys = list(keys)
        with self._lock:
            shards = [self._entries[key][0].shard for key in keys if key in self._entries]
            for shard in dict.fromkeys(shards):
                if not shard.mark_used():
                    self.forget(shard)
            return [key for key in keys if key not in self._entries]

    def add(self, path: Path) -> None:
        """Read the header of a shard and put its entries first, as the newest.

        Raises:
            ShardError: it is damaged.
            OSError: it cannot be read.
        """
        shard = read_shard_header(path, self._namespace)
        with self._lock:
            if path.name in self._shards:  # written anew
                self._drop_shard(self._shards[path.name])
            self._shards[path.name] = shard
            for key, entry in shard.entries.items():
                self._entries.setdefault(key, []).insert(0, entry)

    def forget(self, shard: Shard) -> None:
        """Drop a shard that is gone or was replaced, and list the directory anew on the next miss."""
        with self._lock:
            self._drop_shard(shard)
            self._listing_times = None

    def drop(self, entry: ShardEntry, fault: str) -> None:
        """Drop an entry that cannot be used, and report it; a second call does nothing."""
        with self._lock:
            if entry in self._entries.get(entry.key, ()):
                self._drop_entry(entry)
                self._report(f"entry {entry.key} of {entry.shard.path}", fault)

    def clear(self) -> None:
        """Drop everything and stay empty."""
        with self._lock:
            self._entries.clear()
            self._shards.clear()
            self._closed = True

    def may_be_stale(self) -> bool:
        """Return whether the directory may have changed since it was listed.

        True if its modification time differs, or is so close to the listing that a later change may have kept it.
        """
        with self._lock:
            if self._closed or self._listing_times is None:
                return not self._closed
            modified, listed = self._listing_times
        try:
            return self._directory.stat().st_mtime_ns != modified or listed - modified < _MTIME_RESOLUTION
        except OSError:
            return False

    def refresh(self) -> None:
        """List the directory, drop the shards that are gone and read the headers of new ones."""
        with self._lock:
            if self._closed:
                return
            listed = time.time_ns()
            try:
                modified = self._directory.stat().st_mtime_ns
                files = self._list_shards()
            except OSError:
                modified, files = listed, {}
            for name, shard in list(self._shards.items()):
                if files.get(name) != shard.file:
                    self._drop_shard(shard)
            new = [
                name for name, file in files.items() if file != self._unreadable.get(name) and name not in self._shards
            ]
            for name in sorted(new, key=lambda name: files[name].modified_ns):
                self._read_header(name, files[name])
            self._listing_times = (modified, listed)

    def _list_shards(self) -> dict[str, FileIdentity]:
        """Return the identity of each shard in the directory by file name."""
        files = {}
        with os.scandir(self._directory) as listing:
            for entry in listing:
                if SHARD_NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # evicted meanwhile
                        files[entry.name] = FileIdentity.of(entry.stat())
        return files

    def _read_header(self, name: str, file: FileIdentity) -> None:
        """Add a shard; report one that cannot be read, and delete one that is damaged."""
        path = self._directory / name
        try:
            self.add(path)
        except FileNotFoundError:
            return  # evicted meanwhile
        except (OSError, ShardError) as error:
            self._report(str(path), str(error))
            self._unreadable[name] = file
            if isinstance(error, ShardError) and not isinstance(error, ForeignShardError):
                with suppress(OSError):
                    path.unlink()  # nothing can ever be read from it
                    del self._unreadable[name]

    def _drop_shard(self, shard: Shard) -> None:
        """Drop a shard with its entries."""
        if self._shards.get(shard.path.name) is shard:
            del self._shards[shard.path.name]
            for entry in shard.entries.values():
                if entry in self._entries.get(entry.key, ()):
                    self._drop_entry(entry)

    def _drop_entry(self, entry: ShardEntry) -> None:
        self._entries[entry.key].remove(entry)
        if not self._entries[entry.key]:
            del self._entries[entry.key]
