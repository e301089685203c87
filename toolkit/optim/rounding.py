"""Convert between float32 and bfloat16: exactly, as bfloat16 and its 16 missing bits, or by stochastic rounding.

A float32 is a bfloat16 with 16 more bits of mantissa. Kept beside the rounded weight, those bits make the float32
again; what compensated summation carries along as an estimate (Kahan; for bfloat16 weights Zamirai et al., arXiv
2010.06192) is then exact. Split-SGD-BF16 (Kalamkar et al., arXiv 2005.04680) keeps weights so.
"""

from __future__ import annotations

import torch

_HALF = 1 << 15


def join_halves(weight: torch.Tensor, rest: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the float32 numbers that ``split_halves`` split.

    Args:
        weight: rounded numbers, bfloat16 [n].
        rest: low bits, int16 [n].
        out: result, float32 [n], written to and returned.
    """
    bits = out.view(torch.int32)
    bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16).add_(rest)
    return out


def split_halves(exact: torch.Tensor, weight: torch.Tensor, rest: torch.Tensor) -> None:
    """Round float32 numbers to the nearest bfloat16, and keep the rounded-off low bits as int16.

    Halfway cases round away from zero; torch's own rounding goes to even.

    Args:
        exact: finite float32 numbers [n]; overwritten.
        weight: rounded numbers, bfloat16 [n], written to.
        rest: bit pattern of ``exact`` minus that of ``weight``, int16 [n], written to.
    """
    bits = exact.view(torch.int32)
    rest.copy_(bits)  # the lower 16 bits, read as a signed number
    weight.view(torch.int16).copy_(bits.add_(_HALF).bitwise_right_shift_(16))


def stochastic_round(exact: torch.Tensor, noise: torch.Tensor, out: torch.Tensor) -> None:
    """Round float32 numbers stochastically to one of the two neighbouring bfloat16 numbers, without bias.

    Args:
        exact: finite float32 numbers [n]; overwritten.
        noise: random numbers, int32 [n], uniform in 0 … 65535.
        out: result, bfloat16 [n], written to.
    """
    out.view(torch.int16).copy_(exact.view(torch.int32).add_(noise).bitwise_right_shift_(16))
