"""Write the files of a checkpoint: hashed while they are written, then fsynced."""

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
from toolkit.runtime.paths import require_regular
from toolkit.runtime.safetensors_io import serialize

_CHUNK = 2**24
"""Bytes that are hashed and written at once."""


@dataclass(frozen=True)
class FileHash:
    """Size and SHA-256 of a file, as the manifest of a checkpoint records them."""

    size: int
    """Bytes."""
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileHash:
    """Write a safetensors file; tensors are copied to the CPU one at a time, CPU tensors not at all."""
    return _write_hashed(path, serialize(tensors, metadata))


def write_json(path: Path, value: object) -> FileHash:
    """Write ``value`` as JSON."""
    return _write_hashed(path, [as_json(value).encode()])


def as_json(value: object) -> str:
    """Return the JSON text that ``write_json`` writes."""
    return json.dumps(value, indent=1)


def hash_files(directory: Path, names: list[str]) -> dict[str, FileHash | str]:
    """Hash files in parallel; a file that cannot be read maps to a description of the fault, as ``is missing``."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(directory / name), names), strict=True))


@contextmanager
def explain_disk_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the body, which writes ``what``, into a DiskError that says how to go on."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space or lower output.keep" if is_full else "look after the disk"
        if error.errno == errno.ENOENT:
            advice = "put back the directory that was moved or removed"
        raise DiskError(
            f"{what} could not be written ({error.strerror or error}). The checkpoints before it are intact: {advice}, "
            "then start the same command again to go on from the latest"
        ) from None


def _write_hashed(path: Path, parts: Iterable[memoryview | bytes]) -> FileHash:
    """Write and fsync a file; each chunk is hashed in a second thread while it is written."""
    sha, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with ThreadPoolExecutor(1) as hasher:
            for part in parts:
                for start in range(0, len(part), _CHUNK):
                    chunk = memoryview(part)[start : start + _CHUNK]
                    hashed = hasher.submit(sha.update, chunk)
                    size += len(chunk)
                    while chunk:  # os.write may write only a part
                        chunk = chunk[os.write(descriptor, chunk) :]
                    hashed.result()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileHash(size, sha.hexdigest())


def _hash_file(path: Path) -> FileHash | str:
    """Hash a file, or describe why it cannot be read."""
    try:
        require_regular(path.stat(), path)
        with path.open("rb", buffering=0) as file:
            sha = hashlib.file_digest(file, "sha256")
            return FileHash(file.tell(), sha.hexdigest())
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return f"cannot be read ({error})"
