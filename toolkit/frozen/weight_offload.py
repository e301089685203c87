"""Offload the frozen weights of the prefix, and load each block's for the moment it computes.

A block of the prefix holds no content: its parameters are on the meta device. A hook of accelerate's kind loads its
weights when it is entered, in the model's precision and on its device, and releases them when it is left. In between
they are kept on the device, on the host or on disk, as they are or quantised.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from toolkit.frozen.quantization import (
    PARTS,
    Precision,
    QuantizedWeight,
    check_quantisable,
    dequantise,
    quantisable,
    quantise,
)
from toolkit.models.disk_offload import OnDisk, offload_to_disk, to_meta

log = logging.getLogger("frostline")

Placement = Literal["device", "cpu", "disk"]
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class OffloadUnit:
    """A module that is loaded at once: a block, or an embedding table, whose look-up runs on the host."""

    module: str
    """Name in the model."""
    device: torch.device
    """Where it computes."""
    names: tuple[str, ...]
    """Of its parameters within the module."""
    is_block: bool


class FrozenWeights:
    """The weights that the prefix alone holds, on the device, the host or disk.

    They are taken out of ``model``; a tensor that anything else of it holds, or that trains, stays there.

    Args:
        model: the whole model, its mask applied, on the CPU; what is taken is on the meta device afterwards.
        blocks: names of the frozen blocks, in running order.
        tables: names of embedding tables that are to be offloaded too.
        device: where the blocks compute.
        on_disk: parameters that were not loaded.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[str], tables: Iterable[str], device: torch.device,
        on_disk: Mapping[str, OnDisk],
    ) -> None:  # fmt: skip
        blocks, tables = list(blocks), list(tables)
        names = {module: dict(model.get_submodule(module).named_parameters()) for module in (*tables, *blocks)}
        inside = {f"{module}.{name}" for module, own in names.items() for name in own}
        every = model.named_parameters(remove_duplicate=False)
        stays = {id(p) for name, p in every if name not in inside or p.requires_grad}
        taken = {module: tuple(name for name, p in own.items() if id(p) not in stays) for module, own in names.items()}
        self.device = device
        self.units = [
            OffloadUnit(module, _HOST if module in tables else device, own, module in blocks)
            for module, own in taken.items()
            if own
        ]
        self._stored: dict[str, torch.Tensor | OnDisk] = {}
        self._quantized: dict[str, QuantizedWeight] = {}
        self._prefetched: dict[str, tuple[dict[str, torch.Tensor], torch.cuda.Event]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for unit in self.units:
            for name in unit.names:
                full = f"{unit.module}.{name}"
                self._stored[full] = on_disk[full] if full in on_disk else model.get_parameter(full).detach()
        for full in self._stored:
            to_meta(model, full)

    def attach(self, copy: nn.Module) -> None:
        """Have the units of ``copy``, the prefix's own copy of the model, load their weights from here."""
        for unit, following in zip(self.units, [*self.units[1:], None], strict=True):
            module = copy.get_submodule(unit.module)
            for owner in module.modules():
                for name, buffer in owner.named_buffers(recurse=False):
                    owner._buffers[name] = buffer.to(unit.device)
            add_hook_to_module(module, _LoadHook(self, unit, following))

    def place_weights(self, copy: nn.Module, precision: Literal["model"] | Precision, placement: Placement) -> None:
        """Quantise all weights and move them to where they are kept from now on, one unit at a time.

        Raises:
            ModelError: too little of the blocks can be quantised, or the disk.
        """
        if precision != "model":
            blocks = [copy.get_submodule(unit.module) for unit in self.units if unit.is_block]
            log.info("%s", check_quantisable(blocks, precision))
        for unit in self.units:
            quantized: dict[str, QuantizedWeight] = {}
            if precision != "model" and unit.is_block:
                quantized = quantisable(copy.get_submodule(unit.module), precision)
            place = unit.device if placement == "device" else _HOST
            for name in unit.names:
                self._store(f"{unit.module}.{name}", quantized.get(name), unit.device, place)
            if placement == "disk":
                self._offload(unit)
        log.info("%s", self.summary())

    def _store(
        self, full: str, quantized_as: QuantizedWeight | None, device: torch.device, place: torch.device
    ) -> None:
        stored = self._stored[full]
        if quantized_as is None:
            if isinstance(stored, torch.Tensor):
                self._stored[full] = stored.to(place)
            return
        del self._stored[full]
        self._quantized[full] = quantized_as
        for part, tensor in quantise(_read(stored).to(device), quantized_as).items():
            self._stored[f"{full}:{part}"] = tensor.to(place)
        _drop_pages([stored])

    def _offload(self, unit: OffloadUnit) -> None:
        loaded = {key: tensor for key in self._keys(unit) if isinstance(tensor := self._stored[key], torch.Tensor)}
        if loaded:
            self._stored.update(offload_to_disk(loaded))

    def _keys(self, unit: OffloadUnit) -> list[str]:
        """Return the keys of what is stored for a unit: whole tensors, or the parts of quantised ones."""
        keys = []
        for full in (f"{unit.module}.{name}" for name in unit.names):
            quantized_as = self._quantized.get(full)
            keys += [f"{full}:{part}" for part in PARTS[quantized_as.precision]] if quantized_as else [full]
        return keys

    def load(self, unit: OffloadUnit) -> dict[str, torch.Tensor]:
        """Return the unit's weights by name, in the model's precision, where it computes."""
        here = self._take_prefetched(unit) or self._send(unit)
        return {name: self._weight(f"{unit.module}.{name}", here) for name in unit.names}

    def _weight(self, full: str, here: Mapping[str, torch.Tensor]) -> torch.Tensor:
        quantized_as = self._quantized.get(full)
        if quantized_as is None:
            return here[full]
        return dequantise({part: here[f"{full}:{part}"] for part in PARTS[quantized_as.precision]}, quantized_as)

    def _send(self, unit: OffloadUnit) -> dict[str, torch.Tensor]:
        return {key: _read(self._stored[key]).to(unit.device, non_blocking=True) for key in self._keys(unit)}

    def _take_prefetched(self, unit: OffloadUnit) -> dict[str, torch.Tensor] | None:
        """Return what was prefetched, once the device's computing stream has been told to wait for it."""
        sent = self._prefetched.pop(unit.module, None)
        if sent is None:
            return None
        tensors, event = sent
        stream = torch.cuda.current_stream(unit.device)
        stream.wait_event(event)
        for tensor in tensors.values():
            tensor.record_stream(stream)
        return tensors

    def release(self, unit: OffloadUnit, following: OffloadUnit | None) -> None:
        """Drop pages that were read for ``unit``, which is done, and prefetch the weights of the next one.

        On a GPU the next block is copied while this one still computes; two blocks' weights are there then.
        """
        _drop_pages([self._stored[key] for key in self._keys(unit)])
        if following is None:
            return
        for key in self._keys(following):
            if isinstance(stored := self._stored[key], OnDisk):
                stored.file.advise([stored.name], needed=True)
        away = any(_device(self._stored[key]) != following.device for key in self._keys(following))
        if self._stream is not None and away:
            with torch.cuda.stream(self._stream):
                tensors = self._send(following)
            self._prefetched[following.module] = tensors, self._stream.record_event()

    def nbytes(self) -> dict[Placement, int]:
        """Return the bytes that are stored at each place."""
        found: Counter[Placement] = Counter()
        for stored in self._stored.values():
            if isinstance(stored, OnDisk):
                found["disk"] += stored.nbytes
            else:
                place: Placement = "cpu" if stored.device.type == "cpu" and self._stream is not None else "device"
                found[place] += stored.nbytes
        return dict(found)

    def summary(self) -> str:
        """Return where the weights are, as a sentence for the log."""
        places: dict[Placement, str] = {"device": "on the device", "cpu": "on the host", "disk": "on disk"}
        sizes = [f"{size / 2**20:,.1f} MiB {places[place]}" for place, size in self.nbytes().items()]
        return f"prefix weights: {', '.join(sizes)}; a block has its own only while it computes"


class _LoadHook(ModelHook):  # type: ignore[misc]
    """Fills a module's parameters when it is entered and empties them when it is left."""

    def __init__(self, weights: FrozenWeights, unit: OffloadUnit, following: OffloadUnit | None) -> None:
        self._weights, self._unit, self._following = weights, unit, following
        self._empty: dict[str, nn.Parameter] = {}

    def init_hook(self, module: nn.Module) -> nn.Module:
        self._empty = {name: module.get_parameter(name) for name in self._unit.names}
        if not self._unit.is_block:  # Llama 4 sends the ids to where the table says it is: let that be the device
            for name, empty in self._empty.items():
                nothing = torch.zeros((), dtype=empty.dtype, device=self._weights.device).expand(empty.shape)
                self._empty[name] = nn.Parameter(nothing, requires_grad=False)
                _set(module, name, self._empty[name])
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for name, weight in self._weights.load(self._unit).items():
            _set(module, name, nn.Parameter(weight, requires_grad=False))
        if not self._unit.is_block:
            return send_to_device(args, _HOST), send_to_device(kwargs, _HOST)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for name, empty in self._empty.items():
            _set(module, name, empty)
        self._weights.release(self._unit, self._following)
        return output if self._unit.is_block else send_to_device(output, self._weights.device)


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


def _read(stored: torch.Tensor | OnDisk) -> torch.Tensor:
    return stored.read() if isinstance(stored, OnDisk) else stored


def _device(stored: torch.Tensor | OnDisk) -> torch.device:
    return _HOST if isinstance(stored, OnDisk) else stored.device


def _drop_pages(everything: Iterable[torch.Tensor | OnDisk]) -> None:
    """Tell the kernel that pages of tensors on disk are no longer needed."""
    for stored in everything:
        if isinstance(stored, OnDisk):
            stored.file.advise([stored.name], needed=False)
