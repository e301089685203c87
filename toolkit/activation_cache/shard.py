"""Read and write shards: safetensors files of stored activations, in which every byte is checked.

Its name is the checksum of its header; the header holds the namespace and the checksum of each entry's bytes. So a
changed byte shows wherever it is, and a file in the wrong directory does too. Two writers of the same entries give
the same name and the same bytes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from xxhash import xxh3_128, xxh3_128_hexdigest

from toolkit.activation_cache.namespace import FORMAT, Namespace
from toolkit.runtime.safetensors_io import DTYPE_NAMES, parse_header, read_header, serialize

SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
"""Pattern of a shard's file name."""
_SHARD_ENTRIES = 64  # a read opens the shard and parses its header: 70 µs with 16 entries, 4 ms with 4096
SHARD_BYTES = 64 << 20
"""Most bytes of a shard's data; a write holds one shard in memory."""
_CHUNK = 1 << 17  # stays in the processor's cache between read and checksum


class ShardError(Exception):
    """A shard's header is damaged."""


class ForeignShardError(ShardError):
    """A shard is sound but belongs to another namespace."""


@dataclass(frozen=True)
class FileIdentity:
    """Identifies the content of a file: it changes when the file is edited or replaced, but not when it is read."""

    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileIdentity:
        """Take the identity from the result of ``os.stat``."""
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(eq=False)
class ShardEntry:
    """One sample's activations within a shard."""

    shard: Shard
    key: str
    tokens: int
    start: int
    """Offset in bytes within the file."""
    size_bytes: int
    checksum: str
    """XXH3, 128 bits, of its bytes."""
    verified: bool = False
    """True once this process has compared the bytes with the checksum."""


@dataclass(eq=False)
class Shard:
    """A file of entries, as its header describes it."""

    path: Path
    file: FileIdentity
    entries: dict[str, ShardEntry] = field(default_factory=dict)
    used: bool = False
    """True once this process has set the file's access time; see ``mark_used``."""

    def mark_used(self) -> bool:
        """Set the file's access time to now, by which eviction goes; once per process.

        The file system may update it on reads too, which does no harm. Returns False if the file is gone.
        """
        if not self.used:
            try:
                os.utime(self.path, ns=(time.time_ns(), self.file.modified_ns))
            except FileNotFoundError:
                return False
            except OSError:
                pass  # read-only: then nobody evicts either
            self.used = True
        return True

    def unchanged(self) -> bool:
        """Return whether the file is still the one whose header was read.

        Raises:
            OSError: the file is gone.
        """
        return FileIdentity.of(self.path.stat()) == self.file


def encode(entries: Mapping[str, torch.Tensor], namespace: Namespace) -> tuple[str, bytes]:
    """Encode entries as a shard; return its file name and content.

    The entries are key to [T, width] in the namespace's dtype, on any device; they must not overlap in memory.
    """
    rows = {key: entries[key].detach().cpu().contiguous() for key in sorted(entries)}
    checksums = [xxh3_128_hexdigest(row.view(torch.uint8).numpy().data) for row in rows.values()]
    header, *data = serialize(rows, {"frostline": " ".join([FORMAT, namespace.sha256, *checksums])})
    return _name_of(header), b"".join([header, *data])


def read_shard_header(path: Path, namespace: Namespace) -> Shard:
    """Read the header of a shard; return its entries, without their data.

    Raises:
        ForeignShardError: it belongs to another namespace.
        ShardError: it is truncated or changed.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        shard = Shard(path, FileIdentity.of(os.fstat(file.fileno())))
        try:
            header = read_header(file)
        except ValueError as error:
            raise ShardError(str(error)) from None
    if _name_of(header) != path.name:
        raise ShardError("its header does not give the checksum that is its name")
    try:
        described, metadata = parse_header(header)
        form, owner, *checksums = metadata["frostline"].split()
        if (form, owner) != (FORMAT, namespace.sha256):
            raise ForeignShardError("it belongs to another namespace")
        for key, checksum in zip(sorted(described), checksums, strict=True):
            entry = described[key]
            tokens, width = entry["shape"]
            start, end = entry["data_offsets"]
            size = tokens * width * namespace.dtype.itemsize
            if entry["dtype"] != DTYPE_NAMES[namespace.dtype] or width != namespace.width or end - start != size:
                raise ValueError(f"entry {key} has dtype, shape or size of its own")
            shard.entries[key] = ShardEntry(shard, key, tokens, len(header) + start, size, checksum)
        expected = len(header) + sum(entry.size_bytes for entry in shard.entries.values())
        if shard.file.size_bytes != expected:
            raise ValueError(f"{shard.file.size_bytes} bytes long, expected {expected}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"its header is not one of {FORMAT}: {error!r}") from None
    return shard


def matches_checksum(entry: ShardEntry) -> bool:
    """Read the entry's bytes and compare them with its checksum; they stay in the page cache.

    They are read, not mapped: a failing disk then raises OSError instead of killing the process with SIGBUS.

    Raises:
        OSError: the bytes cannot be read.
    """
    checksum = xxh3_128()
    left = entry.size_bytes
    buffer = memoryview(bytearray(min(left, _CHUNK)))
    with entry.shard.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        while left and (count := file.readinto(buffer[:left])):
            checksum.update(buffer[:count])
            left -= count
    return not left and checksum.hexdigest() == entry.checksum


def prefetch_pages(entry: ShardEntry) -> None:
    """Ask the kernel to read the entry's bytes into the page cache; return without waiting.

    Raises:
        OSError: the file is gone.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with entry.shard.path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), entry.start, entry.size_bytes, os.POSIX_FADV_WILLNEED)


def _name_of(header: bytes | memoryview) -> str:
    """Return the file name of a shard by its header, which includes the 8 bytes of its length."""
    return f"{xxh3_128_hexdigest(header)}.safetensors"


def divide_into_shards(entries: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Divide ``entries`` into shards of at most ``_SHARD_ENTRIES`` entries and ``SHARD_BYTES`` bytes."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for key, tensor in entries.items():
        if shard and (len(shard) == _SHARD_ENTRIES or size + tensor.nbytes > SHARD_BYTES):
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
