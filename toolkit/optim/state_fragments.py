"""Engine-independent view of the optimizer state: fragments, each a slice of a trained tensor with its AdamW state.

Every engine lists the state that a rank holds as fragments. Checkpoints and phase changes read and write fragments, and
need not know how an engine lays its state out.
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
        """Return the number of updates in the moments: AdamW's ``step``."""

    def read(self) -> Mapping[str, torch.Tensor]:
        """Return the float32 values of each of ``KINDS``, flat; valid until the next update."""

    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Set the values of some kinds, flat float32 on any device, and the number of updates."""

    def raw(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors if they are not float32, such as codes and scales; empty if ``read`` is exact.

        State that several fragments share, such as scales, comes with the first of them.
        """
        return {}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Restore the result of ``raw`` for the same fragment, if the format is the same; call it after ``write``."""
        del raw  # a state whose ``read`` is exact has none


@dataclass(frozen=True)
class Fragment:
    """A slice of a trained tensor, in elements of the flattened tensor, and its optimizer state."""

    name: str
    """Name of the tensor in the whole model."""
    start: int
    stop: int
    state: FragmentState


@dataclass(frozen=True)
class FlatFragmentState(FragmentState):
    """State of a fragment whose values are float32 in flat buffers, so that ``read`` is exact."""

    tensors: Mapping[str, torch.Tensor]
    """For each of ``KINDS`` a flat view into the optimizer."""
    step: torch.Tensor
    """Number of updates in the moments: a scalar, shared by the tensors of a parameter group."""

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
    """AdamW state of one whole tensor, in float32 on the CPU; moments are None if it starts with fresh ones."""

    master: torch.Tensor
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    updates: int = 0
    """Number of updates in the moments."""


def gather_states(
    fragments: Sequence[Fragment], shapes: Mapping[str, torch.Size], is_replicated: bool, world: World
) -> dict[str, AdamState]:
    """Return copies of all optimizer state on rank 0, an empty dict on the others. Every rank calls it.

    Args:
        fragments: fragments that this rank holds.
        shapes: shape of each trained tensor, by name.
        is_replicated: True if every rank holds all of the state.
        world: this process among all ranks.
    """
    masters, averages, squares = (gather_kind(kind, fragments, shapes, is_replicated, world) for kind in KINDS)
    counts_by_rank = world.all_gather_object({fragment.name: fragment.state.updates for fragment in fragments})
    updates = {name: count for counts in counts_by_rank for name, count in counts.items()}
    return {name: AdamState(masters[name], averages[name], squares[name], updates[name]) for name in masters}


@torch.no_grad()
def gather_kind(
    kind: str, fragments: Sequence[Fragment], shapes: Mapping[str, torch.Size], is_replicated: bool, world: World
) -> dict[str, torch.Tensor]:
    """Return one of ``KINDS`` for all tensors on rank 0, as ``gather_states`` does; every rank calls it."""
    local = {fragment.name: fragment for fragment in fragments}
    whole = {}
    for name, shape in shapes.items():
        if is_replicated or world.size == 1:
            full = local[name].state.read()[kind] if world.is_main else torch.empty(0)
        else:
            full = torch.zeros(shape.numel(), device=world.device)
            if name in local:
                full[local[name].start : local[name].stop].copy_(local[name].state.read()[kind])
            dist.all_reduce(full)
        if world.is_main:
            whole[name] = full.detach().to("cpu", copy=True).view(shape)
    return whole


def load_fragments(
    fragments: Sequence[Fragment], shapes: Mapping[str, torch.Size],
    state: Mapping[str, AdamState], world: World,
) -> None:  # fmt: skip
    """Write the state of whole tensors on rank 0 into every rank's fragments; every rank calls it.

    Args:
        fragments: fragments that this rank holds, of an engine that has not done any update.
        shapes: shape of each trained tensor, by name.
        state: on rank 0, state of some or all trained tensors; the others keep theirs. All tensors of a parameter
            group must have the same number of updates.
        world: this process among all ranks.
    """
    local = {fragment.name: fragment for fragment in fragments}
    for name, updates in world.broadcast_object({name: one.updates for name, one in state.items()}).items():
        kinds = KINDS if updates else (MASTER,)
        full = {kind: world.broadcast_tensor(getattr(state.get(name), kind, None), shapes[name]) for kind in kinds}
        if name in local:
            fragment = local[name]
            parts = {kind: values.view(-1)[fragment.start : fragment.stop] for kind, values in full.items()}
            fragment.state.write(parts, updates)
