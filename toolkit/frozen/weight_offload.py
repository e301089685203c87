"""Offload the frozen weights of the prefix, and load each block's while it computes.

Between uses, the parameters of a prefix block are on the meta device. A hook of accelerate's kind loads its weights
when it is entered, in the model's precision and on its device, and releases them when it is left. Until then they are
on the device, on the host or on disk, as they are or quantised.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from toolkit.models.disk_offload import OnDisk, offload_to_disk, to_meta
from toolkit.models.quantization import (
    PARTS,
    Precision,
    QuantizationSpec,
    check_quantisable,
    dequantise,
    quantisable,
    quantise,
)

log = logging.getLogger("frostline")

Placement = Literal["device", "cpu", "disk"]
_HOST = torch.device("cpu")


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
    prefetched: tuple[dict[str, torch.Tensor], torch.cuda.Event] | None = None
    """Copies of ``stored`` on the device, and the event after which they are complete."""

    def place_weight(self, name: str, spec: QuantizationSpec | None, place: torch.device) -> None:
        """Move one weight to ``place``; with a ``spec``, quantise it first, on the device."""
        stored = self.stored[name]
        if spec is None:
            if isinstance(stored, torch.Tensor):
                self.stored[name] = stored.to(place)
            return
        del self.stored[name]
        self.specs[name] = spec
        for part, tensor in quantise(_as_tensor(stored).to(self.device), spec).items():
            self.stored[f"{name}:{part}"] = tensor.to(place)
        _advise([stored], needed=False)

    def move_to_disk(self) -> None:
        """Move the tensors that are in memory to disk."""
        in_memory = {key: stored for key, stored in self.stored.items() if isinstance(stored, torch.Tensor)}
        if in_memory:
            self.stored |= offload_to_disk(in_memory)

    def copy_to_device(self) -> dict[str, torch.Tensor]:
        """Copy the stored tensors to the device, without waiting for a GPU."""
        return {key: _as_tensor(stored).to(self.device, non_blocking=True) for key, stored in self.stored.items()}

    def dequantise(self, copies: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights by name, in the model's precision, from ``copies`` of the stored tensors."""
        return {
            name: dequantise({part: copies[f"{name}:{part}"] for part in PARTS[spec.precision]}, spec)
            if (spec := self.specs.get(name))
            else copies[name]
            for name in self.names
        }


