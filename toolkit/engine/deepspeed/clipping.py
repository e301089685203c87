"""Measure and clip the gradient of ZeRO-1 and 2 in one pass each, in the place of DeepSpeed.

DeepSpeed's ``step`` looks for NaN in two passes over the gradient, measures it in float64 and multiplies it in a pass
of its own (DeepSpeed 0.19). Its settings can leave all three out; the engine then measures the gradient once, and the
update's kernel clips it on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from toolkit.engine.deepspeed.config import zero_stage
from toolkit.optim.master_adamw import norm_at_once, piece_size
from toolkit.runtime.distributed import World


def without_clipping(ds: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``ds``, as ``resolve_ds_config`` returns it, without measuring, checking and clipping of gradients.

    None where DeepSpeed cannot leave them out: without ZeRO and under ZeRO-3, for an optimizer on the host, under
    ZenFlow, for float32 sums of bfloat16 gradients under ZeRO-1, and before the version that has the setting.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero, stage = ds["zero_optimization"], zero_stage(ds)
    offload = zero.get("offload_optimizer") or {}
    sums = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32" and ds["bf16"]["enabled"]
    if (
        stage not in (1, 2)
        or offload.get("device", "none") != "none"
        or zero.get("zenflow")
        or (stage == 1 and sums)
        or "compute_grad_norm" not in DeepSpeedZeroConfig.model_fields
    ):
        return None
    lean = copy.deepcopy(ds)
    lean["gradient_clipping"] = 0.0
    lean["zero_optimization"]["compute_grad_norm"] = False
    lean["bf16"]["check_grad_overflow"] = False
    return lean


def partitioned_norm(zero: Any, world: World) -> torch.Tensor:
    """Return the 2-norm of the whole gradient, a float32 scalar on the device.

    Args:
        zero: DeepSpeed's optimizer of ZeRO-1 or 2, after the step's last backward pass; its ``averaged_gradients``
            are this rank's partitions.
        world: whose ranks hold the others.
    """
    gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group]
    norm = torch.stack(list(_norms(gradients))).norm() if world.device.type == "cpu" else norm_at_once(gradients)
    squares = norm.double().square()
    if world.size > 1:
        torch.distributed.all_reduce(squares)
    return squares.sqrt().float()


def _norms(gradients: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the norms of pieces: a CPU adds a large tensor's squares up too roughly (see ``MasterAdamW``)."""
    for gradient in gradients:
        for piece in gradient.detach().view(-1).split(piece_size(gradient.device)):  # type: ignore[no-untyped-call]
            exact = piece.float()
            yield torch.dot(exact, exact).sqrt()
