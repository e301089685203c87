"""What DeepSpeed needs of a machine and does not check itself: shared memory, and no build that was left half done."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from toolkit.runtime import signals
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import UsageError

_SHARED_MEMORY = Path("/dev/shm")
_BYTES_OF_RANK = 66 * 2**20 + 4096
"""Shared memory that DeepSpeed's collectives on CPUs take for each rank (shm.cpp of DeepSpeed 0.19)."""
_STALE_SECONDS = 60.0
"""A build that no process of this machine is seen to do, and that has changed nothing for so long, has ended."""
_MOST_SECONDS = 1800.0
"""Longest wait for the build of another process."""
_POLL_SECONDS = 1.0


def check_machine(world: World) -> None:
    """Refuse what DeepSpeed would crash on or wait for without end; every rank calls it, before the model is loaded.

    Raises:
        UsageError: /dev/shm is too small, or an earlier build of DeepSpeed's operators was killed or does not end.
    """
    if world.device.type == "cpu":
        _check_shared_memory(world)
        world.barrier()  # else a rank could see the memory that another one has taken
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from torch.utils import cpp_extension

    root = Path(cpp_extension._get_build_directory("", False))
    for name in ALL_OPS:
        if (lock := root / name / "lock").exists():
            _wait_for_build(lock)


def _check_shared_memory(world: World) -> None:
    """Refuse a /dev/shm without room for the buffers of this node's ranks: writing to them would crash (SIGBUS)."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # of torchrun and accelerate, and of deepspeed
    local = next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), world.size)
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return
    free, needed = status.f_bavail * status.f_frsize, local * _BYTES_OF_RANK
    if free < needed:
        raise UsageError(
            f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB free; DeepSpeed on CPUs needs {needed / 2**20:.0f} MiB there "
            f"for {local} rank(s), and crashes with less. Make it larger (docker run --shm-size 1g), remove what fills "
            "it, or train without --ds"
        )


def _wait_for_build(lock: Path) -> None:
    """Wait until the build that made torch's ``lock`` has ended, which torch does without a word and without a limit.

    Raises:
        UsageError: nobody is building, or for too long.
    """
    end = time.monotonic() + _MOST_SECONDS
    with signals.waiting(f"a build of DeepSpeed's operators by another process, whose lock is {lock}"):
        while (age := _seconds_since_change(lock)) is not None:
            builder = _builder(lock)
            if builder is None and age > _STALE_SECONDS and lock.exists():
                raise UsageError(
                    f"{lock} was left by a build of DeepSpeed's operators that was killed: no process of this machine "
                    f"has it open, and nothing has changed there for {age:.0f} s. Every later build would wait for it; "
                    f"unless one is under way on another machine or in a container, remove it: rm {lock}"
                )
            if time.monotonic() > end:
                raise UsageError(
                    f"{builder or 'another process'} has been building DeepSpeed's operators in {lock.parent} for "
                    f"{_MOST_SECONDS:.0f} s; look after it, or end it and remove {lock}"
                )
            time.sleep(_POLL_SECONDS)


def _seconds_since_change(lock: Path) -> float | None:
    """Return how long nothing has changed beside ``lock``; None if it is gone."""
    try:
        newest = lock.stat().st_mtime
    except FileNotFoundError:
        return None
    with suppress(OSError):
        newest = max(newest, *(path.stat().st_mtime for path in lock.parent.iterdir()))
    return time.time() - newest


def _builder(lock: Path) -> str | None:
    """Name the process of this machine that has ``lock`` open, as torch does while it builds; None if none is seen."""
    for process in psutil.process_iter(["pid", "name"]):
        with suppress(psutil.Error, OSError):
            if any(Path(file.path) == lock for file in process.open_files()):
                return f"process {process.info['pid']} ({process.info['name']})"
    return None
