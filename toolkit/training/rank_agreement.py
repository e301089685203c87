"""The ranks have the same rows and tokenizer, compared before anything depends on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from toolkit.data.dataset import Dataset, SkippedRow
from toolkit.data.examples import Example
from toolkit.runtime.distributed import World
from toolkit.training.consistency import refuse_differences
from toolkit.training.fingerprints import digest, tokenizer_digest

_DIGEST = 8
"""Bytes that stand for a row."""


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
        differences += _other_rows(world, name, [_row_digest(row) for row in examples], examples)
    skipped = [digest([row.origin, row.fault]).encode()[:_DIGEST] for row in dataset.skipped]
    differences += _other_rows(world, "skipped", skipped, dataset.skipped)
    refuse_differences(world, differences)


def _other_rows(
    world: World, name: str, digests: Sequence[bytes], rows: Sequence[Example] | Sequence[SkippedRow]
) -> list[str]:
    """How this rank's rows differ from rank 0's; every rank calls it."""
    reference = world.broadcast_object(b"".join(digests))
    theirs = [reference[at : at + _DIGEST] for at in range(0, len(reference), _DIGEST)]
    if list(digests) == theirs:
        first = None
    else:
        shared = zip(digests, theirs, strict=False)
        first = next((at for at, (one, other) in enumerate(shared) if one != other), min(len(digests), len(theirs)))
    wanted = {at for at in world.all_gather_object(first) if at is not None}
    on_main = world.broadcast_object({at: _origin(rows, at) for at in wanted})
    if first is None:
        return []
    counts = f"{len(digests):,} {name} rows, on rank 0 {len(theirs):,}"
    if (mine := _origin(rows, first)) == on_main[first]:
        return [f"{counts}; the first that differs is {mine}, with other content"]
    return [f"{counts}; the first that differs is {mine}, on rank 0 {on_main[first]}"]


def _origin(rows: Sequence[Example] | Sequence[SkippedRow], at: int) -> str:
    return rows[at].origin if at < len(rows) else "none"


def _row_digest(row: Example) -> bytes:
    return hashlib.sha256(f"{row.answer_start} {row.token_ids}".encode()).digest()[:_DIGEST]
