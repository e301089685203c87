"""Write and read the optimizer state of a checkpoint: one file of tensor slices a rank, readable by any engine."""

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

SHARD_FOLDER = "optimizer"


@dataclass(frozen=True)
class ShardSlice:
    """A slice of a tensor in a shard: an entry of its index file."""

    name: str
    start: int
    stop: int
    updates: int
    """Number of updates in the moments."""
    raw: tuple[str, ...] = ()
    """Keys of the stored tensors that are not float32; see ``FragmentState.raw``."""


def shard_name(rank: int, ranks: int, suffix: str) -> str:
    """Return the name of a rank's shard (``safetensors``) or index (``json``), relative to the checkpoint."""
    return f"{SHARD_FOLDER}/rank-{rank:05d}-of-{ranks:05d}.{suffix}"


def shard_metadata(step: int, rank: int, ranks: int) -> dict[str, str]:
    """Return the metadata of a rank's shard file, by which a shard in another's place is detected."""
    return {"step": str(step), "rank": str(rank), "ranks": str(ranks)}


def fragments_of_rank(fragments: Sequence[Fragment], is_replicated: bool, rank: int, ranks: int) -> list[Fragment]:
    """Return the fragments that this rank writes: all it holds, or its share of them if every rank holds the same."""
    if not is_replicated:
        return list(fragments)
    total = sum(fragment.stop - fragment.start for fragment in fragments)
    share, elements = [], 0
    for fragment in fragments:
        if elements * ranks // max(total, 1) == rank:
            share.append(fragment)
        elements += fragment.stop - fragment.start
    return share


def pack_tensors(
    fragments: Sequence[Fragment], resting: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the tensors of a shard, views where possible, and its index.

    ``resting`` has the whole masters of tensors that trained in an earlier phase and are frozen now, without moments.
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
    """The memory-mapped optimizer shards of a verified checkpoint, which ``ranks`` ranks wrote after ``step`` steps.

    ``mask`` is that of all tensors that had trained so far.

    Raises:
        CheckpointError: a shard is missing or belongs elsewhere, or the shards do not hold each element exactly once.
    """

    def __init__(self, checkpoint: Path, step: int, ranks: int, mask: LayerMask) -> None:
        self._checkpoint = checkpoint
        self._by_name: dict[str, list[tuple[ShardSlice, SafetensorsFile]]] = {}
        try:
            for part, file in self._open_shards(step, ranks):
                self._by_name.setdefault(part.name, []).append((part, file))
            self._check_coverage(mask)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(checkpoint, [f"{SHARD_FOLDER} cannot be read ({type(error).__name__}: {error})"]) from None

    def _open_shards(self, step: int, ranks: int) -> Iterator[tuple[ShardSlice, SafetensorsFile]]:
        """Open every rank's shard, check its metadata, and yield its slices with their file."""
        for rank in range(ranks):
            name = shard_name(rank, ranks, "safetensors")
            file = SafetensorsFile(self._checkpoint / name, writable=True)
            expected = shard_metadata(step, rank, ranks)
            if file.metadata != expected:
                raise damaged(self._checkpoint, [f"{name} says it is {file.metadata}; expected {expected}"])
            for entry in json.loads((self._checkpoint / shard_name(rank, ranks, "json")).read_text(encoding="utf-8")):
                yield ShardSlice(**{**entry, "raw": tuple(entry["raw"])}), file

    def _check_coverage(self, mask: LayerMask) -> None:
        """Check that the slices cover each tensor of the mask exactly once, in float32; sort them by start."""
        sizes = {tensor.name: tensor.parameters for tensor in mask.trainable}
        faults = [f"{name} is not in the mask" for name in self._by_name if name not in sizes]
        for name, size in sizes.items():
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
        """Return the whole master of a tensor, flat float32."""
        return self._read_range(name, MASTER, 0, self._by_name[name][-1][0].stop)

    def load(self, fragments: Sequence[Fragment]) -> None:
        """Load masters, moments and numbers of updates into an engine's fragments, whatever their layout.

        Raises:
            CheckpointError: the checkpoint holds no moments of a tensor.
        """
        try:
            for fragment in fragments:
                self._load_fragment(fragment)
        except (KeyError, ValueError) as error:
            raise damaged(
                self._checkpoint, [f"{SHARD_FOLDER} lacks something ({type(error).__name__}: {error})"]
            ) from None

    def _load_fragment(self, fragment: Fragment) -> None:
        """Load one fragment: float32 values, then the stored format exactly if slice and format are the same."""
        part, file = next(pair for pair in self._by_name[fragment.name] if pair[0].stop > fragment.start)
        values = {kind: self._read_range(fragment.name, kind, fragment.start, fragment.stop) for kind in KINDS}
        fragment.state.write(values, part.updates)
        same = (part.start, part.stop) == (fragment.start, fragment.stop)
        raw = {key: file.tensor(_key(f"raw.{key}", fragment.name)) for key in part.raw} if same else {}
        if raw and {key: (t.shape, t.dtype) for key, t in raw.items()} == {
            key: (t.shape, t.dtype) for key, t in fragment.state.raw().items()
        }:
            fragment.state.set_raw(raw)

    def _read_range(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of one kind of a tensor's state, joined from the shards that hold them."""
        parts = []
        for part, file in self._by_name[name]:
            begin, end = max(start, part.start), min(stop, part.stop)
            if begin < end:  # mapped, so only the slice is read
                parts.append(file.tensor(_key(kind, name))[begin - part.start : end - part.start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _key(kind: str, name: str) -> str:
    """Return the key of a tensor in a shard file."""
    return f"{kind}/{name}"
