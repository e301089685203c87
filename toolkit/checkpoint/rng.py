"""Save and restore the random number generators of this process: Python, NumPy, torch on CPU and device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator as JSON values."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["device"] = _to_hex(torch.cuda.get_rng_state(device))
    return states


def restore(states: dict[str, Any], device: torch.device) -> None:
    """Restore every generator; that of a GPU keeps its state if the checkpoint was written on a CPU."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    if device.type == "cuda" and "device" in states:
        torch.cuda.set_rng_state(_from_hex(states["device"]), device)


def rng_name(rank: int, ranks: int) -> str:
    """Return the file name of a rank's generator states, relative to the checkpoint."""
    return f"rng-{rank:05d}-of-{ranks:05d}.json"


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
