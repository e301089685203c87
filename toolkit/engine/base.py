"""The seam between the training loop and what executes a step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from toolkit.data.batches import Batch


@dataclass(frozen=True)
class AdamState:
    """What AdamW keeps of one tensor, in float32 on the CPU; the moments are none where it is to begin anew."""

    master: torch.Tensor
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None


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

    def gathered(self) -> AbstractContextManager[object]:
        """While entered, the parameters of the suffix are whole on every rank; every rank enters it."""

    def masters(self) -> dict[str, torch.Tensor]:
        """The trained tensors in float32 by their names in the whole model, on the CPU; empty except on rank 0."""

    def save(self, directory: Path) -> None:
        """Write optimizer and schedule state into ``directory``; every rank calls it."""

    def load(self, directory: Path, masters: dict[str, torch.Tensor]) -> None:
        """Continue from what ``save`` wrote and from the float32 ``masters`` of the same checkpoint."""

    def state(self) -> dict[str, AdamState]:
        """Masters and moments of the trained tensors by name, after at least one update; empty except on rank 0."""

    def adopt(self, state: Mapping[str, AdamState], ages: Mapping[str, int], step: int) -> None:
        """Go on, before any update, from what other engines' ``state`` gave, while the run is at ``step``.

        Args:
            state: on rank 0, of any of the trained tensors; the others begin as they stand.
            ages: updates that each trained tensor's moments have had; 0 begins anew. All of a ``ParameterGroup`` agree.
            step: optimizer steps of the run that are done, for the schedule.
        """

    def release(self) -> dict[str, torch.Tensor]:
        """Let go of all state, and return, by name, the tensors of the suffix that the engine had moved elsewhere.

        The engine and its suffix cannot be used afterwards.
        """
