"""Activation checkpointing of the blocks that the gradient passes through, and the memory that decides on it."""

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
    """Return the bytes that can still be allocated: of GPU memory on a GPU, else of host memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
