"""Commit checkpoints: staged, written and hashed by every rank, then published by one rename."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
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
from toolkit.checkpoint.state import State
from toolkit.engine.base import Engine
from toolkit.mask.layer_mask import LayerMask
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DiskError, FrostlineError
from toolkit.runtime.hashed_files import FileHash, sync_directory, tensors_size, told_if_full, write_json, write_tensors

_Files = dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]
"""Tensors and metadata by file name."""
_SLACK = 2**20
"""Bytes beside tensors: indices, manifest, the file system's own."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint is made of."""

    state: State
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
    """

    def __init__(self, run: Path, world: World, keep: int, in_background: bool = False) -> None:
        """
        Args:
            run: the run directory.
            world: all ranks.
            keep: newest checkpoints that stay, beside the best.
            in_background: do not wait for the disk.
        """  # noqa: D205, D212
        self._run, self._world, self._keep, self._in_background = run, world, keep, in_background
        self._writing: _Writing | None = None

    def save(self, content: Content, validation_follows: bool = False) -> None:
        """Commit a checkpoint, or begin to. A kill at any moment leaves the previous one in place.

        Args:
            content: of the checkpoint.
            validation_follows: older ones stay until ``record`` has its loss.

        Raises:
            DiskError: the disk has no room or does not write; the previous checkpoint and the state stay.
        """
        self.wait()
        files, documents = _pack(content, self._world)
        self._require_room(sum(tensors_size(tensors, meta) for tensors, meta in files.values()))
        staging = self._run / "checkpoints" / f".{directory_name(content.state.step)}.staging"
        self._on_main(f"checkpoint {staging}", lambda: (staging / optimizer_shards.FOLDER).mkdir(parents=True))
        if self._in_background:
            files = {
                name: ({key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}, metadata)
                for name, (tensors, metadata) in files.items()
            }
        self._writing = _Writing(staging, content.state.step, files, documents)
        self._writing.validation_follows = validation_follows
        if self._in_background:
            self._writing.start()
        else:
            self._writing.run()
            self._publish()

    def poll(self) -> None:
        """Publish what is being written if every rank has written its part. Call it once a step.

        Raises:
            DiskError: a rank could not write.
        """
        if self._writing is not None and not self._world.max(float(self._writing.is_alive())):
            self._publish()

    def wait(self) -> None:
        """Publish what is being written, once it is.

        Raises:
            DiskError: a rank could not write.
        """
        if self._writing is not None:
            self._publish()

    def record(self, step: int, loss: float) -> None:
        """Write the validation loss of the newest checkpoint, which is of ``step``; then let older ones go.

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
        """On rank 0 the validation loss that ``record`` kept with the checkpoint of ``step``; else none."""
        return read_loss(self._run / "checkpoints" / directory_name(step)) if self._world.is_main else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()
        elif self._writing is not None and self._writing.is_alive():
            self._writing.join()  # without the other ranks it cannot be published

    def _publish(self) -> None:
        assert self._writing is not None
        writing, self._writing = self._writing, None
        if writing.ident is not None:
            writing.join()
        failed = [error for error in self._world.all_gather_object(writing.error) if error is not None]
        if failed:
            self._give_space_back()
            raise failed[0]
        entries = {name: entry for own in self._world.all_gather_object(writing.entries) for name, entry in own.items()}
        self._on_main(f"checkpoint {writing.staging}", lambda: self._rename(writing, entries))

    def _rename(self, writing: _Writing, entries: Mapping[str, FileHash]) -> None:
        staging, final = writing.staging, self._run / "checkpoints" / directory_name(writing.step)
        write_manifest(staging, writing.step, entries)
        for directory in (*(path for path in staging.iterdir() if path.is_dir()), staging):
            sync_directory(directory)
        if final.exists():  # of this step, by a run that was gone on from before it
            final.rename(final.with_name(f".{final.name}.replaced"))
        staging.rename(final)
        sync_directory(final.parent)
        catalog.point_at(self._run, final)
        if not writing.validation_follows:
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
                with told_if_full(what):
                    work()
            except FrostlineError as failed:
                error = failed
        if (shared := self._world.broadcast_object(error)) is not None:
            self._give_space_back()
            raise shared

    def _give_space_back(self) -> None:
        if self._world.is_main:
            catalog.clear_leftovers(self._run)


class _Writing(threading.Thread):
    """A rank's part of a checkpoint on its way to disk."""

    def __init__(self, staging: Path, step: int, files: _Files, documents: Mapping[str, object]) -> None:
        super().__init__(name="checkpoint", daemon=False)
        self.staging, self.step, self.validation_follows = staging, step, False
        self._files, self._documents = files, documents
        self.entries: dict[str, FileHash] = {}
        self.error: FrostlineError | None = None

    def run(self) -> None:
        try:
            with told_if_full(f"checkpoint {self.staging}"):
                for name, (tensors, metadata) in self._files.items():
                    self.entries[name] = write_tensors(self.staging / name, tensors, metadata)
                for name, value in self._documents.items():
                    self.entries[name] = write_json(self.staging / name, value)
        except FrostlineError as error:
            self.error = error
        except Exception as error:
            self.error = FrostlineError(f"checkpoint {self.staging} could not be written ({error!r})")
        self._files = {}


def _pack(content: Content, world: World) -> tuple[_Files, dict[str, object]]:
    """What this rank writes: its shard, and documents, by file name."""
    engine, step = content.engine, content.state.step
    share = optimizer_shards.own_share(engine.fragments(), engine.is_replicated, world.rank, world.size)
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
