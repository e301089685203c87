"""The interface between the training loop and the engines, which run forward, backward and the update."""

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
    """Learning rate of this step."""


class Engine(Protocol):
    """Run forward, backward and update of the suffix; every rank makes the same calls in the same order."""

    name: str
    """``local``, or ``zero-N`` with the ZeRO stage."""
    shapes: dict[str, torch.Size]
    """Shape of each trained tensor, by its name in the whole model."""
    is_replicated: bool
    """True if every rank holds all of the optimizer state, False if it is partitioned over the ranks."""
    world: World

    def forward_loss(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Run the suffix and its loss head; return the loss: cross entropy summed over supervised positions, float32.

        Args:
            hidden: hidden states at the frost line; None if the suffix is the whole model.
            batch: tokens and labels of the micro batch.
        """

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Run backward for one micro batch and accumulate its gradient.

        Args:
            loss: the micro batch's share of the global mean loss.
            is_last: True for the last micro batch of the step.
        """

    def update(self) -> Update:
        """Sum gradients over ranks, clip, update the fp32 masters, write back, and step the learning-rate scheduler.

        A gradient that is not finite on some rank changes no weight, moment or step count on any rank; the scheduler,
        which follows the run's steps, advances all the same. ``Update.grad_norm`` is then not finite on every rank.
        """

    def moved_share(self) -> float | None:
        """Return the share of the sampled weights, over all ranks, that the last update changed.

        None if no sampled weight was meant to change. ``toolkit.optim.update_monitor.UpdateMonitor`` defines the
        sample, and warns in the log if rounding loses the updates.
        """

    def train(self, mode: bool) -> None:
        """Set the suffix to training mode or evaluation mode, which turns dropout on or off."""

    def gathered(self) -> AbstractContextManager[object]:
        """Return a context in which the suffix's parameters are gathered on every rank; all ranks enter it."""

    def gathered_bytes(self) -> int:
        """Return the additional bytes that ``gathered`` needs on this rank."""

    def masters(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name, float32 on the CPU of rank 0; an empty dict on other ranks."""
        return gather_kind(MASTER, self.fragments(), self.shapes, self.is_replicated, self.world)

    @property
    def schedule_step(self) -> int:
        """Return the number of steps that the learning-rate scheduler has done."""

    def fragments(self) -> list[Fragment]:
        """Return this rank's fragments of the optimizer state; before the first update the moments are zeros."""

    def continue_at(self, step: int) -> None:
        """Resume from the state written into ``fragments``, with the learning-rate scheduler set to ``step``.

        Called after loading a checkpoint or the state of an earlier phase. The parameters must hold the rounded
        masters already.
        """

    def release(self) -> dict[str, torch.Tensor]:
        """Free all state; return, by name, the suffix's tensors that the engine had moved to memory of its own.

        Called at the end of a phase: the caller puts these tensors back into the model. Neither the engine nor its
        suffix can be used afterwards.
        """
