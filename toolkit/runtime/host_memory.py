"""How much host memory this process may still take: of the machine, and of the control group that a job runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/proc/self/cgroup")
"""Control groups of this process, a line each."""
MOUNT = Path("/sys/fs/cgroup")
"""Where their files are: of version 2, or of version 1 in a directory for each controller."""


def available_host_bytes() -> int:
    """Return the bytes of host memory that can still be allocated without swapping or being killed.

    SLURM, Docker and Kubernetes limit a job by a control group, whose room may be far below the machine's. Pages of
    files count as room, as the kernel gives them up first.
    """
    return min([int(psutil.virtual_memory().available), *_room_of_groups()])


def _room_of_groups() -> Iterator[int]:
    """Yield the room of the groups of this process that limit memory, and of those above them."""
    for directory in _directories():
        for limit_name, usage_name, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            try:
                limit = (directory / limit_name).read_text().strip()
                usage = int((directory / usage_name).read_text())
                lines = (directory / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # another version's group, or one without this controller
                continue
            stat = dict(line.split(maxsplit=1) for line in lines if " " in line)
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            if limit.isdigit():  # version 2 writes "max" where there is none
                yield max(0, int(limit) - usage + files)


def _directories() -> Iterator[Path]:
    """Yield the directories of the memory groups of this process, up to the root that it sees."""
    try:
        lines = GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = MOUNT / controllers
        own = root / path.lstrip("/")
        yield own
        yield from (parent for parent in own.parents if parent.is_relative_to(root))
