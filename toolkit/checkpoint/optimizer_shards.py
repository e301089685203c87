"""Optimizer state on disk: a file of slices a rank, from which any engine reads the slices that it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.checkpoint.manifest import damaged
from toolkit.mask.layer_mask import LayerMask
from toolkit.optim.state_fragments import KINDS, MASTER, Fragment
from toolkit.runtime.safetensors_io import SafetensorsFile

FOLDER = "optimizer"


@dataclass(frozen=True)
class ShardSlice:
    """An entry of a shard's index."""

    name: str
    start: int
    stop: int
    updates: int
    """Updates that the moments have had."""
    raw: tuple[str, ...] = ()
    """Keys of what the optimizer stores where that is not float32; see ``FragmentState.raw``."""


def shard_name(rank: int, ranks: int, suffix: str) -> str:
    """Return the file name of a rank, relative to the checkpoint."""
    return f"{FOLDER}/rank-{rank:05d}-of-{ranks:05d}.{suffix}"


def metadata(step: int, rank: int, ranks: int) -> dict[str, str]:
    """Return what a shard says of itself, so that no other can take its place."""
    return {"step": str(step), "rank": str(rank), "ranks": str(ranks)}


def fragments_of_rank(fragments: Sequence[Fragment], is_replicated: bool, rank: int, ranks: int) -> list[Fragment]:
    """Return the fragments that this rank writes: what it holds, or its share of what all hold."""
    if not is_replicated:
        return list(fragments)
    total, share, done = sum(f.stop - f.start for f in fragments), [], 0
    for fragment in fragments:
        if done * ranks // max(total, 1) == rank:
            share.append(fragment)
        done += fragment.stop - fragment.start
    return share


def pack_tensors(
    fragments: Sequence[Fragment], resting: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the tensors of a shard, views where possible, and its index.

    Args:
        fragments: those this rank writes.
        resting: whole masters of what does not train now; they have no moments.
    """
    tensors: dict[str, torch.Tensor] = {}
    index: list[ShardSlice] = []
    for fragment in fragments:
        raw = fragment.state.raw()
        tensors |= {_key(kind, fragment.name): values for kind, values in fragment.state.read().items()}
        tensors |= {_key(f"raw.{key}", fragment.name): values for key, values in raw.items()}
        updates = fragment.state.updates
        index.append(ShardSlice(fragment.name, fragment.start, fragment.stop, updates, tuple(sorted(raw))))
    for name, master in resting.items():
        tensors[_key(MASTER, name)] = master.reshape(-1)
        index.append(ShardSlice(name, 0, master.numel(), 0))
    return tensors, [asdict(part) for part in index]


class OptimizerShards:
    """The shards of a checkpoint, mapped: only what is read takes memory.

    Args:
        checkpoint: verified.
        step: of it.
        ranks: that wrote it.
        mask: of all that trained so far.

    Raises:
        CheckpointError: a shard is missing, in another's place, or they do not hold each element just once.
    """

    def __init__(self, checkpoint: Path, step: int, ranks: int, mask: LayerMask) -> None:
        self._checkpoint = checkpoint
        self._by_name: dict[str, list[tuple[ShardSlice, SafetensorsFile]]] = {}
        try:
            for part, file in self._open(step, ranks):
                self._by_name.setdefault(part.name, []).append((part, file))
            self._check(mask)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(checkpoint, [f"{FOLDER} cannot be read ({type(error).__name__}: {error})"]) from None

    def _open(self, step: int, ranks: int) -> Iterator[tuple[ShardSlice, SafetensorsFile]]:
        for rank in range(ranks):
            name = shard_name(rank, ranks, "safetensors")
            file = SafetensorsFile(self._checkpoint / name, writable=True)
            expected = metadata(step, rank, ranks)
            if file.metadata != expected:
                raise damaged(self._checkpoint, [f"{name} says it is {file.metadata}; expected {expected}"])
            for entry in json.loads((self._checkpoint / shard_name(rank, ranks, "json")).read_text(encoding="utf-8")):
                yield ShardSlice(**{**entry, "raw": tuple(entry["raw"])}), file

    def _check(self, mask: LayerMask) -> None:
        wanted = {tensor.name: tensor.parameters for tensor in mask.trainable}
        faults = [f"{name} is not in the mask" for name in self._by_name if name not in wanted]
        for name, size in wanted.items():
            slices = self._by_name.setdefault(name, [])
            slices.sort(key=lambda pair: pair[0].start)
            ends = [0, *(part.stop for part, _ in slices)]
            if [part.start for part, _ in slices] != ends[:-1] or ends[-1] != size:
                faults.append(f"{name}: the shards do not hold each of its {size:,} elements just once")
            for part, file in slices:
                shape, dtype = (file.entries[_key(MASTER, name)][key] for key in ("shape", "dtype"))
                if (shape, dtype) != ([part.stop - part.start], "F32"):
                    faults.append(f"{name}: a shard has {shape} {dtype} elements of it")
        if faults:
            raise damaged(self._checkpoint, faults)

    def master(self, name: str) -> torch.Tensor:
        """Return a whole master, flat float32."""
        return self._read(name, MASTER, 0, self._by_name[name][-1][0].stop)

    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Write masters, moments and numbers of updates into fragments, whatever their layout.

        Raises:
            CheckpointError: the checkpoint holds no moments of a tensor.
        """
        try:
            for fragment in fragments:
                self._fill(fragment)
        except (KeyError, ValueError) as error:
            raise damaged(self._checkpoint, [f"{FOLDER} lacks something ({type(error).__name__}: {error})"]) from None

    def _fill(self, fragment: Fragment) -> None:
        part, file = next(pair for pair in self._by_name[fragment.name] if pair[0].stop > fragment.start)
        values = {kind: self._read(fragment.name, kind, fragment.start, fragment.stop) for kind in KINDS}
        fragment.state.write(values, part.updates)
        same = (part.start, part.stop) == (fragment.start, fragment.stop)
        raw = {key: file.tensor(_key(f"raw.{key}", fragment.name)) for key in part.raw} if same else {}
        if raw and {key: (t.shape, t.dtype) for key, t in raw.items()} == {
            key: (t.shape, t.dtype) for key, t in fragment.state.raw().items()
        }:
            fragment.state.set_raw(raw)

    def _read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        parts = []
        for part, file in self._by_name[name]:
            begin, end = max(start, part.start), min(stop, part.stop)
            if begin < end:  # mapped, so only the slice is read
                parts.append(file.tensor(_key(kind, name))[begin - part.start : end - part.start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"
