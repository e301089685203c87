"""Count the bytes of the prefix's weights on the device, on the host and on disk, stored as the recipe asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from toolkit.config.schema import PrefixConfig
from toolkit.models.anatomy import Anatomy
from toolkit.models.quantised_linear import quantised_layer_bytes
from toolkit.models.quantization import check_quantisable, quantisable, quantised_bytes
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix


@dataclass(frozen=True)
class PrefixMemory:
    """Bytes of the weights that only the prefix holds, by place."""

    device: int
    """Bytes on the device permanently."""
    streamed: int
    """Additional bytes on the device while the prefix computes: one block, or also two buffers if they are streamed."""
    offloaded: int
    """Bytes on the host or on disk."""


def prefix_memory(
    prefix: Prefix | None, suffix: Suffix, anatomy: Anatomy, boundary: int, config: PrefixConfig
) -> PrefixMemory:
    """Return the bytes of a prefix on the meta device, stored as the recipe asks.

    Args:
        prefix: prefix of a meta model; None if the model has no frozen prefix.
        suffix: suffix of the same model; weights that it shares are not counted.
        anatomy: parts of the model.
        boundary: number of frozen blocks.
        config: the recipe's prefix section.

    Raises:
        ModelError: the recipe quantises the weights, and less than half of the blocks' weights can be quantised.
    """
    if prefix is None:
        return PrefixMemory(0, 0, 0)
    shared = {p.untyped_storage()._cdata for p in suffix.parameters()}

    def own_bytes(module: nn.Module) -> int:
        storages = {p.untyped_storage()._cdata: p.nbytes for p in module.parameters()}
        own = sum(size for storage, size in storages.items() if storage not in shared)
        return own + quantised_layer_bytes(module)  # of adapted blocks that are below the frost line in this phase

    own = own_bytes(prefix.model)
    if (config.precision, config.placement) == ("model", "device") or boundary == 0:
        return PrefixMemory(own, 0, 0)
    blocks = [prefix.model.get_submodule(f"{anatomy.blocks}.{index}") for index in range(boundary)]
    whole = [own_bytes(block) for block in blocks]
    stored = whole
    if config.precision != "model":
        check_quantisable(blocks, config.precision)
        stored = [size - _saved_bytes(block, config.precision) for block, size in zip(blocks, whole, strict=True)]
    if config.placement == "device":
        return PrefixMemory(own - sum(whole) + sum(stored), max(whole), 0)
    embeddings = sum(own_bytes(prefix.model.get_submodule(name)) for name in anatomy.embeddings)
    # a block computes from one of two buffers, or from its restored weights, while the next is copied into the other
    streamed = 2 * max(stored) + (max(whole) if config.precision != "model" else 0)
    return PrefixMemory(own - sum(whole) - embeddings, streamed, sum(stored) + embeddings)


def _saved_bytes(block: nn.Module, precision: Literal["int8", "nf4"]) -> int:
    """Return the bytes that quantisation takes off a block."""
    specs = quantisable(block, precision).items()
    return sum(block.get_parameter(name).nbytes - quantised_bytes(spec) for name, spec in specs)
