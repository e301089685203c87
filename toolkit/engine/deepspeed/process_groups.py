"""Reset the process groups that DeepSpeed keeps in module globals."""

from __future__ import annotations

from importlib import reload

import torch.distributed as dist


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
