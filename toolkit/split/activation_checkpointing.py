"""Gradient checkpointing of exactly the blocks that the gradient must cross."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Drop each block's activations after forward and recompute them in backward (Chen et al., arXiv 1604.06174)."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of the GPU, or of the host on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def should_checkpoint(mode: Literal["auto", "on", "off"], needed: int | None, free: int) -> tuple[bool, str]:
    """Whether to checkpoint, and why, as a phrase for the log.

    Args:
        mode: of the recipe; ``auto`` checkpoints when the run would not fit without.
        needed: bytes to come after loading if nothing is recomputed, as ``toolkit.planning`` reckons them; none where
            it cannot, and ``auto`` then takes the way that needs less.
        free: bytes free before the optimizer exists.
    """
    if mode != "auto":
        return mode == "on", f"{mode}, as the recipe says"
    if needed is None:
        return True, "on (auto: this architecture cannot be planned)"
    gib = 2**30
    decided = needed > free
    return decided, (
        f"{'on' if decided else 'off'} (auto: without it, {needed / gib:.2f} GiB beside the weights; "
        f"{free / gib:.2f} GiB free)"
    )
