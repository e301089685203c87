"""Access masters and moments that ZeRO-3 offloads to NVMe (ZeRO-Infinity, Rajbhandari et al., arXiv 2104.07857).

DeepSpeed swaps them into memory group by group for an update, and offers no other access. Checkpoints and phases of a
mask schedule need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from toolkit.optim.state_fragments import KINDS, MASTER, MOMENTS, FragmentState


class NvmeSwapper:
    """Swap one group of ZeRO-3's masters and moments into memory at a time, in DeepSpeed's own swap buffers.

    Args:
        zero: DeepSpeed's ZeRO-3 optimizer.
        state_of: function that returns the AdamW state of a flat master, and creates a missing one.
    """

    def __init__(self, zero: Any, state_of: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
        self._zero, self._state_of = zero, state_of
        self._swapped_in: torch.Tensor | None = None
        self._is_written = False
        swaps = getattr(zero, "swap_optimizer", False)
        flats = zero.fp32_partitioned_groups_flat if swaps else ()
        self._offloaded = {id(flat) for index, flat in enumerate(flats) if zero._swappable_optimizer_subgroup(index)}

    def is_offloaded(self, flat: torch.Tensor) -> bool:
        """Return True if a flat master is on NVMe; those of small groups stay in memory."""
        return id(flat) in self._offloaded

    def updates(self, flat: torch.Tensor) -> int:
        """Return the number of updates in a master's moments; the count is always in memory."""
        return int(self._zero.optimizer.state.get(flat, {}).get("step", 0))

    def swap_in(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return flat views of a master and its moments, by kind; valid until another master is swapped in."""
        if flat is not self._swapped_in:
            self.close()
            self._zero.optimizer_swapper.swap_in_optimizer_state(parameter=flat, async_parameter=None)
            self._swapped_in = flat
        if not self._zero.optimizer.state.get(flat):
            self._is_written = True  # the moments that ``_state_of`` creates are not in files yet
        state = self._state_of(flat)
        return {MASTER: flat.detach().view(-1), **{kind: state[kind].view(-1) for kind in MOMENTS}}

    def write(self, flat: torch.Tensor, part: slice, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Set the values of a slice by kind; they reach the files with ``close`` or the next master's ``swap_in``."""
        views = self.swap_in(flat)
        for kind, values in tensors.items():
            views[kind][part].copy_(values)
        self._state_of(flat)["step"].fill_(updates)
        self._is_written = True

    def close(self) -> None:
        """Write changes back and free the swap buffers, which DeepSpeed needs for gradients in backward."""
        if self._swapped_in is None:
            return
        swapper = self._zero.optimizer_swapper
        if self._is_written:
            swapper.swap_out_optimizer_state(parameter=self._swapped_in, async_swap=False)
        else:
            swapper.release_swap_buffers(parameter=self._swapped_in)
        self._swapped_in.grad = None
        self._swapped_in, self._is_written = None, False


@dataclass(frozen=True)
class SwappedFragmentState(FragmentState):
    """State of a fragment whose float32 values are on NVMe."""

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
