"""Gradient checkpointing of exactly the blocks that the gradient must cross."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_ACTIVATION_BYTES = 34
"""Bytes a block keeps per token and hidden unit in 16 bit, with fused attention (arXiv 2205.05198)."""

_UPDATE_BYTES = 18
"""Bytes per trained parameter to come after loading: float32 master, gradient, two moments, and a 16-bit gradient."""


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Drop each block's activations after forward and recompute them in backward (Chen et al., arXiv 1604.06174)."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def activation_bytes(tokens: int, hidden_size: int, blocks: int, dtype: torch.dtype) -> int:
    """Estimated bytes that ``blocks`` blocks keep for backward on a micro batch of ``tokens`` tokens."""
    return _ACTIVATION_BYTES * tokens * hidden_size * blocks * dtype.itemsize // 2


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of the GPU, or of the host on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def should_recompute(
    mode: Literal["auto", "on", "off"], activations: int, trained_parameters: int, free: int
) -> tuple[bool, str]:
    """Whether to checkpoint, and why, as a phrase for the log.

    Args:
        mode: of the recipe; ``auto`` checkpoints when activations would not fit beside the optimizer's state.
        activations: bytes as ``activation_bytes`` estimates them.
        trained_parameters: number of scalars that train.
        free: bytes free before the optimizer exists.
    """
    if mode != "auto":
        return mode == "on", f"{mode}, as the recipe says"
    room = free - _UPDATE_BYTES * trained_parameters
    gib = 2**30
    decided = activations > room
    return decided, (
        f"{'on' if decided else 'off'} (auto: activations about {activations / gib:.2f} GiB, "
        f"{max(room, 0) / gib:.2f} GiB left after the optimizer's state)"
    )
