"""Read and write safetensors files: 8 bytes of header length, a JSON header, then the tensors' bytes.

The format is that of the safetensors library, which cannot do what is needed here: hash checkpoints while they are
written, verify cached activations before they are mapped, and read ahead and drop offloaded weights page by page.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from toolkit.runtime.paths import require_regular

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
}  # fmt: skip
"""Torch dtype by its name in a safetensors header."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}
"""Dtypes of unquantised weights: floating point with 16 bits or more."""
_LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library accepts


def read_header(file: BinaryIO) -> bytes:
    """Return the length field and the header of an open safetensors file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is shorter than its header.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    header = prefix + file.read(length if length <= _LONGEST_HEADER else 0)
    if len(prefix) < 8 or len(header) < 8 + length:
        raise ValueError("its header is cut off")
    return header


def parse_header(header: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Parse and check the bytes that ``read_header`` returned.

    Returns:
        dtype, shape and data_offsets by tensor name, with offsets from the end of the header; and the metadata.

    Raises:
        ValueError: the bytes are not a safetensors header.
    """
    try:
        entries: dict[str, dict[str, Any]] = json.loads(header[8:])
        metadata = dict(entries.pop("__metadata__", {}))
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end or any(not isinstance(size, int) or size < 0 for size in entry["shape"]):
                raise ValueError(f"{name} has no size that can be")
            dtype = DTYPES.get(entry["dtype"])
            if dtype is not None and math.prod(entry["shape"]) * dtype.itemsize != end - begin:
                raise ValueError(f"{name} has {end - begin} bytes, which its shape and dtype do not give")
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not one of safetensors: {error!r}") from None
    return entries, metadata


class SafetensorsFile:
    """A memory-mapped safetensors file: a page is read from disk when it is first used.

    The file may be unlinked afterwards, because the mapping keeps the data. A ``writable`` one is mapped copy-on-write:
    writes to tensors change this process's pages only. Under strict overcommit (vm.overcommit_memory = 2) the whole
    file then counts as memory. ``entries`` and ``metadata`` are what ``parse_header`` returns.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a safetensors file.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        require_regular(path.stat(), path)
        with path.open("rb") as file:
            header = read_header(file)
            self.entries, self.metadata = parse_header(header)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if writable else mmap.ACCESS_READ)
        self._start = len(header)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the mapped file.

        Raises:
            KeyError: there is no such tensor, or its dtype is not in ``DTYPES``.
            ValueError: the file ends before the end of the tensor.
        """
        entry = self.entries[name]
        return view_mapped(self._map, self._start + entry["data_offsets"][0], DTYPES[entry["dtype"]], entry["shape"])

    def advise(self, names: Iterable[str], needed: bool) -> None:
        """Advise the kernel to read tensors ahead (``needed``), or to drop their pages from this process."""
        for begin, end in sorted(self.entries[name]["data_offsets"] for name in names):
            first = (self._start + begin) // mmap.PAGESIZE * mmap.PAGESIZE
            if length := self._start + end - first:
                self._map.madvise(mmap.MADV_WILLNEED if needed else mmap.MADV_DONTNEED, first, length)


def view_mapped(pages: mmap.mmap, offset: int, dtype: torch.dtype, shape: Iterable[int]) -> torch.Tensor:
    """Return a tensor that views mapped bytes and keeps the mapping alive.

    Raises:
        ValueError: the mapping ends before the end of the tensor.
    """
    shape = list(shape)
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if offset + count * dtype.itemsize > len(pages):
        raise ValueError("the file ends before its last tensor")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # frozen weights are never written to
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset).view(shape)


def map_range(path: Path, start: int, dtype: torch.dtype, shape: Iterable[int]) -> torch.Tensor:
    """Map the tensor whose data begin at byte ``start`` of a file, copy-on-write.

    Raises:
        OSError: the file does not exist or cannot be mapped.
        ValueError: the file ends before the end of the tensor.
    """
    shape = list(shape)
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = start - first + math.prod(shape) * dtype.itemsize
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=first)
    return view_mapped(pages, start - first, dtype, shape)


def file_size(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Return the size in bytes of the file that ``serialize`` yields."""
    return len(_build_header(tensors, metadata)) + sum(tensor.nbytes for tensor in tensors.values())


def serialize(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a safetensors file; tensors are copied to the CPU one at a time, CPU tensors not at all."""
    yield _build_header(tensors, metadata)
    for name in _file_order(tensors):
        yield tensors[name].detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of the umask."""
    with path.open("wb") as file:
        for part in serialize(tensors, metadata):
            file.write(part)


def _file_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return tensor names in file order: widest dtype first, so that every tensor is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _build_header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """Return the length field and the JSON header, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in _file_order(tensors):
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins aligned
    return len(text).to_bytes(8, "little") + text
