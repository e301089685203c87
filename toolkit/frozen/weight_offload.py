"""Offload the frozen weights of the prefix, and load each block's while it computes.

Between uses, the parameters of a prefix block are on the meta device. A hook of accelerate's kind loads its
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
    """A module whose weights are loaded together: a block, or an embedding table, whose look-up runs on the host."""

    module: str
    """Name of the module in the model."""
    device: torch.device
    """Device that it computes on."""
    names: tuple[str, ...]
    """Names, within the module, of its offloaded parameters."""
    is_block: bool


class FrozenWeights:
    """Holds the offloaded weights of the prefix, on the device, the host or disk.

    They are moved out of ``model``, but for tensors that train or that other modules share.

    Args:
        model: the whole model with its mask applied, on the CPU; offloaded parameters are moved to the meta device.
        blocks: names of the frozen blocks, in running order.
        tables: names of embedding tables to offload too.
        device: device that the blocks compute on.
        on_disk: parameters that were left on disk when ``model`` was loaded, by name.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[str], tables: Iterable[str], device: torch.device,
        on_disk: Mapping[str, OnDisk],
    ) -> None:  # fmt: skip
        blocks, tables = list(blocks), list(tables)
        names = {module: dict(model.get_submodule(module).named_parameters()) for module in (*tables, *blocks)}
        inside = {f"{module}.{name}" for module, parameters in names.items() for name in parameters}
        named = model.named_parameters(remove_duplicate=False)
        kept = {id(p) for name, p in named if name not in inside or p.requires_grad}
        offloaded = {
            module: tuple(name for name, p in parameters.items() if id(p) not in kept)
            for module, parameters in names.items()
        }
        self.device = device
        self.units = [
            OffloadUnit(module, _HOST if module in tables else device, parameters, module in blocks)
            for module, parameters in offloaded.items()
            if parameters
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
        """Hook the units of ``copy``, the prefix's copy of the model, so that they load their weights from here."""
        for unit, following in zip(self.units, [*self.units[1:], None], strict=True):
            module = copy.get_submodule(unit.module)
            for submodule in module.modules():
                for name, buffer in submodule.named_buffers(recurse=False):
                    submodule._buffers[name] = buffer.to(unit.device)
            add_hook_to_module(module, _LoadHook(self, unit, following))

    def place_weights(self, copy: nn.Module, precision: Literal["model"] | Precision, placement: Placement) -> None:
        """Quantise the weights if asked to, and move them to where they are kept from now on, one unit at a time.

        Args:
            copy: the prefix's copy of the model.
            precision: precision to store them in; ``model`` keeps the model's.
            placement: where to keep them.

        Raises:
            ModelError: too little of the blocks can be quantised, or the disk is full or refuses.
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
                self._place_parameter(f"{unit.module}.{name}", quantized.get(name), unit.device, place)
            if placement == "disk":
                self._move_to_disk(unit)
        log.info("%s", self.summary())

    def _place_parameter(
        self, full: str, quantized_as: QuantizedWeight | None, device: torch.device, place: torch.device
    ) -> None:
        """Move one parameter to ``place``, quantised on ``device`` first if ``quantized_as`` says how."""
        stored = self._stored[full]
        if quantized_as is None:
            if isinstance(stored, torch.Tensor):
                self._stored[full] = stored.to(place)
            return
        del self._stored[full]
        self._quantized[full] = quantized_as
        for part, tensor in quantise(_as_tensor(stored).to(device), quantized_as).items():
            self._stored[f"{full}:{part}"] = tensor.to(place)
        _drop_pages([stored])

    def _move_to_disk(self, unit: OffloadUnit) -> None:
        """Move a unit's weights that are in memory to disk."""
        loaded = {
            key: tensor for key in self._stored_keys(unit) if isinstance(tensor := self._stored[key], torch.Tensor)
        }
        if loaded:
            self._stored.update(offload_to_disk(loaded))

    def _stored_keys(self, unit: OffloadUnit) -> list[str]:
        """Return the keys, in ``_stored``, of a unit's tensors: whole weights, or the parts of quantised ones."""
        keys = []
        for full in (f"{unit.module}.{name}" for name in unit.names):
            quantized_as = self._quantized.get(full)
            keys += [f"{full}:{part}" for part in PARTS[quantized_as.precision]] if quantized_as else [full]
        return keys

    def load(self, unit: OffloadUnit) -> dict[str, torch.Tensor]:
        """Return the unit's weights by parameter name, in the model's precision, on the unit's device."""
        loaded = self._take_prefetched(unit) or self._copy_to_device(unit)
        return {name: self._assemble_weight(f"{unit.module}.{name}", loaded) for name in unit.names}

    def _assemble_weight(self, full: str, loaded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return one weight of a unit whose stored tensors are on its device, dequantised if need be."""
        quantized_as = self._quantized.get(full)
        if quantized_as is None:
            return loaded[full]
        return dequantise({part: loaded[f"{full}:{part}"] for part in PARTS[quantized_as.precision]}, quantized_as)

    def _copy_to_device(self, unit: OffloadUnit) -> dict[str, torch.Tensor]:
        """Copy a unit's stored tensors to its device, without waiting for a GPU."""
        return {
            key: _as_tensor(self._stored[key]).to(unit.device, non_blocking=True) for key in self._stored_keys(unit)
        }

    def _take_prefetched(self, unit: OffloadUnit) -> dict[str, torch.Tensor] | None:
        """Return the unit's prefetched tensors; None if there are none.

        The current stream waits for their copy, and the allocator keeps their memory until that stream is done with it.
        """
        prefetched = self._prefetched.pop(unit.module, None)
        if prefetched is None:
            return None
        tensors, event = prefetched
        stream = torch.cuda.current_stream(unit.device)
        stream.wait_event(event)
        for tensor in tensors.values():
            tensor.record_stream(stream)
        return tensors

    def release(self, unit: OffloadUnit, following: OffloadUnit | None) -> None:
        """Drop the file pages of ``unit``, whose module has run, and prefetch the weights of the next one.

        On a GPU, the next block's are copied while this one's kernels still run; it then holds both.
        """
        _drop_pages([self._stored[key] for key in self._stored_keys(unit)])
        if following is None:
            return
        for key in self._stored_keys(following):
            if isinstance(stored := self._stored[key], OnDisk):
                stored.file.advise([stored.name], needed=True)
        must_copy = any(_device_of(self._stored[key]) != following.device for key in self._stored_keys(following))
        if self._stream is not None and must_copy:
            with torch.cuda.stream(self._stream):
                tensors = self._copy_to_device(following)
            self._prefetched[following.module] = tensors, self._stream.record_event()

    def nbytes(self) -> dict[Placement, int]:
        """Return the bytes that are stored at each placement."""
        found: Counter[Placement] = Counter()
        for stored in self._stored.values():
            if isinstance(stored, OnDisk):
                found["disk"] += stored.nbytes
            else:
                place: Placement = "cpu" if stored.device.type == "cpu" and self._stream is not None else "device"
                found[place] += stored.nbytes
        return dict(found)

    def summary(self) -> str:
        """Describe where the weights are kept, as a sentence for the log."""
        places: dict[Placement, str] = {"device": "on the device", "cpu": "on the host", "disk": "on disk"}
        sizes = [f"{size / 2**20:,.1f} MiB {places[place]}" for place, size in self.nbytes().items()]
        return f"prefix weights: {', '.join(sizes)}; a block has its own only while it computes"


class _LoadHook(ModelHook):  # type: ignore[misc]
    """Loads a unit's weights into its module before forward, and takes them out again afterwards."""

    def __init__(self, weights: FrozenWeights, unit: OffloadUnit, following: OffloadUnit | None) -> None:
        self._weights, self._unit, self._following = weights, unit, following
        self._empty: dict[str, nn.Parameter] = {}

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Remember the module's empty parameters, which stand in for the weights between uses."""
        self._empty = {name: module.get_parameter(name) for name in self._unit.names}
        if not self._unit.is_block:  # Llama 4 moves the ids to the table's device: let that be ours, not meta
            for name, empty in self._empty.items():
                placeholder = torch.zeros((), dtype=empty.dtype, device=self._weights.device).expand(empty.shape)
                self._empty[name] = nn.Parameter(placeholder, requires_grad=False)
                _set_parameter(module, name, self._empty[name])
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Load the weights; the arguments of an embedding table go to the host, where it computes."""
        for name, weight in self._weights.load(self._unit).items():
            _set_parameter(module, name, nn.Parameter(weight, requires_grad=False))
        if not self._unit.is_block:
            return send_to_device(args, _HOST), send_to_device(kwargs, _HOST)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Put the empty parameters back; the output of an embedding table goes to the device."""
        for name, empty in self._empty.items():
            _set_parameter(module, name, empty)
        self._weights.release(self._unit, self._following)
        return output if self._unit.is_block else send_to_device(output, self._weights.device)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter of ``module`` by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._parameters[leaf] = parameter


def _as_tensor(stored: torch.Tensor | OnDisk) -> torch.Tensor:
    """Return a stored tensor, read from disk if it is there."""
    return stored.read() if isinstance(stored, OnDisk) else stored


def _device_of(stored: torch.Tensor | OnDisk) -> torch.device:
    """Return the device of a stored tensor; that of one on disk is the host."""
    return _HOST if isinstance(stored, OnDisk) else stored.device


def _drop_pages(tensors: Iterable[torch.Tensor | OnDisk]) -> None:
    """Tell the kernel that pages of tensors on disk are no longer needed."""
    for stored in tensors:
        if isinstance(stored, OnDisk):
            stored.file.advise([stored.name], needed=False)
