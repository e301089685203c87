"""Check, assign, prepare and remove the folders that DeepSpeed swaps to when it offloads to NVMe."""

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


def check_nvme_paths(zero: dict[str, Any]) -> Iterator[str]:
    """Yield faults of the NVMe offload in a ``zero_optimization`` section; remove an ``nvme_path`` of "auto" from it.

    ``assign_swap_folders`` later sets the folder that "auto" stands for.
    """
    for key, section in nvme_sections(zero):
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


def assign_swap_folders(ds: dict[str, Any] | None, run: Path) -> None:
    """Set the folders to swap to: one of this run below each ``nvme_path``, or in the run directory without one.

    Two runs that swap to the same folder would overwrite each other's state.

    Args:
        ds: resolved DeepSpeed configuration, changed in place; None for a run without DeepSpeed.
        run: the run directory.
    """
    folder = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    for _, section in nvme_sections((ds or {}).get("zero_optimization", {})):
        path = section.get("nvme_path")
        section["nvme_path"] = str(Path(path).expanduser() / folder if path else run / "swap")


def swap_folders(ds: Mapping[str, Any] | None) -> list[Path]:
    """Return the folders that a run swaps to, once ``assign_swap_folders`` has set them."""
    return sorted({Path(section["nvme_path"]) for _, section in nvme_sections((ds or {}).get("zero_optimization", {}))})


def nvme_sections(zero: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the offload sections whose device is NVMe, by key."""
    sections = ((key, zero.get(key)) for key in _SECTIONS)
    return [(key, part) for key, part in sections if isinstance(part, dict) and part.get("device") == "nvme"]


def prepare_swap_folders(ds: Mapping[str, Any] | None, world: World, needed: int) -> None:
    """Empty and create the swap folders before DeepSpeed writes, and check disk space and libaio; every rank calls it.

    Args:
        ds: resolved DeepSpeed configuration; None for a run without DeepSpeed.
        world: this process among all ranks.
        needed: bytes that each rank will write; 0 if unknown.

    Raises:
        ConfigError: libaio's headers are missing, or a folder cannot be created.
        DiskError: the drive has too little free space.
    """
    folders = swap_folders(ds)
    if not folders:
        return
    hosts = world.all_gather_object(socket.gethostname())
    ranks_on_node = hosts.count(hosts[world.rank])
    error = _prepare_on_node(folders, needed * ranks_on_node) if world.local_rank == 0 else None
    errors = [found for found in world.all_gather_object(error) if found is not None]
    if errors:
        raise errors[0]


def _prepare_on_node(folders: list[Path], needed: int) -> FrostlineError | None:
    """Empty and create the folders on this node; return the error if that fails or ``needed`` bytes are not free."""
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


def remove_swap_folders(ds: Mapping[str, Any] | None, world: World) -> None:
    """Remove the swap folders of a finished run; every rank calls it."""
    folders = swap_folders(ds)
    if folders:
        world.barrier()
        for folder in folders if world.local_rank == 0 else ():
            shutil.rmtree(folder, ignore_errors=True)
