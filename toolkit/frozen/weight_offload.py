"""Offload the frozen weights of the prefix, and load each block's while it computes.

Between uses, the parameters of a prefix block are on the meta device. A hook of accelerate's kind loads its weights
when it is entered, in the model's precision and on its device, and releases them when it is left. Until then they are
on the device, on the host or on disk, as they are or quantised.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from toolkit.frozen.block_stream import block_stream
from toolkit.frozen.offload_unit import HOST, OffloadUnit, advise
from toolkit.models.disk_offload import OnDisk, to_meta
from toolkit.models.quantization import Precision, QuantizationSpec, check_quantisable, quantisable
from toolkit.runtime.page_locked import Arena, aligned

log = logging.getLogger("frostline")

Placement = Literal["device", "cpu", "disk"]


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
        self.units = units = list[OffloadUnit]()
        self._stream = block_stream(device, lambda: max(unit.flat_bytes for unit in units if unit.is_on_host))
        for module, parameters in modules.items():
            stored = {
                name: on_disk.get(f"{module}.{name}", p.detach()) for name, p in parameters.items() if id(p) not in kept
            }
            if stored:
                unit_device = device if module in blocks else HOST
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
            place = unit.device if placement == "device" else HOST
            for name in unit.names:
                unit.place_weight(name, specs.get(name), place)
            if placement == "disk":
                unit.move_to_disk()
        if self._stream is not None:
            self._stream.free_staging()
            if placement == "cpu":
                self._page_lock()
        texts: dict[Placement, str] = {"device": "on the device", "cpu": "on the host", "disk": "on disk"}
        sizes = ", ".join(f"{size / 2**20:,.1f} MiB {texts[place]}" for place, size in self.nbytes().items())
        log.info("prefix weights: %s; a block has its own only while it computes", sizes)

    def load(self, unit: OffloadUnit, following: OffloadUnit | None) -> dict[str, torch.Tensor]:
        """Return the unit's weights by parameter name, in the model's precision, on the unit's device.

        On a GPU the next block's are copied meanwhile; it then holds both.
        """
        if unit.kept is not None:
            return unit.kept
        if self._stream is None:
            return unit.dequantise(unit.copy_to_device())
        streamed = unit.parts(self._stream.take(unit)) if unit.is_on_host else unit.copy_to_device()
        if following is not None and following.is_on_host and following.kept is None:
            self._stream.start(following)
        return unit.dequantise(streamed)

    def release(self, unit: OffloadUnit, following: OffloadUnit | None) -> None:
        """End the use of the weights of ``unit``, whose module has run; read those of the next one from its files."""
        if unit.kept is not None:
            return
        if self._stream is None:
            advise(unit.stored.values(), needed=False)
            if following is not None:
                advise(following.stored.values(), needed=True)
            return
        if unit.is_on_host:
            self._stream.release()
        if following is None:
            self._stream.end()

    @property
    def is_streamed(self) -> bool:
        """Return whether the device is a GPU, to which weights on the host or on disk are copied for each pass."""
        return self._stream is not None

    def forget(self) -> None:
        """Drop what was held in memory for many passes; the weights stay where ``place_weights`` put them."""
        for unit in self.units:
            unit.forget()
        if self._stream is not None:
            self._stream.end()

    def _page_lock(self) -> None:
        """Move the blocks that are on the host into page-locked memory, as far as it is to be had."""
        blocks = [unit for unit in self.units if unit.is_on_host]
        arena = Arena(sum(aligned(unit.flat_bytes) for unit in blocks))
        for unit in blocks:
            unit.page_lock(arena)

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
        for name, weight in self._weights.load(self._unit, self._following).items():
            _set_parameter(module, name, nn.Parameter(weight, requires_grad=False))
        if not self._unit.is_block:
            return send_to_device(args, HOST), send_to_device(kwargs, HOST)
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
