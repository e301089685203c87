"""The interface between the training loop and the engines, which run forward, backward and the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

from toolkit.data.batches import Batch
from toolkit.optim.state_fragments import KINDS, MASTER, AdamState, Fragment
from toolkit.optim.update_monitor import UpdateMonitor
from toolkit.runtime.distributed import World


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer step."""

    grad_norm: torch.Tensor
    """Global 2-norm of the gradient before clipping, a float32 scalar; reading it waits for the device."""
    learning_rate: float
    """Learning rate of this step."""
    moved: torch.Tensor
    """``toolkit.optim.update_monitor.UpdateMonitor.counts`` of this rank; reading it waits for the device."""


class Engine(Protocol):
    """Run forward, backward and update of the suffix; every rank makes the same calls in the same order."""

    name: str
    """``local``, or ``zero-N`` with the ZeRO stage."""
    shapes: dict[str, torch.Size]
    """Shape of each trained tensor, by its name in the whole model."""
    is_replicated: bool
    """True if every rank holds all of the optimizer state, False if it is partitioned over the ranks."""
    world: World
    _scheduler: LRScheduler
    _update_monitor: UpdateMonitor
    _rate: float

    def forward_loss(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Run the suffix and its loss head on the hidden states at the frost line, or on the tokens if they are None.

        Returns the loss: cross entropy summed over supervised positions, a float32 scalar.
        """

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Run backward on a micro batch's share of the global mean loss, and accumulate its gradient.

        ``is_last`` is True for the last micro batch of the step.
        """

    def update(self) -> Update:
        """Sum gradients over ranks, clip, update the fp32 masters, write back, and step the learning-rate scheduler.

        A gradient that is not finite on some rank changes no weight, moment or step count on any rank; the scheduler,
        which follows the run's steps, advances all the same. ``Update.grad_norm`` is then not finite on every rank.
        """

    def moved_share(self, changed: float, expected: float) -> float | None:
        """Return the share of the sampled weights that the last update changed; None if none was expected to change.

        The arguments are ``Update.moved``, summed over all ranks. ``UpdateMonitor`` defines the sample, and warns in
        the log if rounding loses the updates.
        """
        return self._update_monitor.changed_share(changed, expected, self._rate)

    def train(self, mode: bool) -> None:
        """Set the suffix to training mode or evaluation mode, which turns dropout on or off."""

    def gathered(self) -> AbstractContextManager[object]:
        """Return a context in which the suffix's parameters are gathered on every rank; all ranks enter it."""

    def gathered_bytes(self) -> int:
        """Return the additional bytes that ``gathered`` needs on this rank."""

    @property
    def schedule_step(self) -> int:
        """Return the number of steps that the learning-rate scheduler has done."""
        return self._scheduler.last_epoch

    def fragments(self) -> list[Fragment]:
        """Return this rank's fragments of the optimizer state; before the first update the moments are zeros."""

    def continue_at(self, step: int) -> None:
        """Resume from the state written into ``fragments``, with the learning-rate scheduler set to ``step``.

        Called after loading a checkpoint or the state of an earlier phase. The parameters must hold the rounded
        masters already.
        """

    def masters(self) -> dict[str, torch.Tensor]:
        """Return copies of the trained tensors by name, float32 on the CPU of rank 0; an empty dict on other ranks."""
        return {name: tensors[MASTER] for name, tensors in self._gather(self.fragments(), [MASTER]).items()}

    def states(self) -> dict[str, AdamState]:
        """Return copies of all optimizer state by tensor name on rank 0, an empty dict on other ranks."""
        fragments = self.fragments()
        updates: dict[str, int] = {}
        for counts in self.world.all_gather_object({fragment.name: fragment.state.updates for fragment in fragments}):
            updates |= counts
        states = {}
        for name, tensors in self._gather(fragments, KINDS).items():
            master, exp_avg, exp_avg_sq = (tensors[kind] for kind in KINDS)
            states[name] = AdamState(master, exp_avg, exp_avg_sq, updates[name])
        return states

    @torch.no_grad()
    def _gather(self, fragments: Sequence[Fragment], kinds: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Return some of ``KINDS`` of each whole tensor on rank 0, {} on other ranks; every rank calls it."""
        local = {fragment.name: fragment for fragment in fragments}
        is_whole = self.is_replicated or self.world.size == 1
        gathered: dict[str, dict[str, torch.Tensor]] = {}
        for name, shape in self.shapes.items():
            values = local[name].state.read() if name in local and (self.world.is_main or not is_whole) else {}
            for kind in kinds:
                if is_whole:
                    full = values.get(kind)
                else:
                    full = torch.zeros(shape.numel(), device=self.world.device)
                    if values:
                        full[local[name].start : local[name].stop].copy_(values[kind])
                    dist.all_reduce(full)
                if self.world.is_main:
                    assert full is not None
                    gathered.setdefault(name, {})[kind] = full.detach().to("cpu", copy=True).view(shape)
        return gathered

    def load_states(self, states: Mapping[str, AdamState], step: int) -> None:
        """Load states of an earlier phase, which rank 0 holds, before the first update; then ``continue_at(step)``.

        Tensors without an entry keep theirs. All tensors of a parameter group must have the same number of updates.
        """
        local = {fragment.name: fragment for fragment in self.fragments()}
        updates_by_name = self.world.broadcast_object({name: state.updates for name, state in states.items()})
        for name, updates in updates_by_name.items():
            kinds, shape = KINDS if updates else (MASTER,), self.shapes[name]
            full = {kind: self.world.broadcast_tensor(getattr(states.get(name), kind, None), shape) for kind in kinds}
            if name in local:
                part = slice(local[name].start, local[name].stop)
                local[name].state.write({kind: values.view(-1)[part] for kind, values in full.items()}, updates)
        self.continue_at(step)

    def release(self) -> dict[str, torch.Tensor]:
        """Free all state; return, by name, the suffix's tensors that the engine had moved to memory of its own.

        Called at the end of a phase: the caller puts these tensors back into the model. Neither the engine nor its
        suffix can be used afterwards.
        """
