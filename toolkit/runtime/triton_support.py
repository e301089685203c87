"""Whether Triton's kernels serve on a device, found out by running one."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


@cache
def triton_trouble(device: torch.device) -> str:
    """Return why Triton's kernels do not run on ``device``, as a phrase for the log; empty if they do.

    One is tried: Triton compiles where it runs, and needs a C compiler and Python's headers for that.
    """
    if device.type != "cuda":
        return "the device is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET is set, and Triton's interpreter reads no GPU's memory"
    try:
        from toolkit.runtime.triton_trial import add_one

        if add_one(torch.ones(1, device=device)).item() != 2:
            return "Triton computes wrong numbers here"
    except Exception as error:  # whatever a compiler can raise
        return f"Triton fails here ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"
    return ""
