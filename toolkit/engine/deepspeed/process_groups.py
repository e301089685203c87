"""Clean up what DeepSpeed leaves behind of its process groups: module globals, and shared memory."""

from __future__ import annotations

import os
from importlib import reload
from pathlib import Path

import torch.distributed as dist

from toolkit.runtime.distributed import World


def reset_process_groups() -> None:
    """Make DeepSpeed create its process groups anew in the next run of this process.

    The groups that it keeps belong to the default group, and ``deepspeed.initialize`` fails once that is destroyed.
    Does nothing while the default group exists. Can go when ``deepspeed.comm.destroy_process_group`` does this
    (0.19.8 does not).
    """
    if dist.is_initialized():
        return
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    reload(groups)


def unlink_shared_memory(world: World) -> None:
    """Unlink the shared memory of DeepSpeed's CPU collectives, so that it is freed with the processes, even if killed.

    DeepSpeed never unlinks it (shm.cpp of DeepSpeed 0.19): every run would leave 66 MiB a rank behind.
    """
    world.barrier()  # every rank has mapped the others' buffers
    suffix = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{suffix}_{world.rank}").unlink(missing_ok=True)
