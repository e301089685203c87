"""What the tests of checkpoints share: their files, damage to them, and shards cut otherwise than any run would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import reseal
from safetensors import safe_open
from safetensors.torch import load_file

from toolkit.checkpoint.optimizer_shards import shard_metadata, shard_name
from toolkit.checkpoint.restore import Checkpoint
from toolkit.optim.state_fragments import KINDS
from toolkit.runtime.hashed_files import write_json, write_tensors


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run directory that a test may spoil."""
    return Path(shutil.copytree(run, folder / "run"))


def point_to(run: Path, step: int) -> Path:
    """As if the job had been killed after ``step``; its checkpoint."""
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")
    return run / "checkpoints" / f"step-{step:08d}"


def edit_state(checkpoint: Path, **values: object) -> None:
    """Change a checkpoint's state, manifest included."""
    path = checkpoint / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    reseal(checkpoint)


def files_of(checkpoint: Path) -> list[str]:
    """The names of all its files."""
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def recut(checkpoint: Path, ranks: int) -> None:
    """Write the optimizer's state as ``ranks`` ranks of ZeRO would: all tensors end to end, then in equal parts."""
    opened = Checkpoint(checkpoint)
    stretches = [
        (tensor.name, tensor.parameters, opened.shards._by_name[tensor.name][0][0].updates)
        for tensor in opened.mask.trainable
    ]
    whole = {
        (kind, name): opened.shards._read_range(name, kind, 0, size).clone()
        for name, size, _ in stretches
        for kind in KINDS
    }
    total = sum(size for _, size, _ in stretches)
    shutil.rmtree(checkpoint / "optimizer")
    (checkpoint / "optimizer").mkdir()
    for rank in range(ranks):
        low, high = (total * (rank + end) // ranks for end in (0, 1))
        tensors: dict[str, torch.Tensor] = {}
        index = []
        begin = 0
        for name, size, updates in stretches:
            start, stop = max(low - begin, 0), min(high - begin, size)
            if start < stop:
                tensors |= {f"{kind}/{name}": whole[kind, name][start:stop] for kind in KINDS}
                index.append({"name": name, "start": start, "stop": stop, "updates": updates, "raw": []})
            begin += size
        write_tensors(
            checkpoint / shard_name(rank, ranks, "safetensors"), tensors, shard_metadata(opened.state.step, rank, ranks)
        )
        write_json(checkpoint / shard_name(rank, ranks, "json"), index)
    edit_state(checkpoint, ranks=ranks)


def rewrite_shard(checkpoint: Path, name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write a shard anew after ``change`` of one tensor, manifest included."""
    tensors = {own: tensor.clone() for own, tensor in load_file(checkpoint / name).items()}
    with safe_open(checkpoint / name, framework="pt") as file:
        said = file.metadata()
    write_tensors(checkpoint / name, {**tensors, key: change(tensors[key])}, said)
    reseal(checkpoint)
