"""Store activations on disk, one entry a sample, found by what computed them and by the sample's token ids.

    ROOT/<namespace>/<header checksum>.safetensors     see ``toolkit.activation_cache.shard``
    ROOT/<namespace>/namespace.json                    what the hash stands for, for people
    ROOT/<namespace>/.<run>.lease, .<run>-N.partial    see ``toolkit.activation_cache.eviction``
    ROOT/.lock

Whatever happens to the files, a read gives what was stored or nothing. Trouble with the disk is counted and logged,
and never raised: the caller computes instead.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from toolkit.activation_cache.eviction import CacheQuota, CacheWriter, Lease
from toolkit.activation_cache.namespace import Namespace
from toolkit.activation_cache.shard import (
    ShardEntry,
    ShardError,
    encode,
    gives_checksum,
    map_entry,
    prefetch_pages,
)
from toolkit.activation_cache.shard_index import ShardIndex
from toolkit.activation_cache.statistics import StoreStatistics
from toolkit.runtime.background_loader import BackgroundLoader
from toolkit.runtime.paths import publish

log = logging.getLogger("frostline")

_SHARD_ENTRIES = 64  # a read opens the shard and parses its header: 70 µs with 16 entries, 4 ms with 4096
_SHARD_BYTES = 64 << 20  # a write holds one shard in memory


class ActivationStore:
    """A store of the activations of one namespace. Any number of processes and threads may use one root at once.

    Args:
        root: the directory of all namespaces; made if it is not there.
        namespace: what computes the activations.
        limit_bytes: what all shards under the root may take; a write beyond it evicts the least recently used ones.
            None sets no limit and evicts nothing.
        keep_free_bytes: what a write leaves free on the disk, for checkpoints.
        writer: this process among those of its run; None is a run of one process.
    """

    def __init__(
        self,
        root: Path,
        namespace: Namespace,
        limit_bytes: int | None = None,
        keep_free_bytes: int = 1 << 30,
        writer: CacheWriter | None = None,
    ) -> None:
        self.statistics = StoreStatistics()
        self.namespace = namespace
        self.directory = root / namespace.sha256
        """Of this namespace's shards."""
        self._quota = CacheQuota(root, limit_bytes, keep_free_bytes)
        self._lock = threading.Lock()  # of the statistics
        self._reported: set[str] = set()
        self._index = ShardIndex(self.directory, namespace, self._damaged)
        self._prefetcher = BackgroundLoader(self._load)
        self._lease = self._enter(writer or CacheWriter())
        self._index.refresh()

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __len__(self) -> int:
        """Return the number of samples stored, as far as this process knows."""
        return len(self._index)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that have to be computed, each once, in their order; list the directory anew if any are.

        Entries that are present count as used from now on, so that no other run evicts them while this one lives.
        """
        wanted = list(dict.fromkeys(keys))
        absent = self._index.absent(wanted)
        if absent:
            self._index.refresh()
            absent = self._index.absent(wanted)
        return absent

    def read(self, key: str) -> torch.Tensor | None:
        """Return what was last stored under ``key``, [T, width] in the namespace's dtype; None if nothing was.

        The tensor maps the file's pages, without a copy; writing to it changes this process's pages only. Its bytes
        are compared with their checksum on the first read in this process, and again once the file has changed.
        """
        tensor = self._read_newest(key)
        if tensor is None and self._index.is_old():
            self._index.refresh()
            tensor = self._read_newest(key)
        with self._lock:
            if tensor is None:
                self.statistics.misses += 1
            else:
                self.statistics.hits += 1
                self.statistics.read_bytes += tensor.nbytes
        return tensor

    def prefetch(self, keys: Iterable[str]) -> None:
        """Read entries into memory and verify them in the background; ``keys`` in the order of their use."""
        self._prefetcher.request(keys)

    def write(self, entries: Mapping[str, torch.Tensor]) -> None:
        """Store computed activations: in one shard, or several where they are many or large.

        Entries that cannot be stored (full disk, limit, quota, read-only …) are counted and logged.

        Args:
            entries: key to [T, width] in the namespace's dtype, on any device; must not overlap in memory.

        Raises:
            ValueError: a key or tensor does not fit the namespace.
        """
        for key, tensor in entries.items():
            self.namespace.check(key, tensor)
        with self._lock:
            self.statistics.computed += len(entries)
        for part in _parts(entries):
            try:
                self._write_shard(part)
            except (OSError, ShardError) as error:
                with self._lock:
                    self.statistics.failed += len(part)
                self._report(f"cannot write to {self.directory}", str(error), "what is not stored is computed again")

    def available_bytes(self) -> int:
        """Return the bytes that could be stored now, once all is evicted that no live run uses.

        Shards take a little more than their data, see ``bytes_of``. 0 where nothing can be written.
        """
        if self._lease is None:
            return 0
        try:
            return self._quota.available_bytes()
        except OSError:
            return 0

    def refresh(self) -> None:
        """Find what other processes have stored or evicted; ``missing`` and ``read`` do so where they find nothing."""
        self._index.refresh()

    def summary(self) -> str:
        """Return the statistics as one line for the log."""
        return f"activation cache: {self.statistics}"

    def close(self) -> None:
        """Stop prefetching, release the namespace and keep to the limit; a second call does nothing.

        A closed store reads and writes nothing. Tensors that were read stay as they are.
        """
        self._prefetcher.stop()
        self._index.clear()
        lease, self._lease = self._lease, None
        if lease is None:
            return
        lease.release()
        with suppress(OSError):  # the limit may be lower than that of the runs before
            self.statistics.evicted += self._quota.trim()

    def _enter(self, writer: CacheWriter) -> Lease | None:
        """Make the directory and take a lease; return None if that fails: then nothing is written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lease = Lease(self.directory, writer)
        except OSError as error:
            self._report(f"{self.directory} cannot be claimed", str(error), "it is read but not written")
            return None
        described = self.directory / "namespace.json"
        if not described.exists():
            with suppress(OSError):  # it is for people only
                publish(self.namespace.text.encode(), described, lease.staging())
        return lease

    def _read_newest(self, key: str) -> torch.Tensor | None:
        """Return the newest entry of a key whose bytes are right."""
        for entry in self._index.entries(key):
            try:
                if self._verify(entry):
                    tensor = map_entry(entry, self.namespace)
                    entry.shard.mark_used()
                    return tensor
            except FileNotFoundError:  # evicted
                self._index.forget(entry.shard)
            except (OSError, ValueError) as error:
                self._index.drop(entry, str(error))
        return None

    def _verify(self, entry: ShardEntry) -> bool:
        """Return True if the entry's bytes are those that were stored; else drop it from the index.

        Raises:
            OSError: the file is gone or cannot be read.
        """
        if not entry.shard.unchanged():
            self._index.forget(entry.shard)
            return False
        if not entry.verified:
            if not gives_checksum(entry):
                self._index.drop(entry, "its bytes do not give their checksum")
                return False
            entry.verified = True
        return True

    def _load(self, key: str) -> None:
        """Prefetch one key."""
        for entry in self._index.entries(key):
            with suppress(OSError):  # the reader will see it too
                if entry.verified:
                    prefetch_pages(entry)
                    return
                if self._verify(entry):
                    return

    def _write_shard(self, entries: Mapping[str, torch.Tensor]) -> None:
        """Store entries in one shard.

        Raises:
            OSError: it does not fit, or the disk refuses.
            ShardError: it was damaged at once.
        """
        lease = self._lease
        if lease is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.directory))
        name, content = encode(entries, self.namespace)
        with self._quota.room(len(content)) as evicted:
            publish(content, self.directory / name, lease.staging())
        self._index.add(self.directory / name)
        with self._lock:
            self.statistics.evicted += evicted
            self.statistics.stored += len(entries)
            self.statistics.written_bytes += len(content)

    def _damaged(self, what: str, fault: str) -> None:
        with self._lock:
            self.statistics.damaged += 1
        self._report(f"{what} is not used", fault, "what is damaged is computed anew")

    def _report(self, trouble: str, reason: str, consequence: str) -> None:
        """Warn of the first trouble with a consequence; the statistics count the others."""
        with self._lock:
            new = consequence not in self._reported
            self._reported.add(consequence)
        if new:
            log.warning("activation cache: %s (%s); %s. The summary counts such cases", trouble, reason, consequence)


def _parts(entries: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Cut ``entries`` into shards."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for key, tensor in entries.items():
        if part and (len(part) == _SHARD_ENTRIES or size + tensor.nbytes > _SHARD_BYTES):
            yield part
            part, size = {}, 0
        part[key] = tensor
        size += tensor.nbytes
    if part:
        yield part
