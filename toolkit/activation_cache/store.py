"""Store activations on disk, one entry a sample, found by what computed them and by the sample's token ids.

    ROOT/<namespace>/<header checksum>.safetensors     see ``toolkit.activation_cache.shard``
    ROOT/<namespace>/namespace.json                    the text that the namespace's hash is of, for people
    ROOT/<namespace>/.<run>.lease, .<run>-N.partial    see ``toolkit.activation_cache.eviction``
    ROOT/.lock

Whatever happens to the files, a read returns what was stored or None. Disk errors are counted and logged, never raised:
the caller computes the activations instead.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from toolkit.activation_cache.eviction import CacheQuota, CacheWriter, Lease, mebibytes
from toolkit.activation_cache.namespace import NAMESPACE_FILE, Namespace
from toolkit.activation_cache.shard import (
    ShardEntry,
    ShardError,
    divide_into_shards,
    encode,
    matches_checksum,
    prefetch_pages,
)
from toolkit.activation_cache.shard_index import ShardIndex
from toolkit.runtime.background_loader import BackgroundLoader
from toolkit.runtime.paths import publish
from toolkit.runtime.privacy import make_directory, set_access
from toolkit.runtime.safetensors_io import map_range

log = logging.getLogger("frostline")

_KEYS_AT_ONCE = 16_384  # are looked up at a time, so that not all of a large data set are texts at once
_MODE = 0o600
"""Of every file: hidden states are as private as the rows, which can be recovered from them."""


@dataclass
class StoreStatistics:
    """Counts of one process since it opened its store."""

    hits: int = 0
    misses: int = 0
    """Reads that found no entry."""
    computed: int = 0
    """Entries passed to ``write``."""
    stored: int = 0
    """Entries of those that were written."""
    failed: int = 0
    """Entries of those that were not: there was no room, or the disk refused."""
    damaged: int = 0
    """Entries or whole shards that were changed, unreadable, or of another namespace."""
    evicted: int = 0
    """Shards evicted to keep to the limit."""
    read_bytes: int = 0
    written_bytes: int = 0
    """Bytes of the shards written, headers included."""

    def __str__(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.hits} read ({mebibytes(self.read_bytes)}), {self.misses} missed, {self.computed} computed, "
            f"{self.stored} stored ({mebibytes(self.written_bytes)}), {self.failed} not stored, "
            f"{self.damaged} damaged, {self.evicted} shards evicted"
        )


class ActivationStore:
    """A store of the activations of one namespace. Any number of processes and threads may use one root at once.

    A write that exceeds ``limit_bytes`` for all shards under the root evicts the least recently used ones; None sets
    no limit and evicts nothing. ``keep_free_bytes`` of the disk stay free, for checkpoints. ``writer`` is this process
    among those of its run; None if it is the only one. Nobody else may read it, unless it ``is_shared`` with the group.
    """

    def __init__(
        self,
        root: Path,
        namespace: Namespace,
        limit_bytes: int | None = None,
        keep_free_bytes: int = 1 << 30,
        writer: CacheWriter | None = None,
        is_shared: bool = False,
    ) -> None:
        self._is_shared = is_shared
        self.statistics = StoreStatistics()
        self.namespace = namespace
        self.directory = root / namespace.sha256
        self._quota = CacheQuota(root, limit_bytes, keep_free_bytes)
        self._lock = threading.Lock()  # of the statistics
        self._reported: set[str] = set()
        self._index = ShardIndex(self.directory, namespace, self._count_damage)
        self._prefetcher = BackgroundLoader(self._prefetch_entry)
        self._lease = self._take_lease(writer or CacheWriter())
        self._index.refresh()

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of ``keys`` that are not stored, each once, in order; list the directory anew if there are any.

        Those that are stored are marked as used, so that no other run evicts them while this one is alive.
        """
        keys = list(dict.fromkeys(keys))
        missing = self._index.missing(keys)
        if missing:
            self._index.refresh()
            missing = self._index.missing(keys)
        return missing

    def lacking(self, keys: np.ndarray) -> np.ndarray:
        """Return for each of many keys, [samples, 32] bytes, whether it is not stored; otherwise as ``missing``."""
        lacks = np.zeros(len(keys), bool)
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            texts = [bytes(key).hex() for key in keys[start : start + _KEYS_AT_ONCE]]
            missing = set(self.missing(texts))
            lacks[start : start + len(texts)] = [text in missing for text in texts]
        return lacks

    def peek(self, key: str) -> torch.Tensor | None:
        """Return what was last stored under ``key``, [T, width] in the namespace's dtype; None if nothing was.

        The tensor maps the file's pages, without a copy; writing to it changes this process's pages only. Its bytes
        are compared with their checksum on the first read in this process, and again once the file has changed.
        """
        tensor = self._read_newest(key)
        if tensor is None and self._index.may_be_stale():
            self._index.refresh()
            tensor = self._read_newest(key)
        return tensor

    def read(self, key: str) -> torch.Tensor | None:
        """Return what ``peek`` does, and count a hit or a miss."""
        tensor = self.peek(key)
        self.count_reads(int(tensor is not None), int(tensor is None), 0 if tensor is None else tensor.nbytes)
        return tensor

    def count_reads(self, hits: int, misses: int, nbytes: int) -> None:
        """Count entries that ``peek`` found or did not."""
        with self._lock:
            self.statistics.hits += hits
            self.statistics.misses += misses
            self.statistics.read_bytes += nbytes

    def prefetch(self, keys: Iterable[str]) -> None:
        """Read entries into memory and verify them in the background, in the order of ``keys``."""
        self._prefetcher.request(keys)

    def write(self, entries: Mapping[str, torch.Tensor]) -> None:
        """Store activations, in one shard or more; those that do not fit or cannot be written are counted and logged.

        ``entries`` are key to [T, width] in the namespace's dtype, on any device; they must not overlap in memory.

        Raises:
            ValueError: a key or tensor does not fit the namespace.
        """
        for key, tensor in entries.items():
            self.namespace.check(key, tensor)
        with self._lock:
            self.statistics.computed += len(entries)
        for shard_entries in divide_into_shards(entries):
            try:
                self._write_shard(shard_entries)
            except (OSError, ShardError) as error:
                with self._lock:
                    self.statistics.failed += len(shard_entries)
                self._report(f"cannot write to {self.directory}", str(error), "what is not stored is computed again")
                if isinstance(error, TimeoutError) and self._lease is not None:  # no such wait for every shard
                    self._lease.release()
                    self._lease = None

    def available_bytes(self) -> int:
        """Return the bytes that could be stored if all that no live run uses were evicted; 0 if nothing can be written.

        Shards take a little more than their data.
        """
        if self._lease is None:
            return 0
        try:
            return self._quota.available_bytes()
        except OSError:
            return 0

    def refresh(self) -> None:
        """Find what other processes have stored or evicted; ``missing`` and ``read`` do so themselves on a miss."""
        self._index.refresh()

    def summary(self) -> str:
        """Return the statistics as a line for the log."""
        return f"activation cache: {self.statistics}"

    def close(self) -> None:
        """Stop prefetching, release the lease and evict what exceeds the limit; a second call does nothing.

        A closed store reads and writes nothing. Tensors that were read stay valid.
        """
        self._prefetcher.stop()
        self._index.clear()
        lease, self._lease = self._lease, None
        if lease is None:
            return
        lease.release()
        with suppress(OSError):  # the limit may be lower than that of the runs before
            self.statistics.evicted += self._quota.trim()

    def _take_lease(self, writer: CacheWriter) -> Lease | None:
        """Create the directory and take a lease; None if that fails, after which the store does not write."""
        try:
            make_directory(self.directory.parent, self._is_shared)
            make_directory(self.directory, self._is_shared)
            set_access(self.directory, self._is_shared)  # one of an earlier version was for all to read
            lease = Lease(self.directory, writer)
        except OSError as error:
            self._report(f"{self.directory} cannot be claimed", str(error), "it is read but not written")
            return None
        description = self.directory / NAMESPACE_FILE
        if not description.exists():
            with suppress(OSError):  # it is for people only
                publish(self.namespace.text.encode(), description, lease.staging(), _MODE)
        return lease

    def _read_newest(self, key: str) -> torch.Tensor | None:
        """Map the newest entry of a key that passes verification, [T, width]; None if no entry does."""
        for entry in self._index.entries(key):
            try:
                if self._verify(entry):
                    shape = (entry.tokens, self.namespace.width)
                    tensor = map_range(entry.shard.path, entry.start, self.namespace.dtype, shape)
                    entry.shard.mark_used()
                    return tensor
            except FileNotFoundError:  # evicted
                self._index.forget(entry.shard)
            except (OSError, ValueError) as error:
                self._index.drop(entry, str(error))
        return None

    def _verify(self, entry: ShardEntry) -> bool:
        """Return whether the entry's bytes match its checksum; drop it from the index if not. OSError if unreadable."""
        if not entry.shard.unchanged():
            self._index.forget(entry.shard)
            return False
        if not entry.verified:
            if not matches_checksum(entry):
                self._index.drop(entry, "its bytes do not give their checksum")
                return False
            entry.verified = True
        return True

    def _prefetch_entry(self, key: str) -> None:
        """Read a key's entry into memory and verify it; runs in the prefetcher's thread."""
        for entry in self._index.entries(key):
            with suppress(OSError):  # a later read reports it
                if entry.verified:
                    prefetch_pages(entry)
                    return
                if self._verify(entry):
                    return

    def _write_shard(self, entries: Mapping[str, torch.Tensor]) -> None:
        """Write entries as one shard; OSError if it does not fit, the disk refuses, or there is no lease."""
        lease = self._lease
        if lease is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.directory))
        name, content = encode(entries, self.namespace)
        with self._quota.room(len(content)) as evicted:
            publish(content, self.directory / name, lease.staging(), _MODE)
        self._index.add(self.directory / name)
        with self._lock:
            self.statistics.evicted += evicted
            self.statistics.stored += len(entries)
            self.statistics.written_bytes += len(content)

    def _count_damage(self, what: str, fault: str) -> None:
        """Count and report a damaged entry or shard."""
        with self._lock:
            self.statistics.damaged += 1
        self._report(f"{what} is not used", fault, "what is damaged is computed anew")

    def _report(self, event: str, reason: str, consequence: str) -> None:
        """Log the first event with each ``consequence``; later ones are only counted, in the statistics."""
        with self._lock:
            is_first = consequence not in self._reported
            self._reported.add(consequence)
        if is_first:
            log.warning("activation cache: %s (%s); %s. The summary counts such cases", event, reason, consequence)
