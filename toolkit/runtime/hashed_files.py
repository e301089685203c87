"""Write the files of a checkpoint: hashed in the same pass, and forced to disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.runtime.errors import DiskError
from toolkit.runtime.safetensors_io import serialize

_CHUNK = 2**24


@dataclass(frozen=True)
class FileHash:
    """Size and hash that a file must have."""

    size: int
    """Bytes."""
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileHash:
    """Write a safetensors file; one tensor at a time leaves its device, and none is copied on a CPU.

    Raises:
        OSError: the disk.
    """
    return _write(path, serialize(tensors, metadata))


def write_json(path: Path, value: object) -> FileHash:
    """Write ``value`` as JSON.

    Raises:
        OSError: the disk.
    """
    return _write(path, [as_json(value).encode()])


def as_json(value: object) -> str:
    """Return the text that ``write_json`` writes."""
    return json.dumps(value, indent=1)


def hash_files(directory: Path, names: list[str]) -> dict[str, FileHash | str]:
    """Return size and SHA-256 of files, several at a time; for those that cannot be read, what is wrong."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _hash(directory / name), names), strict=True))


@contextmanager
def explain_disk_errors(what: str) -> Iterator[None]:
    """Turn an error of the disk into one clear message.

    Raises:
        DiskError: instead of any OSError of the body.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space or lower output.keep" if full else "look after the disk"
        raise DiskError(
            f"{what} could not be written ({error.strerror or error}). The checkpoints before it are intact: {remedy}, "
            "then start the same command again to go on from the latest"
        ) from None


def _write(path: Path, parts: Iterable[memoryview | bytes]) -> FileHash:
    sha, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with ThreadPoolExecutor(1) as other:  # a chunk is hashed while it is written
            for part in parts:
                for start in range(0, len(part), _CHUNK):
                    chunk = memoryview(part)[start : start + _CHUNK]
                    hashed = other.submit(sha.update, chunk)
                    size += len(chunk)
                    while chunk:
                        chunk = chunk[os.write(descriptor, chunk) :]
                    hashed.result()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileHash(size, sha.hexdigest())


def _hash(path: Path) -> FileHash | str:
    try:
        with path.open("rb", buffering=0) as file:
            sha = hashlib.file_digest(file, "sha256")
            return FileHash(file.tell(), sha.hexdigest())
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
