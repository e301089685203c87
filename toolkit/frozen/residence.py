"""Keep offloaded weights in memory while many passes need them, as the answers to questions do, a pass a token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.runtime.free_memory import RESERVE, free_bytes
from toolkit.runtime.page_locked import Arena

log = logging.getLogger("frostline")


@contextmanager
def kept_in_memory(weights: FrozenWeights | None, ranks: int) -> Iterator[bool]:
    """Load the weights once for all passes within the context, if they fit in memory beside what is there.

    On the device they are kept in the model's precision; else, on a GPU, in page-locked memory as they are stored. What
    fits nowhere is read in each pass as ever. ``ranks`` processes share the host's memory.

    Yields:
        Whether each pass still copies weights, from the host or from files.
    """
    if weights is None:
        yield False
        return
    try:
        yield _keep(weights, ranks)
    finally:
        weights.forget()


def _keep(weights: FrozenWeights, ranks: int) -> bool:
    """Load the weights to where they fit, and say where that is; return whether each pass still copies them."""
    on_gpu = weights.is_streamed
    for unit in weights.units:
        if not unit.is_block:
            unit.keep()  # a table, which is mapped and looked up on the host
    size = sum(unit.whole_bytes for unit in weights.units if unit.is_block)
    free = free_bytes(weights.device) // (1 if on_gpu else ranks)
    if size + RESERVE <= free:
        try:
            for unit in weights.units:
                unit.keep()
        except torch.OutOfMemoryError:  # others took what was free
            weights.forget()
        else:
            _say("in memory" if not on_gpu else "on the device", size)
            return False
    files = [unit for unit in weights.units if unit.is_block and unit.is_on_disk]
    stored = sum(unit.flat_bytes for unit in files)
    if on_gpu and files and stored + RESERVE <= free_bytes(torch.device("cpu")) // ranks:
        arena = Arena(stored)
        if all(unit.lock_copy(arena) for unit in files):
            _say("in page-locked memory, from which each token takes them", stored)
            return True
        weights.forget()
    _say("where they were, too large for the memory that is free: each token takes them from there", size)
    return True


def _say(where: str, size: int) -> None:
    """Log where the weights are for the time being."""
    log.info("frozen weights for the answers: %s MiB %s", f"{size / 2**20:,.1f}", where)
