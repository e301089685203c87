"""Gather ZeRO-3's partitioned parameters temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn


def gathered(target: nn.Module | nn.Parameter) -> AbstractContextManager[object]:
    """Return a context in which parameters are gathered on every rank; every rank enters it.

    Below ZeRO-3, where parameters are never partitioned, it does nothing. Writes to the parameters within the context
    are discarded (``modifier_rank`` is None).
    """
    import deepspeed

    parameters = list(target.parameters()) if isinstance(target, nn.Module) else [target]
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(parameters)
    return context


def drain_prefetches(engine: Any) -> None:
    """Wait for the parameters that ZeRO-3 has prefetched, and partition them again.

    Forward passes without backward, as in a validation, leave some of them in flight, and DeepSpeed 0.19 refuses to
    partition such a parameter.
    """
    engine.empty_partition_cache()


@contextmanager
def balanced_module_stack() -> Iterator[None]:
    """Restore the depth of ZeRO-3's stack of running modules after a forward pass.

    Each module's pre-forward hook pushes and its post-forward hook pops, but the latter does not run if the suffix
    leaves a module early by an exception (FWD_MODULE_STACK in parameter_offload.py, DeepSpeed 0.19).
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    try:
        yield
    finally:
        del FWD_MODULE_STACK[depth:]
