"""The seam between the training loop and what executes a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from toolkit.data.batches import Batch


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    grad_norm: torch.Tensor
    """Global 2-norm of the gradient before clipping, a float32 scalar; reading it waits for the device."""
    learning_rate: float
    """The rate this step used."""


class Engine(Protocol):
    """Forward, backward and update of a suffix on this rank; every rank makes the same calls in the same order."""

    name: str
    """``local``, or ``zero-N`` with the stage; a checkpoint can only be continued by the engine that wrote it."""

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the batch's supervised positions, a float32 scalar."""

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add the gradient of a micro batch's share of the global mean; ``is_last`` marks the step's last one."""

    def update(self) -> Update:
        """Sum gradients over ranks, clip, update the float32 masters, write back, move the schedule on.

        A gradient that is not finite changes no weight.
        """

    def train(self, mode: bool) -> None:
        """Turn dropout on or off."""

    def masters(self) -> dict[str, torch.Tensor]:
        """The trained tensors in float32 by their names in the whole model, on the CPU; empty except on rank 0."""

    def save(self, directory: Path) -> None:
        """Write optimizer and schedule state into ``directory``; every rank calls it."""

    def load(self, directory: Path, masters: dict[str, torch.Tensor]) -> None:
        """Continue from what ``save`` wrote and from the float32 ``masters`` of the same checkpoint."""
