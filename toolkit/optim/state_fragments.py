"""Fragments of the optimizer state that no engine owns: slices of trained tensors, with what AdamW keeps of them.

Every engine can list what a rank holds as fragments. Whatever moves state from one engine to another, in memory or
through a checkpoint, reads some fragments and writes others, and need not know how either engine lays them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from typing_extensions import override

from toolkit.runtime.distributed import World

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)


class FragmentState(Protocol):
    """The optimizer state of a fragment, however an engine stores it."""

    @property
    def updates(self) -> int:
        """Return the number of updates that the moments have had."""

    def read(self) -> Mapping[str, torch.Tensor]:
        """Return the float32 values of each of ``KINDS``, flat; valid until the next update."""

    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Set the values of some kinds, flat float32 on any device, and the number of updates."""

    def raw(self) -> dict[str, torch.Tensor]:
        """Return what is stored where that is not float32, as plain tensors; empty where ``read`` is exact.

        Where fragments share state, such as scales, it is with the first of them.
        """
        return {}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Take over what ``raw`` of the same fragment returned, if it was stored in the same way; after ``write``."""
        del raw  # there is none where ``read`` is exact


@dataclass(frozen=True)
class Fragment:
    """A slice of a trained tensor, in elements of the flattened tensor, and its optimizer state."""

    name: str
    """Of the tensor in the whole model."""
    start: int
    stop: int
    state: FragmentState


@dataclass(frozen=True)
class FlatFragmentState(FragmentState):
    """Float32 values in flat buffers: ``read`` is exact."""

    tensors: Mapping[str, torch.Tensor]
    """For each of ``KINDS`` a flat view into the optimizer."""
    step: torch.Tensor
    """Updates that the moments have had: a scalar, shared by the tensors of a parameter group."""

    @property
    @override
    def updates(self) -> int:
        return int(self.step)

    @override
    def read(self) -> Mapping[str, torch.Tensor]:
        return self.tensors

    @torch.no_grad()
    @override
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        for kind, values in tensors.items():
            self.tensors[kind].copy_(values)
        self.step.fill_(updates)


@dataclass(frozen=True)
class AdamState:
    """The AdamW state of one whole tensor, in float32 on the CPU; no moments where it is to begin anew."""

    master: torch.Tensor
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    updates: int = 0
    """Updates that the moments have had."""


def gather_states(
    fragments: Sequence[Fragment], shapes: Mapping[str, torch.Size], is_replicated: bool, world: World
) -> dict[str, AdamState]:
    """Return all optimizer state on rank 0, in copies; nothing on the others. Every rank calls it.

    Args:
        fragments: what this rank holds.
        shapes: of all trained tensors.
        is_replicated: every rank holds everything.
        world: all ranks.
    """
    whole = [gather_kind(kind, fragments, shapes, is_replicated, world) for kind in KINDS]
    counted = world.all_gather_object({fragment.name: fragment.state.updates for fragment in fragments})
    updates = {name: count for own in counted for name, count in own.items()}
    masters, averages, squares = whole
    return {name: AdamState(masters[name], averages[name], squares[name], updates[name]) for name in masters}


@torch.no_grad()
def gather_kind(
    kind: str, fragments: Sequence[Fragment], shapes: Mapping[str, torch.Size], is_replicated: bool, world: World
) -> dict[str, torch.Tensor]:
    """Return one of ``KINDS`` of all tensors on rank 0, as ``gather_states`` does; every rank calls it."""
    own = {fragment.name: fragment for fragment in fragments}
    whole = {}
    for name, shape in shapes.items():
        if is_replicated or world.size == 1:
            full = own[name].state.read()[kind] if world.is_main else torch.empty(0)
        else:
            full = torch.zeros(shape.numel(), device=world.device)
            if name in own:
                full[own[name].start : own[name].stop].copy_(own[name].state.read()[kind])
            dist.all_reduce(full)
        if world.is_main:
            whole[name] = full.detach().to("cpu", copy=True).view(shape)
    return whole


def load_fragments(
    fragments: Sequence[Fragment], shapes: Mapping[str, torch.Size],
    state: Mapping[str, AdamState], world: World,
) -> None:  # fmt: skip
    """Write whole tensors that rank 0 has into every rank's fragments; every rank calls it.

    Args:
        fragments: what this rank holds, of an engine that has not done any update.
        shapes: of all trained tensors.
        state: on rank 0, of any of the trained tensors; the others begin as they stand. In a parameter group all have
            had the same number of updates.
        world: all ranks.
    """
    own = {fragment.name: fragment for fragment in fragments}
    for name, updates in world.broadcast_object({name: one.updates for name, one in state.items()}).items():
        kinds = KINDS if updates else (MASTER,)
        full = {kind: world.broadcast_tensor(getattr(state.get(name), kind, None), shapes[name]) for kind in kinds}
        if name in own:
            fragment = own[name]
            parts = {kind: values.view(-1)[fragment.start : fragment.stop] for kind, values in full.items()}
            fragment.state.write(parts, updates)
