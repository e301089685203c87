"""Gradient checkpointing of exactly the blocks that the gradient must cross."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Drop each block's activations after forward and recompute them in backward (Chen et al., arXiv 1604.06174)."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be allocated: of the GPU, or of the host on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
