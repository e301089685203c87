"""Copy the state of a checkpoint to the host's memory, so that a thread can write it while training changes it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from toolkit.runtime.free_memory import RESERVE
from toolkit.runtime.host_memory import available_host_bytes
from toolkit.runtime.page_locked import Arena, aligned


class HostCopy:
    """Holds one copy of a rank's state; its memory is used again for the next one.

    With ``page_locked`` the tensors are on a GPU: they are copied to page-locked memory, on the stream that computes,
    and the host goes on. If that memory is refused, it is ordinary, and the host waits. ``ranks`` share the host.
    """

    def __init__(self, page_locked: bool, ranks: int) -> None:
        self._page_locked, self._ranks = page_locked, ranks
        self._held: dict[str, torch.Tensor] = {}

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the host has memory for a copy of ``tensors``."""
        needed = 0 if self._is_held(tensors) else sum(tensor.nbytes for tensor in tensors.values())
        return needed + RESERVE <= available_host_bytes() // self._ranks or not needed

    def take(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        """Return a copy of ``tensors`` on the CPU, and the event after which it is complete; None if it is already.

        It replaces the copy before, which nobody may read any more.
        """
        if not self._page_locked:
            return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}, None
        if not self._is_held(tensors):
            self._held.clear()
            arena = Arena(sum(aligned(tensor.nbytes) for tensor in tensors.values()))
            for key, tensor in tensors.items():
                memory = arena.take(tensor.nbytes)
                if memory is not None:
                    self._held[key] = memory.view(tensor.dtype).view(tensor.shape)
        copies = {
            key: self._held[key].copy_(tensor.detach(), non_blocking=True)
            if key in self._held
            else tensor.detach().to("cpu", copy=True)
            for key, tensor in tensors.items()
        }
        event: torch.cuda.Event = torch.cuda.current_stream().record_event()
        return copies, event

    def _is_held(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the copy before has a place for each of ``tensors``."""
        return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in self._held.items()
        }
