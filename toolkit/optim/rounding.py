"""Round float32 to bfloat16 stochastically. A float32 is a bfloat16 with 16 more bits of mantissa."""

from __future__ import annotations

import torch


def stochastic_round(exact: torch.Tensor, noise: torch.Tensor, out: torch.Tensor) -> None:
    """Round float32 numbers stochastically to one of the two neighbouring bfloat16 numbers, without bias.

    Args:
        exact: finite float32 numbers [n]; overwritten.
        noise: random numbers, int32 [n], uniform in 0 … 65535.
        out: result, bfloat16 [n], written to.
    """
    out.view(torch.int16).copy_(exact.view(torch.int32).add_(noise).bitwise_right_shift_(16))