class FrozenWeights:
    """Holds the offloaded weights of the prefix, on the device, the host or disk.

    They are moved out of ``model``, which is on the CPU with its mask applied, and leave parameters on the meta device;
    tensors that train or that other modules share stay. ``blocks`` names the frozen blocks in running order,
    ``embeddings`` the embedding tables to offload too, ``device`` where the blocks compute, and ``on_disk`` holds the
    parameters that were left on disk when ``model`` was loaded, by name.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], embeddings: Sequence[str], device: torch.device,
        on_disk: Mapping[str, OnDisk],
    ) -> None:  # fmt: skip
        modules = {module: dict(model.get_submodule(module).named_parameters()) for module in (*embeddings, *blocks)}
        inside = {f"{module}.{name}" for module, parameters in modules.items() for name in parameters}
        named = model.named_parameters(remove_duplicate=False)
        kept = {id(p) for name, p in named if name not in inside or p.requires_grad}
        self.device = device
        self.units: list[OffloadUnit] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for module, parameters in modules.items():
            stored = {
                name: on_disk.get(f"{module}.{name}", p.detach()) for name, p in parameters.items() if id(p) not in kept
            }
            if stored:
                unit_device = device if module in blocks else _HOST
                self.units.append(OffloadUnit(module, module in blocks, unit_device, tuple(stored), stored))
        for unit in self.units:
            for name in unit.names:
                to_meta(model, f"{unit.module}.{name}")

    def attach(self, copy: nn.Module) -> None:
        """Hook the units of ``copy``, the prefix's copy of the model, so that they load their weights from here."""
        for unit, following in zip(self.units, [*self.units[1:], None], strict=True):
            module = copy.get_submodule(unit.module)
            for submodule in module.modules():
                for name, buffer in submodule.named_buffers(recurse=False):
                    submodule._buffers[name] = buffer.to(unit.device)
            add_hook_to_module(module, _LoadHook(self, unit, following))

    def place_weights(self, copy: nn.Module, precision: Literal["model"] | Precision, placement: Placement) -> None:
        """Quantise the weights unless ``precision`` is ``model``, and move them to ``placement``, unit by unit.

        ``copy`` is the prefix's copy of the model.

        Raises:
            ModelError: too little of the blocks can be quantised, or the disk is full or refuses.
        """
        if precision != "model":
            blocks = [copy.get_submodule(unit.module) for unit in self.units if unit.is_block]
            log.info("%s", check_quantisable(blocks, precision))
        for unit in self.units:
            specs: dict[str, QuantizationSpec] = {}
            if precision != "model" and unit.is_block:
                specs = quantisable(copy.get_submodule(unit.module), precision)
            place = unit.device if placement == "device" else _HOST
            for name in unit.names:
                unit.place_weight(name, specs.get(name), place)
            if placement == "disk":
                unit.move_to_disk()
        texts: dict[Placement, str] = {"device": "on the device", "cpu": "on the host", "disk": "on disk"}
        sizes = ", ".join(f"{size / 2**20:,.1f} MiB {texts[place]}" for place, size in self.nbytes().items())
        log.info("prefix weights: %s; a block has its own only while it computes", sizes)

    def load(self, unit: OffloadUnit) -> dict[str, torch.Tensor]:
        """Return the unit's weights by parameter name, in the model's precision, on the unit's device."""
        if unit.prefetched is None:
            return unit.dequantise(unit.copy_to_device())
        copies, event = unit.prefetched
        unit.prefetched = None
        stream = torch.cuda.current_stream(unit.device)
        stream.wait_event(event)
        for tensor in copies.values():
            tensor.record_stream(stream)  # so that its memory is not reused before this stream is done with it
        return unit.dequantise(copies)

    def release(self, unit: OffloadUnit, following: OffloadUnit | None) -> None:
        """Drop the file pages of ``unit``, whose module has run, and prefetch the weights of the next one.

        On a GPU, the next block's are copied while this one's kernels still run; it then holds both.
        """
        _advise(unit.stored.values(), needed=False)
        if following is None:
            return
        _advise(following.stored.values(), needed=True)
        places = {_HOST if isinstance(stored, OnDisk) else stored.device for stored in following.stored.values()}
        if self._stream is not None and places != {following.device}:
            with torch.cuda.stream(self._stream):
                copies = following.copy_to_device()
            following.prefetched = copies, self._stream.record_event()

    def nbytes(self) -> dict[Placement, int]:
        """Return the bytes that are stored at each placement."""
        sizes: Counter[Placement] = Counter()
        for stored in (stored for unit in self.units for stored in unit.stored.values()):
            if isinstance(stored, OnDisk):
                sizes["disk"] += stored.nbytes
            else:
                place: Placement = "cpu" if stored.device.type == "cpu" and self._stream is not None else "device"
                sizes[place] += stored.nbytes
        return dict(sizes)


class _LoadHook(ModelHook):  # type: ignore[misc]
    """Loads a unit's weights into its module before forward, and takes them out again afterwards."""

    def __init__(self, weights: FrozenWeights, unit: OffloadUnit, following: OffloadUnit | None) -> None:
        self._weights, self._unit, self._following = weights, unit, following
        self._empty: dict[str, nn.Parameter] = {}

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Keep the module's empty parameters, to take the place of the weights between uses."""
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
    """Return a stored tensor, read from disk if need be."""
    return stored.read() if isinstance(stored, OnDisk) else stored


def _advise(tensors: Iterable[torch.Tensor | OnDisk], needed: bool) -> None:
    """Advise the kernel to read those tensors ahead that are on disk, or to drop their pages."""
    for stored in tensors:
        if isinstance(stored, OnDisk):
            stored.file.advise([stored.name], needed)
