"""Float32 numbers in 16 bits and back: exactly, in two halves, or rounded without bias.

A float32 is a bfloat16 with 16 more bits of mantissa. Kept beside the rounded weight, those bits make the float32
again; what compensated summation carries along as an estimate (Kahan; for bfloat16 weights Zamirai et al., arXiv
2010.06192) is then exact. Split-SGD-BF16 (Kalamkar et al., arXiv 2005.04680) keeps weights so.
"""

from __future__ import annotations

import torch

_HALF = 1 << 15


def join_halves(weight: torch.Tensor, rest: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the float32 numbers that ``split_halves`` took apart.

    Args:
        weight: bfloat16 [n].
        rest: int16 [n].
        out: float32 [n], written to and returned.
    """
    bits = out.view(torch.int32)
    bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16).add_(rest)
    return out


def split_halves(exact: torch.Tensor, weight: torch.Tensor, rest: torch.Tensor) -> None:
    """Round float32 numbers to the nearest bfloat16, and keep what is missing as signed 16 bits.

    Halfway cases go away from zero, where torch's own rounding goes to even.

    Args:
        exact: float32 [n], finite; overwritten.
        weight: bfloat16 [n], written to.
        rest: int16 [n], written to: the bits of ``exact`` less those of ``weight``.
    """
    bits = exact.view(torch.int32)
    rest.copy_(bits)  # the lower 16 bits, read as a signed number
    weight.view(torch.int16).copy_(bits.add_(_HALF).bitwise_right_shift_(16))


def stochastic_round(exact: torch.Tensor, noise: torch.Tensor, out: torch.Tensor) -> None:
    """Round float32 numbers to one of the two bfloat16 beside them, to the nearer one more often: right on average.

    Args:
        exact: float32 [n], finite; overwritten.
        noise: int32 [n], uniform in 0 … 65535.
        out: bfloat16 [n], written to.
    """
    out.view(torch.int16).copy_(exact.view(torch.int32).add_(noise).bitwise_right_shift_(16))


class Noise:
    """Random numbers for ``stochastic_round``, a function of the step alone, so that a resumed run repeats them.

    One draw serves all slices of a step: that each element's roundings are independent from step to step is enough.

    Args:
        size: elements of the longest slice.
        device: where it is used.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._pair = torch.zeros(2, size, dtype=torch.int32, device=device)
        self._generator = None if device.type == "meta" else torch.Generator(device)
        self._step: int | None = None

    def of(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two independent int32 [size], uniform in 0 … 65535, for the update that is number ``step``."""
        if step != self._step:
            self._step = step
            if self._generator is not None:
                self._generator.manual_seed(step)
            self._pair.random_(0, 1 << 16, generator=self._generator)
        return self._pair[0], self._pair[1]
