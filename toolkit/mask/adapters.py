"""Low-rank adapters of a mask: the linear layers that get one, and the tensors that it trains. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from toolkit.config.mask_schema import LoraConfig, LoraInit
from toolkit.mask.rows import table_of_rows
from toolkit.mask.selectors import resolve_selectors
from toolkit.models.anatomy import Anatomy, TensorInfo
from toolkit.runtime.errors import MaskError


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters with the same settings, as peft makes them, one beside each of ``modules``."""

    modules: tuple[str, ...]
    """Names of the linear layers, in the model's order."""
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    init: LoraInit

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Adapter:
        """Restore an adapter from its ``dataclasses.asdict``."""
        return Adapter(**{**values, "modules": tuple(values["modules"])})

    def tensors(self, module: str, anatomy: Anatomy) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each tensor that trains beside one of ``modules``."""
        features = anatomy.by_name[f"{module}.weight"].linear
        assert features is not None
        inputs, outputs = features
        yield f"{module}.lora_A.default.weight", (self.rank, inputs)
        yield f"{module}.lora_B.default.weight", (outputs, self.rank)
        if self.dora:
            yield f"{module}.lora_magnitude_vector.default.weight", (outputs,)


def module_of(tensor: TensorInfo) -> str:
    """Return the name of the module that holds a tensor."""
    return tensor.name.rpartition(".")[0]


def adapted_weight(name: str) -> str:
    """Return the weight beside which a tensor of an adapter or of rows stands; the name of any other as it is."""
    module, is_adapter, _ = name.partition(".lora_")
    return f"{module}.weight" if is_adapter else table_of_rows(name)


def is_adapter_tensor(name: str) -> bool:
    """Return True for a tensor of an adapter, False for one of the base model."""
    return ".lora_" in name


def union_of_adapters(adapters: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """Return adapters beside all layers that any of ``adapters`` stands beside.

    Raises:
        MaskError: two of them give the same layer other settings.
    """
    settings: dict[str, Adapter] = {}
    for adapter in adapters:
        for module in adapter.modules:
            own = replace(adapter, modules=())
            if settings.setdefault(module, own) != own:
                raise MaskError(
                    f"mask.schedule gives {module} adapters with other settings in two phases; expected the same rank, "
                    "alpha, dropout, rslora, dora and init for a layer in all phases"
                )
    return tuple(
        replace(own, modules=tuple(module for module in settings if settings[module] == own))
        for own in dict.fromkeys(settings.values())
    )


def resolve_adapter(config: LoraConfig, frozen: frozenset[str], anatomy: Anatomy) -> Adapter:
    """Resolve a ``lora`` entry of the recipe: the linear layers that it adapts, with its settings.

    Args:
        config: the entry.
        frozen: tensors that ``mask.freeze`` keeps frozen, without adapters.
        anatomy: parts and tensors of the model.

    Raises:
        MaskError: a selector is invalid (see ``resolve_selectors``), there is no such layer, or no layer has the name
            that ``targets`` gives.
    """
    layers = _select_layers(config, frozen, anatomy)
    return Adapter(
        modules=tuple(module_of(layer) for layer in layers), rank=config.rank, alpha=config.alpha or 2 * config.rank,
        dropout=config.dropout, rslora=config.rslora, dora=config.dora, init=config.init,
    )  # fmt: skip


def _select_layers(config: LoraConfig, frozen: frozenset[str], anatomy: Anatomy) -> list[TensorInfo]:
    """Return the weights of the linear layers that ``resolve_adapter`` adapts."""
    selected: set[str] = set()
    for selector in config.select:
        tensors = [anatomy.by_name[name] for name in resolve_selectors([selector], anatomy)]
        adaptable = {tensor.name for tensor in tensors if tensor.linear and tensor.part == "block"}
        if not adaptable:
            raise MaskError(
                f"mask.train: lora.select has {selector!r}, among which no block has a linear layer; adapters stand "
                "beside the linear layers of blocks. Expected selectors such as last:8; the head trains whole, as an "
                "entry of its own"
            )
        selected |= adaptable
    linear = [tensor for tensor in anatomy.tensors if tensor.name in selected]
    shared = {alias.alias_of for alias in anatomy.tensors if alias.alias_of}
    if tied := [layer.name for layer in linear if layer.alias_of or layer.name in shared]:
        raise MaskError(
            f"mask.train: lora selects {tied[0]}, whose weight the model uses in several places; an adapter would "
            "stand in one of them. Leave its blocks out, or train it whole"
        )
    layers = [layer for layer in linear if layer.name not in frozen]
    if not layers:
        raise MaskError(f"mask.freeze takes away all {len(linear)} linear layers that lora selects; expected some left")
    if config.targets is None:
        return layers
    for target in config.targets:
        if not any(_is_target(layer, [target]) for layer in layers):
            names = sorted({module_of(layer).rpartition(".")[2] for layer in layers})
            near = difflib.get_close_matches(target.rpartition(".")[2], names, n=1)
            hint = f". Did you mean {near[0]}?" if near else ""
            raise MaskError(
                f"mask.train: lora.targets names {target!r}, and none of the {len(layers)} selected linear layers has "
                f"a name that ends so; expected some of {', '.join(names)}{hint}"
            )
    return [layer for layer in layers if _is_target(layer, config.targets)]


def _is_target(layer: TensorInfo, targets: list[str]) -> bool:
    """Return True if the name of a layer is one of ``targets``, or ends in one after a dot."""
    return any(f".{module_of(layer)}".endswith(f".{target}") for target in targets)
