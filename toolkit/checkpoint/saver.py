"""Commit checkpoints: staged, written and hashed by every rank, then published by one rename."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.checkpoint import catalog, optimizer_shards
from toolkit.checkpoint.delta import BASE, MASK, Base, base_as_dict
from toolkit.checkpoint.evaluation import read_loss, write_loss
from toolkit.checkpoint.manifest import directory_name, write_manifest
from toolkit.checkpoint.rng import capture, rng_name
from toolkit.checkpoint.state import NAME as STATE
from toolkit.checkpoint.state import CheckpointState
from toolkit.engine.base import Engine
from toolkit.mask.layer_mask import LayerMask
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DiskError, FrostlineError
from toolkit.runtime.hashed_files import FileHash, explain_disk_errors, write_json, write_tensors
from toolkit.runtime.paths import sync_directory
from toolkit.runtime.safetensors_io import file_size

_Files = dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]
"""Tensors and metadata by file name."""
_Written = dict[str, FileHash] | FrostlineError
_SLACK = 2**20
"""Bytes beside tensors: indices, manifest, the file system's own."""


@dataclass(frozen=True)
class CheckpointContent:
    """The content of a checkpoint."""

    state: CheckpointState
    engine: Engine
    """What trains now."""
    resting: Mapping[str, torch.Tensor]
    """On rank 0, masters of what trained in earlier phases only."""
    mask: LayerMask
    """Of all that trained so far."""
    base: Base
    """The model this run starts from."""


