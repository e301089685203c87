"""Masters and moments that ZeRO-3 keeps in files on a drive (ZeRO-Infinity, Rajbhandari et al., arXiv 2104.07857).

DeepSpeed brings them into memory group by group for an update, and does not read them otherwise. Checkpoints and
phases of a schedule do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.optim.state_fragments import KINDS, MASTER, MOMENTS


class Swapped:
    """Holds one of ZeRO-3's groups in memory at a time, in the buffers that DeepSpeed has for it."""

    def __init__(self, zero: Any, state_of: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
        """
        Args:
            zero: DeepSpeed's optimizer of ZeRO-3.
            state_of: the state of one of its masters, which it makes if there is none.
        """  # noqa: D205, D212
        self._zero, self._state_of = zero, state_of
        self._here: torch.Tensor | None = None
        self._is_written = False
        swaps = getattr(zero, "swap_optimizer", False)
        flats = zero.fp32_partitioned_groups_flat if swaps else ()
        self._in_files = {id(flat) for index, flat in enumerate(flats) if zero._swappable_optimizer_subgroup(index)}

    def has(self, flat: torch.Tensor) -> bool:
        """A flat master is in files; those of small groups stay in memory."""
        return id(flat) in self._in_files

    def updates(self, flat: torch.Tensor) -> int:
        """That the moments of a master have had; their count is always in memory."""
        return int(self._zero.optimizer.state.get(flat, {}).get("step", 0))

    def opened(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each of ``KINDS`` a view of all values of a master's group, good until another group is opened."""
        if flat is not self._here:
            self.close()
            self._zero.optimizer_swapper.swap_in_optimizer_state(parameter=flat, async_parameter=None)
            self._here = flat
        if not self._zero.optimizer.state.get(flat):
            self._is_written = True  # its new moments have to go to files
        state = self._state_of(flat)
        return {MASTER: flat.detach().view(-1), **{kind: state[kind].view(-1) for kind in MOMENTS}}

    def write(self, flat: torch.Tensor, part: slice, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take over values of a stretch; ``close``, or another group's turn, puts them into the files."""
        views = self.opened(flat)
        for kind, values in tensors.items():
            views[kind][part].copy_(values)
        self._state_of(flat)["step"].fill_(updates)
        self._is_written = True

    def close(self) -> None:
        """Free the buffers; DeepSpeed needs them for gradients."""
        if self._here is None:
            return
        swapper = self._zero.optimizer_swapper
        if self._is_written:
            swapper.swap_out_optimizer_state(parameter=self._here, async_swap=False)
        else:
            swapper.release_swap_buffers(parameter=self._here)
        self._here.grad = None
        self._here, self._is_written = None, False


@dataclass(frozen=True)
class SwappedPart:
    """A ``Held`` of float32 values that are in files."""

    swapped: Swapped
    flat: torch.Tensor
    part: slice

    @property
    def updates(self) -> int:  # noqa: D102
        return self.swapped.updates(self.flat)

    def read(self) -> Mapping[str, torch.Tensor]:  # noqa: D102
        views = self.swapped.opened(self.flat)
        return {kind: views[kind][self.part].clone() for kind in KINDS}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:  # noqa: D102
        self.swapped.write(self.flat, self.part, tensors, updates)

    def raw(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return {}

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Another optimizer's."""
