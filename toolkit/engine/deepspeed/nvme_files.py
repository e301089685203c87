"""Folders on a drive that DeepSpeed swaps to when it offloads to NVMe."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.runtime.errors import ConfigError, DiskError, FrostlineError

if TYPE_CHECKING:
    from toolkit.runtime.distributed import World  # imports torch, which reading a DeepSpeed file does not need

_SECTIONS = ("offload_optimizer", "offload_param")


def check_paths(zero: dict[str, Any]) -> Iterator[str]:
    """Yield faults of a DeepSpeed file's offload to NVMe; an ``nvme_path`` of "auto" is taken out."""
    for key, section in _swapping(zero):
        if zero.get("stage") != 3:
            yield f"zero_optimization.{key}.device is 'nvme' under stage {zero.get('stage', 0)}; it needs stage 3"
        path = section.get("nvme_path", "auto")
        if not isinstance(path, str) or not path:
            yield (
                f'zero_optimization.{key}.nvme_path is {path!r}; expected a folder on the drive, or "auto" for the '
                "run's directory"
            )
        elif path == "auto":
            section.pop("nvme_path", None)


def give_folders(ds: dict[str, Any] | None, run: Path) -> None:
    """Set the folders a resolved DeepSpeed configuration swaps to: the run's own, in its directory if none is named.

    Two runs that swapped to the same folder would write over each other's state.
    """
    own = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    for _, section in _swapping((ds or {}).get("zero_optimization", {})):
        path = section.get("nvme_path")
        section["nvme_path"] = str(Path(path).expanduser() / own if path else run / "swap")


def swap_folders(ds: Mapping[str, Any] | None) -> list[Path]:
    """Return the folders that a run swaps to, after ``give_folders``."""
    return sorted({Path(section["nvme_path"]) for _, section in _swapping((ds or {}).get("zero_optimization", {}))})


def _swapping(zero: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = ((key, zero.get(key)) for key in _SECTIONS)
    return [(key, part) for key, part in found if isinstance(part, dict) and part.get("device") == "nvme"]


def make_room(ds: Mapping[str, Any] | None, world: World, needed: int) -> None:
    """Prepare the folders before DeepSpeed writes: remove an earlier run's files, check room and libaio.

    Args:
        ds: the resolved DeepSpeed configuration.
        world: every rank calls it.
        needed: bytes that each rank will write; 0 if nobody knows.

    Raises:
        ConfigError: libaio's headers are missing, or a folder cannot be made.
        DiskError: the drive is too full.
    """
    folders = swap_folders(ds)
    if not folders:
        return
    hosts = world.all_gather_object(socket.gethostname())
    here = hosts.count(hosts[world.rank])
    refused = _prepare(folders, needed * here) if world.local_rank == 0 else None
    failed = [error for error in world.all_gather_object(refused) if error is not None]
    if failed:
        raise failed[0]


def _prepare(folders: list[Path], needed: int) -> FrostlineError | None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        reason = (
            "offload to NVMe needs libaio and its headers, which are not installed (Debian: apt install libaio-dev)"
        )
        return ConfigError([reason], "DeepSpeed file")
    for folder in folders:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return ConfigError([f"nvme_path: {folder} cannot be made ({error.strerror or error})"], "DeepSpeed file")
        if free < needed:
            return DiskError(
                f"offload to NVMe needs {needed / 2**20:,.0f} MiB in {folder}, {free / 2**20:,.0f} MiB are free: free "
                'space, name a folder on another drive in nvme_path, or write device: "cpu"'
            )
    return None


def clear(ds: Mapping[str, Any] | None, world: World) -> None:
    """Remove the files of a run that has ended; every rank calls it."""
    folders = swap_folders(ds)
    if folders:
        world.barrier()
        for folder in folders if world.local_rank == 0 else ():
            shutil.rmtree(folder, ignore_errors=True)
