"""Checkpoints: staged, then published by one rename, then named by ``latest``.

``checkpoints/step-00000120/`` holds ``delta/`` (the trained tensors in float32, see ``toolkit.delta``), ``engine/``
(optimizer and schedule) and ``state.json`` (position).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from toolkit.delta import Base, Delta, describe_difference, read_delta, save_delta
from toolkit.distributed import World
from toolkit.engine.base import Engine
from toolkit.errors import CheckpointError
from toolkit.files import replace_text
from toolkit.mask.layer_mask import LayerMask

_LATEST = "latest"


@dataclass(frozen=True)
class State:
    """Where a checkpoint stands, and what can continue it."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps of the whole run."""
    engine: str
    ranks: int
    data: str
    """Fingerprint of the rows it learns from (``toolkit.data.dataset.Dataset.fingerprint``)."""
    schedule: str
    """Fingerprint of what trains when (``toolkit.mask.schedule.Schedule.sha256``)."""

    @property
    def finished(self) -> bool:
        """True at the end of the run."""
        return self.step >= self.total_steps


def checkpoints_of(run: Path) -> list[Path]:
    """Committed checkpoints of a run directory, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def latest_checkpoint(run: Path) -> Path | None:
    """The newest committed checkpoint; none where the run has not committed any.

    Raises:
        CheckpointError: ``latest`` names a checkpoint that is not there.
    """
    pointer = run / "checkpoints" / _LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_bytes().decode(errors="replace").strip()
    checkpoint = pointer.parent / name
    if not re.fullmatch(r"step-\d+", name) or not checkpoint.is_dir():  # a pointer leads nowhere else
        present = ", ".join(path.name for path in checkpoints_of(run)) or "none"
        raise CheckpointError(
            f"{pointer} names {name[:100]!r}, which is not there; checkpoints present: {present}. "
            "Write one of those names into the file, or start a new run with another --output.dir"
        )
    return checkpoint


def read_state(checkpoint: Path) -> State:
    """The position of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        state = State(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
        for name, kind in State.__annotations__.items():
            if type(getattr(state, name)).__name__ != kind:
                raise TypeError(f"{name} is {str(getattr(state, name))[:100]!r}, expected {kind}")
        return state
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}/state.json cannot be read ({error}); the checkpoint is damaged") from None


def commit(
    run: Path,
    state: State,
    engine: Engine,
    resting: Mapping[str, torch.Tensor],
    mask: LayerMask,
    base: Base,
    world: World,
    keep: int,
) -> Path:
    """Write a checkpoint; every rank calls it. A kill at any moment leaves the previous one in place.

    Args:
        run: the run directory.
        state: the position.
        engine: what trains now.
        resting: masters of what trained in earlier phases only; on rank 0.
        mask: of all that trained so far.
        base: the model this run starts from.
        world: all ranks.
        keep: checkpoints that stay.

    Returns:
        The committed directory.
    """
    final = run / "checkpoints" / f"step-{state.step:08d}"
    staging = final.with_name(f".{final.name}.staging")
    if world.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "engine").mkdir(parents=True)
    world.barrier()
    engine.save(staging / "engine")
    masters = engine.masters()
    if world.is_main:
        save_delta(Delta({**resting, **masters}, mask, base), staging / "delta")
        (staging / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    world.barrier()
    if world.is_main:
        _flush(staging)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        replace_text(final.parent / _LATEST, final.name)
        for old in checkpoints_of(run)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def read_fitting(checkpoint: Path, now: State, mask: LayerMask, base: Base) -> Delta:
    """The trained tensors of a checkpoint that this run can go on from; ``Engine.load`` takes the rest.

    Args:
        checkpoint: a committed one.
        now: what this run would write; all but its step must agree with the checkpoint.
        mask: of all that this run trains up to the checkpoint's step.
        base: the model this run starts from.

    Raises:
        CheckpointError: another engine, number of ranks, mask, schedule, base model or data, or it is damaged; lists
            all differences.
    """
    state = read_state(checkpoint)
    delta = read_delta(checkpoint / "delta")
    differences = []
    if (state.engine, state.ranks) != (now.engine, now.ranks):
        differences.append(
            f"it was written by engine {state.engine} on {state.ranks} ranks; this run is {now.engine} on {now.ranks}"
        )
    if difference := describe_difference(delta.mask, mask):
        differences.append(f"it was trained with another mask: {difference}")
    elif state.schedule != now.schedule:
        differences.append("it was trained under another mask.schedule: phases begin, end or train otherwise")
    if delta.base.sha256 != base.sha256:
        differences.append(f"the weights of {base.config.name_or_path} have changed since (SHA-256 differs)")
    if (state.data, state.total_steps) != (now.data, now.total_steps):
        differences.append(f"the rows have changed since: {state.total_steps} steps in all then, {now.total_steps} now")
    if differences:
        listed = "\n".join(f"  - {difference}" for difference in differences)
        raise CheckpointError(
            f"{checkpoint} does not fit this run:\n{listed}\n"
            "Restore what changed, or start anew with another --output.dir"
        )
    return delta


def _flush(directory: Path) -> None:
    """Force every file of ``directory`` to disk before its name is published."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
