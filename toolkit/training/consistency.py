"""What every rank must have in common, compared at the start: recipe, DeepSpeed file, code and library versions."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import toolkit
from toolkit.config.flags import Invocation
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import sources_hash

_LIBRARIES = ("torch", "transformers", "deepspeed")


def facts(invocation: Invocation) -> dict[str, str]:
    """What this rank is about to run, by name; values are compared as text."""
    flat = {
        f"{section}.{key}": repr(value)
        for section, keys in invocation.config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    ds = invocation.deepspeed
    return {
        **flat,
        "DeepSpeed file": "none" if ds is None else _content(ds),
        "frostline": f"{toolkit.__version__} (sources {sources_hash(Path(toolkit.__file__).parent)})",
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def require_same(world: World, own: Mapping[str, str]) -> None:
    """Compare ``own`` with rank 0's; every rank calls it, and all raise if any differs.

    Raises:
        UsageError: names each rank that differs, with its node, in what, and both values.
    """
    if world.size == 1:
        return
    reference = world.broadcast_object(dict(own))
    names = [*reference, *(name for name in own if name not in reference)]
    differences = [
        f"{name} is {own.get(name, 'unknown')}, on rank 0 {reference.get(name, 'unknown')}"
        for name in names
        if own.get(name) != reference.get(name)
    ]
    refuse_differences(world, differences)


def refuse_differences(world: World, differences: Sequence[str]) -> None:
    """End the run on every rank if any rank differs from rank 0; every rank calls it.

    Args:
        world: this process among the run's.
        differences: of this rank, each with its own value and rank 0's.

    Raises:
        UsageError: there are some; names each rank that differs, with its node and its differences.
    """
    if not world.sum(len(differences))[0]:
        return
    every = world.all_gather_object((socket.gethostname(), list(differences)))
    lines = [
        f"  - rank {rank} ({node}): {difference}" for rank, (node, found) in enumerate(every) for difference in found
    ]
    raise UsageError(
        "\n".join(
            [
                f"the ranks do not run the same; rank 0 is on {every[0][0]}:",
                *lines,
                "Give every node the same checkout, environment, recipe and data",
            ]
        )
    )


def _content(path: Path) -> str:
    try:
        return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        return f"unreadable ({error.strerror})"


def version(name: str) -> str:
    """Of an installed library, or ``not installed``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
