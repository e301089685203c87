"""Masters and moments that ZeRO-3 keeps in files on a drive (ZeRO-Infinity, Rajbhandari et al., arXiv 2104.07857).

DeepSpeed brings them into memory group by group for an update, and does not read them otherwise. Checkpoints and
phases of a schedule do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from toolkit.optim.state_fragments import KINDS, MASTER, MOMENTS, FragmentState


class NvmeSwapper:
    """Holds one group of ZeRO-3's masters in memory at a time, in the buffers that DeepSpeed has for it.

    Args:
        zero: DeepSpeed's optimizer of ZeRO-3.
        state_of: the state of one of its masters, which it makes if there is none.
    """

    def __init__(self, zero: Any, state_of: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
        self._zero, self._state_of = zero, state_of
        self._here: torch.Tensor | None = None
        self._is_written = False
        swaps = getattr(zero, "swap_optimizer", False)
        flats = zero.fp32_partitioned_groups_flat if swaps else ()
        self._in_files = {id(flat) for index, flat in enumerate(flats) if zero._swappable_optimizer_subgroup(index)}

    def has(self, flat: torch.Tensor) -> bool:
        """Return True for a flat master that is in files; those of small groups stay in memory."""
        return id(flat) in self._in_files

    def updates(self, flat: torch.Tensor) -> int:
        """Return the updates that the moments of a master have had; their count is always in memory."""
        return int(self._zero.optimizer.state.get(flat, {}).get("step", 0))

    def swap_in(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a view of all values of a master's group for each of ``KINDS``, good until the next call."""
        if flat is not self._here:
            self.close()
            self._zero.optimizer_swapper.swap_in_optimizer_state(parameter=flat, async_parameter=None)
            self._here = flat
        if not self._zero.optimizer.state.get(flat):
            self._is_written = True  # its new moments have to go to files
        state = self._state_of(flat)
        return {MASTER: flat.detach().view(-1), **{kind: state[kind].view(-1) for kind in MOMENTS}}

    def write(self, flat: torch.Tensor, part: slice, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Set values of a slice; ``close``, or another group's turn, writes them to the files."""
        views = self.swap_in(flat)
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
class SwappedFragmentState(FragmentState):
    """Float32 values that are in files on a drive."""

    swapper: NvmeSwapper
    flat: torch.Tensor
    part: slice

    @property
    @override
    def updates(self) -> int:
        return self.swapper.updates(self.flat)

    @override
    def read(self) -> Mapping[str, torch.Tensor]:
        views = self.swapper.swap_in(self.flat)
        return {kind: views[kind][self.part].clone() for kind in KINDS}

    @torch.no_grad()
    @override
    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        self.swapper.write(self.flat, self.part, tensors, updates)
