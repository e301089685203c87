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


def check_nvme_paths(ds_config: dict[str, Any]) -> Iterator[str]:
    """Yield faults of the NVMe offload; remove an ``nvme_path`` of "auto", which ``assign_swap_folders`` fills in."""
    stage = ds_config["zero_optimization"].get("stage", 0)
    for key, section in nvme_sections(ds_config).items():
        if stage != 3:
            yield f"zero_optimization.{key}.device is 'nvme' under stage {stage}; it needs stage 3"
        path = section.get("nvme_path", "auto")
        if not isinstance(path, str) or not path:
            yield (
                f'zero_optimization.{key}.nvme_path is {path!r}; expected a folder on the drive, or "auto" for the '
                "run's directory"
            )
        elif path == "auto":
            section.pop("nvme_path", None)


def assign_swap_folders(ds_config: dict[str, Any] | None, run: Path) -> None:
    """Set the folders to swap to: one of this run below each ``nvme_path``, or in the run directory without one.

    ``ds_config`` is changed in place; None for a run without DeepSpeed. Two runs that swap to the same folder would
    overwrite each other's state.
    """
    folder = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    for section in nvme_sections(ds_config).values():
        path = section.get("nvme_path")
        section["nvme_path"] = str(Path(path).expanduser() / folder if path else run / "swap")


def swap_folders(ds_config: Mapping[str, Any] | None) -> list[Path]:
    """Return the folders that a run swaps to, once ``assign_swap_folders`` has set them."""
    return sorted({Path(section["nvme_path"]) for section in nvme_sections(ds_config).values()})


def nvme_sections(ds_config: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the offload sections whose device is NVMe, by key."""
    zero = (ds_config or {}).get("zero_optimization", {})
    sections = {key: zero.get(key) for key in ("offload_optimizer", "offload_param")}
    return {key: part for key, part in sections.items() if isinstance(part, dict) and part.get("device") == "nvme"}


def prepare_swap_folders(ds_config: Mapping[str, Any] | None, world: World, bytes_per_rank: int) -> None:
    """Empty and create the swap folders before DeepSpeed writes, and check disk space and libaio; every rank calls it.

    ``bytes_per_rank`` are those that each rank will write; 0 if unknown.

    Raises:
        ConfigError: libaio's headers are missing, or a folder cannot be created.
        DiskError: the drive has too little free space.
    """
    folders = swap_folders(ds_config)
    if not folders:
        return
    hosts = world.all_gather_object(socket.gethostname())
    ranks_on_node = hosts.count(hosts[world.rank])
    error = _prepare_on_node(folders, bytes_per_rank * ranks_on_node) if world.local_rank == 0 else None
    for error_of_rank in world.all_gather_object(error):
        if error_of_rank is not None:
            raise error_of_rank


def _prepare_on_node(folders: list[Path], needed_bytes: int) -> FrostlineError | None:
    """Empty and create the folders; return the error if that fails or ``needed_bytes`` are not free in each."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        reason = "offload to NVMe needs libaio and its headers, which are not installed"
        return ConfigError([f"{reason} (Debian: apt install libaio-dev)"], "DeepSpeed file")
    for folder in folders:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return ConfigError([f"nvme_path: {folder} cannot be made ({error.strerror or error})"], "DeepSpeed file")
        if free < needed_bytes:
            return DiskError(
                f"offload to NVMe needs {needed_bytes / 2**20:,.0f} MiB in {folder}, {free / 2**20:,.0f} MiB are free: "
                'free space, name a folder on another drive in nvme_path, or write device: "cpu"'
            )
    return None


def remove_swap_folders(ds_config: Mapping[str, Any] | None, world: World) -> None:
    """Remove the swap folders of a finished run; every rank calls it."""
    folders = swap_folders(ds_config)
    if folders:
        world.barrier()
        for folder in folders if world.local_rank == 0 else ():
            shutil.rmtree(folder, ignore_errors=True)
