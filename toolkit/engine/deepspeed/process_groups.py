"""Process groups that DeepSpeed keeps in globals of its modules."""

from __future__ import annotations

from importlib import reload

import torch.distributed as dist


def forget_groups() -> None:
    """Let DeepSpeed create its process groups anew in the next run of this process.

    Those it keeps belong to the default group, and ``deepspeed.initialize`` fails on them once that was destroyed. Does
    nothing while the default group exists. Can go when ``deepspeed.comm.destroy_process_group`` does this (0.19.8 does
    not).
    """
    if dist.is_initialized():
        return
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    reload(groups)