class Saver:
    """Writes the checkpoints of a run, one at a time; every rank makes the same calls.

    In the background, ``save`` copies the state to the CPU and returns; a thread of each rank writes its files while
    training goes on, and ``poll`` publishes them once all ranks are done.

    Args:
        run: the run directory.
        world: all ranks.
        keep: newest checkpoints that stay, beside the best.
        in_background: do not wait for the disk.
    """

    def __init__(self, run: Path, world: World, keep: int, in_background: bool = False) -> None:
        self._run, self._world, self._keep = run, world, keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if in_background else None
        self._pending: _PendingCheckpoint | None = None

    def save(self, content: CheckpointContent, validation_follows: bool = False) -> None:
        """Commit a checkpoint, or begin to. A kill at any moment leaves the previous one in place.

        Args:
            content: of the checkpoint.
            validation_follows: older ones stay until ``record`` has its loss.

        Raises:
            DiskError: the disk has no room or does not write; the previous checkpoint and the state stay.
        """
        self.wait()
        files, documents = _pack(content, self._world)
        self._require_room(sum(file_size(tensors, meta) for tensors, meta in files.values()))
        staging = self._run / "checkpoints" / f".{directory_name(content.state.step)}.staging"
        self._on_main(f"checkpoint {staging}", lambda: (staging / optimizer_shards.FOLDER).mkdir(parents=True))
        written: Future[_Written] = Future()
        if self._executor is None:
            written.set_result(_write(staging, files, documents))
        else:
            files = {
                name: ({key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}, metadata)
                for name, (tensors, metadata) in files.items()
            }
            written = self._executor.submit(_write, staging, files, documents)
        self._pending = _PendingCheckpoint(staging, content.state.step, validation_follows, written)
        if self._executor is None:
            self._publish()

    def poll(self) -> None:
        """Publish what is being written if every rank has written its part. Call it once a step.

        Raises:
            DiskError: a rank could not write.
        """
        if self._pending is not None and not self._world.max(float(not self._pending.written.done())):
            self._publish()

    def wait(self) -> None:
        """Publish what is being written, once it is.

        Raises:
            DiskError: a rank could not write.
        """
        if self._pending is not None:
            self._publish()

    def record(self, step: int, loss: float) -> None:
        """Write the validation loss of the newest checkpoint, which is of ``step``; then remove older ones.

        Raises:
            DiskError: the disk; the checkpoint stays, without its loss.
        """
        self.wait()
        checkpoint = self._run / "checkpoints" / directory_name(step)

        def write() -> None:
            write_loss(checkpoint, loss)
            catalog.prune(self._run, checkpoint, self._keep)

        self._on_main(f"the validation loss of {checkpoint}", write)

    def loss_at(self, step: int) -> float | None:
        """Return the validation loss kept with the checkpoint of ``step``, on rank 0; elsewhere None."""
        return read_loss(self._run / "checkpoints" / directory_name(step)) if self._world.is_main else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()
        if self._executor is not None:  # after an error: what is written cannot be published without the other ranks
            self._executor.shutdown()

    def _publish(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        entries: dict[str, FileHash] = {}
        for written in self._world.all_gather_object(pending.written.result()):
            if isinstance(written, FrostlineError):
                self._remove_staging()
                raise written
            entries |= written
        self._on_main(f"checkpoint {pending.staging}", lambda: self._rename(pending, entries))

    def _rename(self, pending: _PendingCheckpoint, entries: Mapping[str, FileHash]) -> None:
        staging, final = pending.staging, self._run / "checkpoints" / directory_name(pending.step)
        write_manifest(staging, pending.step, entries)
        for directory in (*(path for path in staging.iterdir() if path.is_dir()), staging):
            sync_directory(directory)
        if final.exists():  # of this step, by a run that was resumed from before it
            final.rename(final.with_name(f".{final.name}.replaced"))
        staging.rename(final)
        sync_directory(final.parent)
        catalog.mark_latest(self._run, final)
        if not pending.validation_follows:
            catalog.prune(self._run, final, self._keep)
        catalog.clear_leftovers(self._run)

    def _require_room(self, own: int) -> None:
        needed = int(self._world.sum(own)[0]) + _SLACK

        def look() -> None:
            directory = self._run / "checkpoints"
            directory.mkdir(parents=True, exist_ok=True)
            catalog.clear_leftovers(self._run)
            free = shutil.disk_usage(directory).free
            if free < needed:
                raise DiskError(
                    f"a checkpoint needs {needed / 2**20:,.0f} MiB, {directory} has {free / 2**20:,.0f} MiB free. The "
                    "checkpoints before it are intact: free space or lower output.keep, then start the same command "
                    "again to go on from the latest"
                )

        self._on_main(f"checkpoints in {self._run}", look)

    def _on_main(self, what: str, work: Any) -> None:
        """Do ``work`` on rank 0; every rank waits for it and learns of its error."""
        error = None
        if self._world.is_main:
            try:
                with explain_disk_errors(what):
                    work()
            except FrostlineError as failed:
                error = failed
        if (shared := self._world.broadcast_object(error)) is not None:
            self._remove_staging()
            raise shared

    def _remove_staging(self) -> None:
        if self._world.is_main:
            catalog.clear_leftovers(self._run)


@dataclass(frozen=True)
class _PendingCheckpoint:
    """A checkpoint that is not published yet."""

    staging: Path
    step: int
    validation_follows: bool
    written: Future[_Written]
    """This rank's part."""


def _write(staging: Path, files: _Files, documents: Mapping[str, object]) -> _Written:
    """Write a rank's part of a checkpoint; return the hashes of its files, or why it could not be written."""
    entries = {}
    try:
        with explain_disk_errors(f"checkpoint {staging}"):
            for name, (tensors, metadata) in files.items():
                entries[name] = write_tensors(staging / name, tensors, metadata)
            for name, value in documents.items():
                entries[name] = write_json(staging / name, value)
    except FrostlineError as error:
        return error
    except Exception as error:
        return FrostlineError(f"checkpoint {staging} could not be written ({error!r})")
    return entries


def _pack(content: CheckpointContent, world: World) -> tuple[_Files, dict[str, object]]:
    """Return what this rank writes: its shard, and documents, by file name."""
    engine, step = content.engine, content.state.step
    share = optimizer_shards.fragments_of_rank(engine.fragments(), engine.is_replicated, world.rank, world.size)
    tensors, index = optimizer_shards.pack_tensors(share, content.resting if world.is_main else {})
    own = (world.rank, world.size)
    documents: dict[str, object] = {
        optimizer_shards.shard_name(*own, "json"): index,
        rng_name(*own): capture(world.device),
    }
    if world.is_main:
        documents |= {
            STATE: content.state.model_dump(),
            MASK: asdict(content.mask),
            BASE: base_as_dict(content.base),
        }
    return {
        optimizer_shards.shard_name(*own, "safetensors"): (tensors, optimizer_shards.metadata(step, *own))
    }, documents
