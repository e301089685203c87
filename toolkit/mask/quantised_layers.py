"""Which frozen linear layers of the adapted blocks are held in 8 or 4 bits. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.config.mask_schema import BasePrecision, LoraConfig
from toolkit.mask.adapters import Adapter, module_of
from toolkit.models.anatomy import Anatomy, TensorInfo
from toolkit.runtime.errors import MaskError


@dataclass(frozen=True)
class QuantisedLayers:
    """Linear layers whose frozen weights are held in one precision."""

    precision: Literal["int8", "nf4"]
    modules: tuple[str, ...]
    """Names of the layers, in the model's order."""

    @staticmethod
    def from_dict(values: dict[str, Any]) -> QuantisedLayers:
        """Restore it from its ``dataclasses.asdict``."""
        return QuantisedLayers(values["precision"], tuple(values["modules"]))


def resolve_quantised(
    entries: Sequence[tuple[LoraConfig, Adapter]], trained: Collection[str], anatomy: Anatomy
) -> tuple[QuantisedLayers, ...]:
    """Return the layers that ``base_precision`` quantises: those of the adapted blocks that train whole in no phase.

    They are the same in all phases, so that a run has one base model.

    Args:
        entries: the ``lora`` entries of all phases, each with the adapter that it resolved to.
        trained: names of the tensors that train in any phase.
        anatomy: parts and tensors of the model.

    Raises:
        MaskError: a block has entries with different precisions, or little of the blocks can be quantised.
    """
    precisions: dict[int, BasePrecision] = {}
    for entry, adapter in entries:
        for block in dict.fromkeys(anatomy.by_name[f"{module}.weight"].block for module in adapter.modules):
            assert block is not None  # adapters stand in blocks
            other = precisions.setdefault(block, entry.base_precision)
            if other != entry.base_precision:
                raise MaskError(
                    f"lora entries give block {block} base_precision {other} and {entry.base_precision}; all linear "
                    "layers of a block are held in one precision, in all phases: write the same in both"
                )
    quantised: list[QuantisedLayers] = []
    for precision in dict.fromkeys(precisions.values()):
        if precision != "model":
            blocks = {block for block in precisions if precisions[block] == precision}
            frozen = [
                t for t in anatomy.tensors if t.block in blocks and not {t.name, t.alias_of}.intersection(trained)
            ]
            layers = _quantisable(frozen, anatomy)
            _require_most(frozen, layers, precision)
            quantised.append(QuantisedLayers(precision, tuple(module_of(layer) for layer in layers)))
    return tuple(quantised)


def _quantisable(tensors: Sequence[TensorInfo], anatomy: Anatomy) -> list[TensorInfo]:
    """Return the weights of linear layers that no other part of the model shares."""
    shared = {alias.alias_of for alias in anatomy.tensors if alias.alias_of}
    return [t for t in tensors if t.linear and t.alias_of is None and t.name not in shared and t.parameters % 2 == 0]


def _require_most(frozen: Sequence[TensorInfo], layers: Sequence[TensorInfo], precision: str) -> None:
    """Raise MaskError if ``layers`` are less than half of the ``frozen`` parameters of the adapted blocks."""
    quantised, total = (sum(tensor.parameters for tensor in tensors) for tensors in (layers, frozen))
    if layers and 2 * quantised >= total:
        return
    chosen = {layer.name for layer in layers}
    rest = Counter[str]()
    for tensor in frozen:
        if tensor.name not in chosen:
            rest[".".join(tensor.name.rsplit(".", 2)[-2:])] += tensor.parameters
    names = ", ".join(f"{name} {size:,}" for name, size in rest.most_common(3)) or "nothing"
    raise MaskError(
        f"lora.base_precision: {precision} can quantise {quantised:,} of the {total:,} frozen parameters of the "
        f"adapted blocks; the rest is in {names}. It quantises linear layers that train whole in no phase, and no "
        "stacked experts: leave it out here"
    )
