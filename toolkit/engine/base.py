"""The interface between the training loop and what executes a step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from toolkit.data.batches import Batch
from toolkit.optim.state_fragments import MASTER, Fragment, gather_kind
from toolkit.runtime.distributed import World


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer step."""

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
    world: World

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Return the cross entropy summed over the batch's supervised positions, a float32 scalar."""

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add the gradient of a micro batch's share of the global mean; ``is_last`` marks the step's last one."""

    def update(self) -> Update:
        """Sum gradients over ranks, clip, update the float32 masters, write back, move the schedule on.

        A gradient that is not finite on any rank changes no weight, moment or step count of any; the schedule, which
        follows the run's steps, moves on all the same. ``Update.grad_norm`` is then not finite on any rank.
        """

    def moved_share(self) -> float | None:
        """Return the share of the sampled weights, over all ranks, that the last update changed as it was meant to.

        None where nothing was meant to. ``toolkit.optim.update_monitor.UpdateMonitor`` says what is looked at and warns
        in the log where rounding eats the updates.
        """

    def train(self, mode: bool) -> None:
        """Turn dropout on or off."""

    def gathered(self) -> AbstractContextManager[object]:
        """Make the suffix's parameters whole on every rank while entered; every rank enters it."""

    def gathered_bytes(self) -> int:
        """Return the bytes that ``gathered`` takes on this rank."""

    def masters(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors in float32 by name in the whole model, on rank 0's CPU; elsewhere nothing."""
        return gather_kind(MASTER, self.fragments(), self.shapes, self.is_replicated, self.world)

    @property
    def schedule_step(self) -> int:
        """Return the steps that the learning-rate schedule has done."""

    def fragments(self) -> list[Fragment]:
        """Return this rank's fragments of the optimizer state; before the first update the moments are zeros."""

    def continue_at(self, step: int) -> None:
        """Go on from what was written into ``fragments``, with the schedule where it is after ``step`` updates.

        The model's parameters hold the rounded masters already.
        """

    def release(self) -> dict[str, torch.Tensor]:
        """Free all state; return, by name, the tensors of the suffix that the engine had moved elsewhere.

        The engine and its suffix cannot be used afterwards.
        """
