"""Gather ZeRO-3's partitioned parameters for a while."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn


def gathered(held: nn.Module | nn.Parameter) -> AbstractContextManager[object]:
    """Make parameters whole on every rank while entered; every rank enters it. At other stages they always are."""
    import deepspeed

    parameters = list(held.parameters()) if isinstance(held, nn.Module) else [held]
    whole: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(parameters)
    return whole


def gathered_bytes(module: nn.Module) -> int:
    """Return the bytes that ``gathered`` takes on this rank."""
    return sum(int(p.ds_numel) * p.element_size() for p in module.parameters() if hasattr(p, "ds_numel"))


def drain_prefetches(engine: Any) -> None:
    """Wait for what ZeRO-3 has prefetched, and partition it again.

    After forward passes alone, as in a validation, some of it is left, and DeepSpeed 0.19 refuses to partition a
    parameter that is in flight.
    """
    engine.empty_partition_cache()
