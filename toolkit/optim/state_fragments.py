"""Engine-independent view of the optimizer state: fragments, each a slice of a trained tensor with its AdamW state.

Every engine lists the state that a rank holds as fragments. Checkpoints and phase changes read and write fragments, and
need not know how an engine lays its state out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from typing_extensions import override

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
        """Set the master, both moments or all three from flat float32 values on any device; set ``updates``.

        The engine's ``continue_at`` copies the masters into the parameters.
        """

    def raw(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors if they are not float32, such as 8-bit values and scales; {} if ``read`` is exact.

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
class FlatState(FragmentState):
    """State of a fragment whose values are float32 in flat buffers, so that ``read`` is exact."""

    tensors: Mapping[str, torch.Tensor]
    """For each of ``KINDS`` a flat view into the optimizer."""
    step: torch.Tensor
    """Number of updates in the moments: a float32 scalar, shared by the tensors of a parameter group."""

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
