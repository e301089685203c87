"""Decide whether the kernels of ``toolkit.optim.fused_adamw`` update on a device."""

from __future__ import annotations

import torch

from toolkit.config.policy import Decision
from toolkit.optim.update_kernels import KernelFactory
from toolkit.runtime.distributed import World
from toolkit.runtime.triton_support import triton_trouble

_TORCHS = "torch's fused AdamW, piece by piece"


def kernels_if(decision: Decision) -> KernelFactory | None:
    """Return what makes the kernels if ``choose_kernels`` decided for them, else None."""
    if not decision.on:
        return None
    from toolkit.optim.fused_adamw import TritonKernels  # imports Triton

    return TritonKernels


def choose_kernels(device: torch.device) -> Decision:
    """Decide whether to update on ``device`` with kernels of our own."""
    trouble = triton_trouble(device)
    return Decision(not trouble, f"{_TORCHS}: {trouble}" if trouble else "one Triton kernel from gradients to weights")


def agree_on_kernels(world: World) -> Decision:
    """Return ``choose_kernels`` of this rank's device, off if it is off on any rank; every rank calls it.

    Ranks that hold the same masters would round them differently otherwise.
    """
    decision = choose_kernels(world.device)
    if world.device.type == "cuda" and not all(world.all_gather_object(decision.on)) and decision.on:
        return Decision(False, f"{_TORCHS}: Triton fails on another rank")
    return decision
