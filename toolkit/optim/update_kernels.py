"""What kernels of our own do for an update of many tensors, and the memory that they need for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

BLOCK = 2048
"""Elements that a kernel takes at once: 8 in each of 256 threads, so that 16 bytes of bfloat16 are read at a time."""


class UpdateKernels(Protocol):
    """Kernels on some tensors of one device, which launch as often however many the tensors are.

    Gradients and weights lie wherever they are, contiguous and each list of one precision; masters, moments and sums
    lie in flat float32 buffers in the order of the tensors.
    """

    @property
    def count(self) -> int:
        """Return the number of blocks of up to ``BLOCK`` elements; none holds elements of two tensors."""

    def squares(self, gradients: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Set ``out``, float32 [blocks], to the sums of each block's squared gradients."""

    def accumulate(self, gradients: Sequence[torch.Tensor], total: torch.Tensor, is_first: bool) -> None:
        """Add gradients to their sums ``total``; overwrite it if ``is_first``."""

    def adamw(
        self, gradients: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], master: torch.Tensor | None,
        moments: tuple[torch.Tensor, torch.Tensor], step: torch.Tensor, param_group: Mapping[str, Any],
        divisor: torch.Tensor | None, found_inf: torch.Tensor,
    ) -> None:  # fmt: skip
        """Take one step of AdamW; waits for nothing.

        Args:
            gradients: gradient of each tensor, read only.
            weights: the tensors, written to; without ``master`` they are float32 and take the update.
            master: masters of low-precision ``weights``, updated; else None.
            moments: exp_avg and exp_avg_sq, updated.
            step: number of updates including this one, a float32 scalar on the device.
            param_group: parameter group with lr, betas, eps and weight_decay.
            divisor: divisor that clips the gradient, a float32 scalar on the device; None if clipping is off.
            found_inf: 1 to change nothing, else 0; a float32 scalar on the device.
        """


KernelFactory = Callable[[Sequence[int], torch.device], UpdateKernels]
"""Makes the kernels on tensors of the given numbers of elements, on a device."""


def table_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes that the kernels need beside tensors of these sizes: their table, and a square of each block."""
    return 24 * len(sizes) + 8 * sum(math.ceil(size / BLOCK) for size in sizes)
