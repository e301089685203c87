"""The seam between the training loop and what executes a step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from toolkit.data.batches import Batch
from toolkit.optim.state_fragments import Fragment


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
    """``local``, or ``zero-N`` with the stage."""
    shapes: dict[str, torch.Size]
    """Of the trained tensors, by their names in the whole model."""
    is_replicated: bool
    """Every rank holds all of the optimizer's state; otherwise each holds a part of its own."""

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the batch's supervised positions, a float32 scalar."""

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add the gradient of a micro batch's share of the global mean; ``is_last`` marks the step's last one."""

    def update(self) -> Update:
        """Sum gradients over ranks, clip, update the float32 masters, write back, move the schedule on.

        A gradient that is not finite on any rank changes no weight, moment or step count of any; the schedule, which
        follows the run's steps, moves on all the same. ``Update.grad_norm`` is then not finite on any rank.
        """

    def moved_share(self) -> float | None:
        """Share of the sampled trained weights that the last update changed, of those meant to move, over all ranks.

        None where nothing was meant to. ``toolkit.optim.update_monitor.UpdateMonitor`` says what is looked at and warns
        in the log where rounding eats the updates.
        """

    def train(self, mode: bool) -> None:
        """Turn dropout on or off."""

    def gathered(self) -> AbstractContextManager[object]:
        """While entered, the parameters of the suffix are whole on every rank; every rank enters it."""

    def gathered_bytes(self) -> int:
        """What ``gathered`` takes on this rank, in bytes."""

    def masters(self) -> dict[str, torch.Tensor]:
        """The trained tensors in float32 by their names in the whole model, on the CPU; empty except on rank 0."""

    @property
    def schedule_step(self) -> int:
        """Steps that the learning-rate schedule has done."""

    def fragments(self) -> list[Fragment]:
        """What this rank holds of the optimizer's state; before the first update the moments are zeros."""

    def continue_at(self, step: int) -> None:
        """Go on from what was written into ``fragments``, with the schedule where it is after ``step`` updates.

        The model's parameters hold the rounded masters already.
        """

    def release(self) -> dict[str, torch.Tensor]:
        """Let go of all state, and return, by name, the tensors of the suffix that the engine had moved elsewhere.

        The engine and its suffix cannot be used afterwards.
        """
