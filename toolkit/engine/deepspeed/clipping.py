"""Compute the gradient norm of ZeRO-1 and 2 in one pass, and clip in the update kernel, instead of in DeepSpeed.

DeepSpeed's ``step`` checks the gradient for NaN in two passes, computes its norm in float64 and clips it in a separate
pass (DeepSpeed 0.19). Its settings can turn all three off; the engine then computes the norm once, and the fused AdamW
kernel clips the gradient as it reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from toolkit.engine.deepspeed.config import zero_config
from toolkit.optim.master_adamw import piece_size, total_norm
from toolkit.runtime.distributed import World


def without_norm_and_clipping(ds_config: dict[str, Any]) -> dict[str, Any] | None:
    """Return a copy of ``ds_config`` with DeepSpeed's grad norm, overflow check and clipping turned off.

    None if DeepSpeed cannot turn them off: without ZeRO, with ZeRO-3, optimizer offload or ZenFlow, for fp32 gradient
    accumulation of a bfloat16 model with ZeRO-1, and in versions that lack ``compute_grad_norm``. ``ds_config`` is
    the result of ``resolve_ds_config``.
    """
    zero = zero_config(ds_config)
    accumulates_fp32 = (
        ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32" and ds_config["bf16"]["enabled"]
    )
    if (
        zero.stage not in (1, 2)
        or (zero.offload_optimizer and zero.offload_optimizer.device != "none")
        or zero.zenflow
        or (zero.stage == 1 and accumulates_fp32)
        or not hasattr(zero, "compute_grad_norm")
    ):
        return None
    without_norm = copy.deepcopy(ds_config)
    without_norm["gradient_clipping"] = 0.0
    without_norm["zero_optimization"]["compute_grad_norm"] = False
    without_norm["bf16"]["check_grad_overflow"] = False
    return without_norm


def partitioned_norm(zero: Any, world: World) -> torch.Tensor:
    """Return the 2-norm of the whole gradient over all ranks, a float32 scalar on the device; every rank calls it.

    ``zero`` is DeepSpeed's ZeRO-1 or 2 optimizer after the step's last backward pass, with this rank's partitions in
    ``averaged_gradients``.
    """
    gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group]
    norm = torch.stack(list(_piece_norms(gradients))).norm() if world.device.type == "cpu" else total_norm(gradients)
    squares = norm.double().square()
    if world.size > 1:
        torch.distributed.all_reduce(squares)
    return squares.sqrt().float()


def _piece_norms(gradients: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the norm of each piece: on a CPU the norm of a large tensor is inexact (see ``MasterAdamW``)."""
    for gradient in gradients:
        for piece in gradient.detach().view(-1).split(piece_size(gradient.device)):  # type: ignore[no-untyped-call]
            exact = piece.float()
            yield torch.dot(exact, exact).sqrt()
