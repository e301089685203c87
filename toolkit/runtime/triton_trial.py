"""A Triton kernel to see whether any runs. Importing this module imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def add_one(value: torch.Tensor) -> torch.Tensor:
    """Add 1 to a tensor of one element, in place, by a kernel."""
    with torch.cuda.device_of(value):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _add_one[(1,)](value)
    return value


@triton.jit
def _add_one(value):  # type: ignore[no-untyped-def]
    tl.store(value, tl.load(value) + 1)
