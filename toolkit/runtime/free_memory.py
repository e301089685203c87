"""How much memory can still be allocated, on a GPU or on the host."""

from __future__ import annotations

import gc

import torch

from toolkit.runtime import malloc
from toolkit.runtime.host_memory import available_host_bytes

RESERVE = 2**30
"""Estimated bytes needed besides tensors: CUDA context, library workspaces, allocator fragmentation."""


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated: of GPU memory on a GPU, else of host memory.

    What nobody refers to any more is freed first, and torch's and glibc's own stock of freed memory returned.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    malloc.release_free_memory()
    return available_host_bytes()
