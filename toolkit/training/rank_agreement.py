"""Check that all ranks agree on recipe, DeepSpeed file, code and library versions, tokenizer and rows."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

import toolkit
from toolkit.config.flags import Invocation
from toolkit.data.dataset import Dataset
from toolkit.data.tokenizer_digest import digest, tokenizer_rules
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import require_regular, sources_hash
from toolkit.training.fingerprints import version

_LIBRARIES = ("torch", "transformers", "deepspeed")
_DIGEST_BYTES = 8


def rank_settings(invocation: Invocation) -> dict[str, str]:
    """Return this rank's recipe settings, DeepSpeed file digest and versions by name, for ``require_same``."""
    flat = {
        f"{section}.{key}": repr(value)
        for section, keys in invocation.config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    ds = invocation.deepspeed
    return {
        **flat,
        "DeepSpeed file": "none" if ds is None else _file_digest(ds),
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
    _refuse_differences(world, differences)


def _refuse_differences(world: World, differences: Sequence[str]) -> None:
    """Raise a UsageError on every rank if any has ``differences`` from rank 0; it names rank, node and difference."""
    if not world.sum(len(differences))[0]:
        return
    every = world.all_gather_object((socket.gethostname(), list(differences)))
    lines = [f"the ranks do not run the same; rank 0 is on {every[0][0]}:"]
    lines += [f"  - rank {rank} ({node}): {difference}" for rank, (node, own) in enumerate(every) for difference in own]
    lines.append("Give every node the same checkout, environment, recipe and data")
    raise UsageError("\n".join(lines))


def require_same_rows(world: World, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare rows, skipped rows and tokenizer with rank 0's; every rank calls it, and all raise if any differs.

    Ranks with other rows would train on something else than the recipe says, and with another number of them wait for
    each other for ever. One small collective, and more only where something differs.

    Raises:
        UsageError: names each rank that differs, with its node, the counts on both sides, and the first other row.
    """
    if world.size == 1:
        return
    own = {
        "tokenizer": tokenizer_rules(tokenizer)[:12],
        "chat template": digest(tokenizer.chat_template or "")[:12],
        "rows": dataset.fingerprint,
        "test": dataset.test_fingerprint,
        "skipped": digest([[row.origin, row.fault] for row in dataset.skipped]),
    }
    reference = world.broadcast_object(own)
    if not world.sum(own != reference)[0]:
        return
    differences = [
        f"the {name} is SHA-256 {own[name]}, on rank 0 {reference[name]}"
        for name in ("tokenizer", "chat template")
        if own[name] != reference[name]
    ]
    for name, rows in (("training", dataset.train), ("validation", dataset.validation), ("test", dataset.test)):
        differences += _row_differences(world, name, rows.digests[:, :_DIGEST_BYTES].tobytes(), rows.origin)
    skipped = b"".join(digest([row.origin, row.fault]).encode()[:_DIGEST_BYTES] for row in dataset.skipped)
    differences += _row_differences(world, "skipped", skipped, lambda at: dataset.skipped[at].origin)
    _refuse_differences(world, differences)


def _row_differences(world: World, name: str, digests: bytes, origin: Callable[[int], str]) -> list[str]:
    """Return how this rank's rows differ from rank 0's; every rank calls it. ``digests`` has 8 bytes a row."""
    own, theirs = (np.frombuffer(content, "<u8") for content in (digests, world.broadcast_object(digests)))
    common = min(len(own), len(theirs))
    differing = np.flatnonzero(own[:common] != theirs[:common])
    first = int(differing[0]) if len(differing) else common if len(own) != len(theirs) else None
    names = {at: origin(at) if at < len(own) else "none" for at in world.all_gather_object(first) if at is not None}
    on_main = world.broadcast_object(names)
    if first is None:
        return []
    counts = f"{len(own):,} {name} rows, on rank 0 {len(theirs):,}"
    if names[first] == on_main[first]:
        return [f"{counts}; the first that differs is {names[first]}, with other content"]
    return [f"{counts}; the first that differs is {names[first]}, on rank 0 {on_main[first]}"]


def _file_digest(path: Path) -> str:
    """Return the digest of a file as text, or why it cannot be read."""
    try:
        require_regular(path.stat(), path)
        return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        return f"unreadable ({error.strerror})"
    except ValueError as error:
        return f"unreadable ({error})"
