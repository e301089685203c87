"""Check that all ranks agree on recipe, DeepSpeed file, code and library versions, tokenizer and rows."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase

import toolkit
from toolkit.config.flags import Invocation
from toolkit.data.dataset import Dataset
from toolkit.data.examples import Example
from toolkit.data.sources import Row
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import sources_hash
from toolkit.training.fingerprints import digest, tokenizer_digest, version

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
        "tokenizer": tokenizer_digest(tokenizer)[:12],
        "chat template": digest(tokenizer.chat_template or "")[:12],
        "rows": dataset.fingerprint,
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
    for name, examples in (("training", dataset.train), ("validation", dataset.validation)):
        differences += _row_differences(world, name, [_row_digest(row) for row in examples], examples)
    skipped = [digest([row.origin, row.fault]).encode()[:_DIGEST_BYTES] for row in dataset.skipped]
    differences += _row_differences(world, "skipped", skipped, dataset.skipped)
    _refuse_differences(world, differences)


def _row_differences(
    world: World, name: str, digests: Sequence[bytes], rows: Sequence[Example] | Sequence[Row]
) -> list[str]:
    """Return how this rank's rows differ from rank 0's; every rank calls it."""
    reference = world.broadcast_object(b"".join(digests))
    theirs = [reference[at : at + _DIGEST_BYTES] for at in range(0, len(reference), _DIGEST_BYTES)]
    differing = (at for at, (own, other) in enumerate(zip_longest(digests, theirs)) if own != other)
    first = next(differing, None)
    on_main = world.broadcast_object({at: _row_origin(rows, at) for at in world.all_gather_object(first)})
    if first is None:
        return []
    counts = f"{len(digests):,} {name} rows, on rank 0 {len(theirs):,}"
    if (origin := _row_origin(rows, first)) == on_main[first]:
        return [f"{counts}; the first that differs is {origin}, with other content"]
    return [f"{counts}; the first that differs is {origin}, on rank 0 {on_main[first]}"]


def _row_origin(rows: Sequence[Example] | Sequence[Row], at: int | None) -> str:
    return rows[at].origin if at is not None and at < len(rows) else "none"


def _row_digest(row: Example) -> bytes:
    """Return a short digest of a row's tokens and of where its answer starts."""
    return hashlib.sha256(f"{row.answer_start} {row.token_ids}".encode()).digest()[:_DIGEST_BYTES]


def _file_digest(path: Path) -> str:
    """Return the digest of a file as text, or why it cannot be read."""
    try:
        return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        return f"unreadable ({error.strerror})"
