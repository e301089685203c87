"""Tensors that stay in safetensors files: memory-mapped, read when they are needed, given back afterwards."""

from __future__ import annotations

import json
import mmap
import struct
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from toolkit.models.bundled import cache_root
from toolkit.runtime.errors import ModelError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""The names of the safetensors format, as far as weights and their quantised forms have them."""


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Name to dtype, shape and offsets, and where the data begins: 8 bytes of length, JSON, data (safetensors format).

    Raises:
        ModelError: the file is not of that format.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError(f"its header claims {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from None
    header.pop("__metadata__", None)
    return header, 8 + length


class MappedFile:
    """A safetensors file in the address space; its pages are in memory only while they are used."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: may be unlinked once this returns; the mapping keeps the data.

        Raises:
            ModelError: the file is not of that format.
        """  # noqa: D205, D212
        self.entries, self._start = read_header(path)
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the file: no byte is read before it is used."""
        entry = self.entries[name]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes to frozen weights
            flat = torch.frombuffer(
                self._map, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=self._start + begin
            )
        return flat.view(shape)

    def advise(self, names: list[str], needed: bool) -> None:
        """Tell the kernel to read these tensors ahead, or that their pages need not stay in this process."""
        ranges = sorted(self.entries[name]["data_offsets"] for name in names)
        for begin, end in ranges:
            first = (self._start + begin) // mmap.PAGESIZE * mmap.PAGESIZE
            length = self._start + end - first
            if length:
                self._map.madvise(mmap.MADV_WILLNEED if needed else mmap.MADV_DONTNEED, first, length)


@dataclass(frozen=True)
class OnDisk:
    """One tensor of a mapped file."""

    file: MappedFile
    name: str
    """In the file."""
    dtype: torch.dtype
    """What it is read as."""

    def read(self) -> torch.Tensor:
        """The tensor; a view of the file if that has the same precision."""
        return self.file.tensor(self.name).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        begin, end = self.file.entries[self.name]["data_offsets"]
        return int(end - begin)


def spill(tensors: Mapping[str, torch.Tensor]) -> dict[str, OnDisk]:
    """Write tensors into a file of the cache directory and leave them there.

    The file has no name any more when this returns: its space is free again as soon as the process ends, however it
    ends.

    Raises:
        ModelError: the disk.
    """
    root = cache_root()
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".offload-", dir=root) as folder:
            path = Path(folder) / "weights.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
            file = MappedFile(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{size / 2**20:.0f} MiB of weights could not be written to {root} ({error}); free space there, or name "
            "another directory in FROSTLINE_CACHE"
        ) from None
    return {name: OnDisk(file, name, tensor.dtype) for name, tensor in tensors.items()}
