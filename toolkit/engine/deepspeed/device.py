"""Tell DeepSpeed which GPU a rank computes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
"""What DeepSpeed takes for the index of the GPU; it wants the second, where mpirun sets it, to equal the first."""


@contextmanager
def device_index_as_local_rank(device: torch.device) -> Iterator[None]:
    """Let DeepSpeed, set up within, compute on ``device``, which is ``World.device``; nothing changes on a CPU.

    DeepSpeed 0.19 computes on the GPU whose index is LOCAL_RANK. A rank that sees only its own GPU, as under
    ``srun --gpus-per-task=1``, has index 0 whatever its local rank is.
    """
    names = [name for name in _VARIABLES if name in os.environ] if device.index is not None else []
    before = {name: os.environ[name] for name in names}
    os.environ.update(dict.fromkeys(names, str(device.index)))
    try:
        yield
    finally:
        os.environ.update(before)
