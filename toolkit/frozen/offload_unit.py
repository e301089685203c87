"""The weights of one frozen block or embedding table, wherever and however they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from toolkit.models.disk_offload import OnDisk, offload_to_disk
from toolkit.models.quantization import PARTS, QuantizationSpec, dequantise, quantise
from toolkit.runtime.page_locked import Arena, aligned

HOST = torch.device("cpu")


@dataclass
class OffloadUnit:
    """A module whose weights are loaded together: a block, or an embedding table, whose look-up runs on the host."""

    module: str
    """Name of the module in the model."""
    is_block: bool
    device: torch.device
    """Device that it computes on."""
    names: tuple[str, ...]
    """Names, within the module, of its offloaded parameters."""
    stored: dict[str, torch.Tensor | OnDisk]
    """Weights by name, and the parts of quantised ones as ``name:part``."""
    specs: dict[str, QuantizationSpec] = field(default_factory=dict)
    """Quantised weights by name."""
    flat: torch.Tensor | None = None
    """The stored tensors one after the other, as ``write_flat`` lays them out, in page-locked memory."""
    kept: dict[str, torch.Tensor] | None = None
    """The weights by name on the device while ``keep`` holds them there; else None."""

    @property
    def is_on_host(self) -> bool:
        """Return whether some of the weights of a block are on the host or on disk."""
        return self.is_block and any(
            isinstance(stored, OnDisk) or stored.device == HOST for stored in self.stored.values()
        )

    @property
    def flat_bytes(self) -> int:
        """Return the bytes of the stored tensors, one after the other."""
        return sum(aligned(_memory_bytes(stored)) for stored in self.stored.values())

    def write_flat(self, out: torch.Tensor) -> None:
        """Write the stored tensors one after the other into ``out``, of ``flat_bytes`` on the host."""
        advise(self.stored.values(), needed=True)
        for key, part in self.parts(out).items():
            part.copy_(as_tensor(self.stored[key]))
        advise(self.stored.values(), needed=False)

    def parts(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the stored tensors as views of the bytes that ``write_flat`` wrote."""
        parts, start = {}, 0
        for key, stored in self.stored.items():
            size = _memory_bytes(stored)
            parts[key] = flat[start : start + size].view(stored.dtype).view(_shape(stored))
            start += aligned(size)
        return parts

    @property
    def is_on_disk(self) -> bool:
        """Return whether some of the weights are on disk."""
        return any(isinstance(stored, OnDisk) for stored in self.stored.values())

    @property
    def whole_bytes(self) -> int:
        """Return the bytes of the weights in the model's precision."""
        specs = self.specs
        return sum(
            math.prod(specs[name].shape) * specs[name].dtype.itemsize
            if name in specs
            else _memory_bytes(self.stored[name])
            for name in self.names
        )

    def keep(self) -> None:
        """Hold the weights on the device, in the model's precision, until ``forget``."""
        self.kept = self.dequantise(self.copy_to_device())

    def lock_copy(self, arena: Arena) -> bool:
        """Copy weights that are on disk into page-locked memory until ``forget``; return False if it refuses."""
        self.flat = arena.take(self.flat_bytes)
        if self.flat is not None:
            self.write_flat(self.flat)
        return self.flat is not None

    def forget(self) -> None:
        """Drop what ``keep`` or ``lock_copy`` holds."""
        if self.is_on_disk:
            self.flat = None
        self.kept = None
        advise(self.stored.values(), needed=False)

    def page_lock(self, arena: Arena) -> None:
        """Move the stored tensors into page-locked memory of ``arena``; if it refuses, they stay where they are."""
        flat = arena.take(self.flat_bytes)
        if flat is not None:
            self.write_flat(flat)
            self.stored, self.flat = {**self.parts(flat)}, flat

    def place_weight(self, name: str, spec: QuantizationSpec | None, place: torch.device) -> None:
        """Move one weight to ``place``; with a ``spec``, quantise it first, on the device."""
        stored = self.stored[name]
        if spec is None:
            if isinstance(stored, torch.Tensor):
                self.stored[name] = stored.to(place)
            return
        del self.stored[name]
        self.specs[name] = spec
        for part, tensor in quantise(as_tensor(stored).to(self.device), spec).items():
            self.stored[f"{name}:{part}"] = tensor.to(place)
        advise([stored], needed=False)

    def move_to_disk(self) -> None:
        """Move the tensors that are in memory to disk."""
        in_memory = {key: stored for key, stored in self.stored.items() if isinstance(stored, torch.Tensor)}
        if in_memory:
            self.stored |= offload_to_disk(in_memory)

    def copy_to_device(self) -> dict[str, torch.Tensor]:
        """Copy the stored tensors to the device, without waiting for a GPU."""
        return {key: as_tensor(stored).to(self.device, non_blocking=True) for key, stored in self.stored.items()}

    def dequantise(self, copies: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights by name, in the model's precision, from ``copies`` of the stored tensors."""
        return {
            name: dequantise({part: copies[f"{name}:{part}"] for part in PARTS[spec.precision]}, spec)
            if (spec := self.specs.get(name))
            else copies[name]
            for name in self.names
        }


def as_tensor(stored: torch.Tensor | OnDisk) -> torch.Tensor:
    """Return a stored tensor, read from disk if need be."""
    return stored.read() if isinstance(stored, OnDisk) else stored


def _shape(stored: torch.Tensor | OnDisk) -> list[int]:
    """Return the shape of a stored tensor."""
    return list(stored.file.entries[stored.name]["shape"] if isinstance(stored, OnDisk) else stored.shape)


def _memory_bytes(stored: torch.Tensor | OnDisk) -> int:
    """Return the bytes of a stored tensor in the precision that it is read in."""
    return math.prod(_shape(stored)) * stored.dtype.itemsize


def advise(tensors: Iterable[torch.Tensor | OnDisk], needed: bool) -> None:
    """Advise the kernel to read those tensors ahead that are on disk, or to drop their pages."""
    for stored in tensors:
        if isinstance(stored, OnDisk):
            stored.file.advise([stored.name], needed)
