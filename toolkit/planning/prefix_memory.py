"""Count the bytes of the prefix's weights on the device, on the host and on disk, stored as the recipe asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from toolkit.config.schema import PrefixConfig
from toolkit.frozen.quantization import check_quantisable, quantisable, quantised_bytes
from toolkit.models.anatomy import Anatomy
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix


@dataclass(frozen=True)
class PrefixMemory:
    """Hold the bytes of the weights that the prefix alone has."""

    device: int
    """On the device for good."""
    streamed: int
    """Beside that while the prefix computes: a block in the model's precision, or two where blocks are streamed."""
    offloaded: int
    """On the host or on disk."""


def frozen_bytes(
    prefix: Prefix | None, suffix: Suffix, anatomy: Anatomy, boundary: int, config: PrefixConfig
) -> PrefixMemory:
    """Count the bytes of a prefix of the meta device.

    Args:
        prefix: the lower half, with its own parameters; None where there is none.
        suffix: the upper half; what it holds too is not counted.
        anatomy: the parts of the model.
        boundary: number of frozen blocks.
        config: how the weights are kept.

    Raises:
        ModelError: they are to be quantised, and less than half of the blocks can be.
    """
    if prefix is None:
        return PrefixMemory(0, 0, 0)
    above = {p.untyped_storage()._cdata for p in suffix.parameters()}
    own = _own_bytes(prefix.model, above)
    if (config.precision, config.placement) == ("model", "device") or boundary == 0:
        return PrefixMemory(own, 0, 0)
    blocks = [prefix.model.get_submodule(f"{anatomy.blocks}.{index}") for index in range(boundary)]
    if config.precision != "model":
        check_quantisable(blocks, config.precision)
    whole = [_own_bytes(block, above) for block in blocks]
    stored = [_stored(block, size, config.precision) for block, size in zip(blocks, whole, strict=True)]
    if config.placement == "device":
        return PrefixMemory(own - sum(whole) + sum(stored), max(whole), 0)
    tables = sum(_own_bytes(prefix.model.get_submodule(name), above) for name in anatomy.embeddings)
    arriving = [left + right for left, right in zip(whole, [*stored[1:], 0], strict=True)]
    return PrefixMemory(own - sum(whole) - tables, max(arriving), sum(stored) + tables)


def _own_bytes(module: nn.Module, above: set[int]) -> int:
    """Return the bytes of a module's storages, those of ``above`` left out."""
    storages = {p.untyped_storage()._cdata: p.nbytes for p in module.parameters()}
    return sum(size for storage, size in storages.items() if storage not in above)


def _stored(block: nn.Module, whole: int, precision: Literal["model", "int8", "nf4"]) -> int:
    """Return the bytes of a block of ``whole`` bytes after quantising."""
    if precision == "model":
        return whole
    saved = 0
    for name, form in quantisable(block, precision).items():
        saved += block.get_parameter(name).nbytes - quantised_bytes(form)
    return whole - saved
