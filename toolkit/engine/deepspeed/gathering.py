"""Gather ZeRO-3's partitioned parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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


@contextmanager
def balanced_module_stack() -> Iterator[None]:
    """Drop what a forward pass leaves on ZeRO-3's stack of running modules.

    Each module's pre-forward hook pushes, its post-forward hook pops, and the latter does not run where a pass of the
    suffix leaves a module by an exception (FWD_MODULE_STACK in parameter_offload.py, DeepSpeed 0.19).
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    try:
        yield
    finally:
        del FWD_MODULE_STACK[depth:]
