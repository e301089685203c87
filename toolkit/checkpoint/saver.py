"""Save checkpoints: every rank writes and hashes its files in a staging directory, which one rename publishes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from toolkit.checkpoint import catalog, optimizer_shards
from toolkit.checkpoint.delta import BASE_FILE, MASK_FILE, Base, base_as_dict
from toolkit.checkpoint.host_copy import HostCopy
from toolkit.checkpoint.manifest import directory_name, write_manifest
from toolkit.checkpoint.rng import capture, rng_name
from toolkit.checkpoint.state import STATE_FILE, CheckpointState
from toolkit.checkpoint.validation_score import ValidationScore, read_validation_score, write_validation_score
from toolkit.engine.base import Engine
from toolkit.mask.layer_mask import LayerMask
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DiskError, FrostlineError
from toolkit.runtime.hashed_files import FileHash, explain_disk_errors, write_json, write_tensors
from toolkit.runtime.paths import replace_text, sync_directory
from toolkit.runtime.safetensors_io import file_size

log = logging.getLogger("frostline")

_WriteResult = dict[str, FileHash] | FrostlineError
"""Hash of each file that a rank wrote, or the error that stopped it."""
_SLACK = 2**20
"""Bytes to reserve besides tensors: indices, manifest, file system overhead."""


@dataclass(frozen=True)
class CheckpointContent:
    """The content of a checkpoint, before it is written."""

    state: CheckpointState
    engine: Engine
    """Engine of the current phase, with the state of the tensors that train now."""
    resting: Mapping[str, torch.Tensor]
    """On rank 0, masters of the tensors that trained in an earlier phase and are frozen now."""
    mask: LayerMask
    """Mask of all tensors that have trained so far."""
    base: Base
    """The model that the run started from."""


class Saver:
    """Write the checkpoints of a run, one at a time; every rank makes the same calls.

    With ``in_background``, ``save`` copies the state to the CPU and returns; a thread of each rank writes its files
    while training goes on, and ``poll`` publishes them once all ranks are done. Without memory for the copy ``save``
    writes the files itself. ``keep`` newest checkpoints stay, and the best one.
    """

    def __init__(self, run: Path, world: World, keep: int, in_background: bool = False) -> None:
        self._run, self._world, self._keep = run, world, keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if in_background else None
        self._copy = HostCopy(world.device.type == "cuda", world.size)
        self._pending: _PendingCheckpoint | None = None

    @property
    def commits_alone(self) -> bool:
        """Return whether the thread of a save in the background also publishes it, as no other rank has to join in.

        Then nothing that ends the run, or its validation, loses a checkpoint whose files are written.
        """
        return self._world.size == 1

    def save(self, content: CheckpointContent, validation_follows: bool = False) -> None:
        """Save a checkpoint, or start to in the background. A kill at any moment leaves the previous one in place.

        With ``validation_follows``, older checkpoints are kept until ``record_score`` has that of this one.

        Raises:
            DiskError: the disk is full or cannot be written; the previous checkpoint stays.
        """
        self.wait()
        files = _files_of_rank(content, self._world)
        self._require_room(file_size(files.tensors, files.metadata))
        staging = self._run / "checkpoints" / f".{directory_name(content.state.step)}.staging"
        self._on_main(f"checkpoint {staging}", lambda: _make_staging(staging))
        pending = _PendingCheckpoint(staging, content.state.step, validation_follows)
        in_background = self._executor is not None and self._copy.fits(files.tensors)
        if self._executor is not None and in_background:
            copies, copied = self._copy.take(files.tensors)
            pending.commits_alone = self.commits_alone
            pending.written = self._executor.submit(self._write, pending, replace(files, tensors=copies), copied)
        else:
            pending.written.set_result(_write_files(staging, files))
        self._pending = pending
        if self._executor is None or (self.commits_alone and not in_background):
            self._publish()

    @property
    def has_written(self) -> bool:
        """True if this rank has written its files of the pending checkpoint; False if none is pending."""
        return self._pending is not None and self._pending.written.done()

    def poll(self, all_have_written: bool) -> None:
        """Publish the pending checkpoint if ``has_written`` is true on every rank, once a step; raises as ``save``."""
        if self._pending is not None and all_have_written:
            self._publish()

    def wait(self) -> None:
        """Wait for the pending checkpoint, if there is one, and publish it; raises as ``save``."""
        if self._pending is not None:
            self._publish()

    def record_score(self, step: int, score: ValidationScore) -> None:
        """Write the validation score of the newest checkpoint, which must be of ``step``; then remove old checkpoints.

        Raises:
            DiskError: the file cannot be written; the checkpoint stays, without it.
        """
        self.wait()
        checkpoint = self._run / "checkpoints" / directory_name(step)

        def write_and_prune() -> None:
            write_validation_score(checkpoint, score)
            catalog.prune(self._run, checkpoint, self._keep)

        self._on_main(f"the validation score of {checkpoint}", write_and_prune)

    def saved_score(self, step: int) -> ValidationScore | None:
        """Return the validation score saved with the checkpoint of ``step``; None if there is none."""
        return read_validation_score(self._run / "checkpoints" / directory_name(step))

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()
        # after an error, what other ranks would have to publish is dropped
        if self._executor is not None:
            self._executor.shutdown()
        if self._pending is not None and isinstance(failure := self._pending.written.result(), FrostlineError):
            log.warning("%s", failure)

    def _write(self, pending: _PendingCheckpoint, files: _RankFiles, copied: torch.cuda.Event | None) -> _WriteResult:
        """Write this rank's files in a thread, and publish the checkpoint if no other rank has to; as _write_files."""
        result = _write_files(pending.staging, files, copied)
        if not pending.commits_alone or isinstance(result, FrostlineError):
            return result
        try:
            with explain_disk_errors(f"checkpoint {pending.staging}"):
                self._commit(pending, [result])
        except FrostlineError as error:
            return error
        except Exception as error:
            return FrostlineError(f"checkpoint {pending.staging} could not be published ({error!r})")
        return result

    def _publish(self) -> None:
        """Wait until every rank has written its files, then commit the pending checkpoint; every rank calls it."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        results = self._world.all_gather_object(pending.written.result())

        def commit_unless_done() -> None:
            written = [result for result in results if not isinstance(result, FrostlineError)]
            for failure in results:
                if isinstance(failure, FrostlineError):
                    raise failure
            if not pending.commits_alone:
                self._commit(pending, written)

        self._on_main(f"checkpoint {pending.staging}", commit_unless_done)

    def _commit(self, pending: _PendingCheckpoint, written: Sequence[Mapping[str, FileHash]]) -> None:
        """Write the manifest, sync, rename the staging directory, and remove old checkpoints; on rank 0 only.

        ``written`` are the hashes of each rank's files.
        """
        staging, final = pending.staging, self._run / "checkpoints" / directory_name(pending.step)
        entries = {name: file for of_rank in written for name, file in of_rank.items()}
        write_manifest(staging, pending.step, entries)
        for directory in (*(path for path in staging.iterdir() if path.is_dir()), staging):
            sync_directory(directory)
        catalog.make_way(final)
        staging.rename(final)
        sync_directory(final.parent)
        replace_text(final.with_name(catalog.LATEST_FILE), final.name)
        if not pending.validation_follows:
            catalog.prune(self._run, final, self._keep)
        catalog.clear_leftovers(self._run)

    def _require_room(self, bytes_of_rank: int) -> None:
        """Refuse to start a checkpoint, which takes the sum over ranks, if the disk has too little free space."""
        needed = int(self._world.sum(bytes_of_rank)[0]) + _SLACK

        def check_free_space() -> None:
            directory = self._run / "checkpoints"
            directory.mkdir(exist_ok=True)  # without parents: a run that was moved away is not begun anew here
            catalog.clear_leftovers(self._run)
            free = shutil.disk_usage(directory).free
            if free < needed:
                raise DiskError(
                    f"a checkpoint needs {needed / 2**20:,.0f} MiB, {directory} has {free / 2**20:,.0f} MiB free. The "
                    "checkpoints before it are intact: free space or lower output.keep, then start the same command "
                    "again to go on from the latest"
                )

        self._on_main(f"checkpoints in {self._run}", check_free_space)

    def _on_main(self, what: str, work: Callable[[], object]) -> None:
        """Run ``work`` on rank 0; raise its error on every rank, after removing what was staged.

        ``what`` names the file in disk errors.
        """

        def work_or_clean_up() -> None:
            try:
                with explain_disk_errors(what):
                    work()
            except FrostlineError:
                catalog.clear_leftovers(self._run)
                raise

        self._world.on_main(work_or_clean_up)


def _make_staging(staging: Path) -> None:
    """Create the directory that a checkpoint is written to; a link in its place is not followed."""
    try:
        staging.mkdir()
    except FileExistsError:
        raise FrostlineError(
            f"{staging} is in the way of a checkpoint and holds what no run has left there; move it, then start the "
            "same command again"
        ) from None
    (staging / optimizer_shards.SHARD_FOLDER).mkdir()


@dataclass
class _PendingCheckpoint:
    """A checkpoint whose files are being written."""

    staging: Path
    step: int
    validation_follows: bool
    written: Future[_WriteResult] = field(default_factory=Future)
    """Result of writing this rank's files."""
    commits_alone: bool = False
    """True if the thread that writes them publishes the checkpoint too, so that this is done with ``written``."""


@dataclass(frozen=True)
class _RankFiles:
    """The files that a rank writes: its optimizer shard, and JSON documents by file name."""

    shard: str
    """File name of the shard."""
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    documents: Mapping[str, object]


def _write_files(staging: Path, files: _RankFiles, copied: torch.cuda.Event | None = None) -> _WriteResult:
    """Write this rank's files once the event ``copied`` has come; return their hashes, or the error.

    It returns errors because it runs in a thread, and ``_publish`` tells every rank of them.
    """
    try:
        if copied is not None:
            copied.synchronize()
        with explain_disk_errors(f"checkpoint {staging}"):
            entries = {files.shard: write_tensors(staging / files.shard, files.tensors, files.metadata)}
            for name, value in files.documents.items():
                entries[name] = write_json(staging / name, value)
    except FrostlineError as error:
        return error
    except Exception as error:
        return FrostlineError(f"checkpoint {staging} could not be written ({error!r})")
    return entries


def _files_of_rank(content: CheckpointContent, world: World) -> _RankFiles:
    """Return the files that this rank writes; rank 0's have the state, mask and base model of the run."""
    engine = content.engine
    fragments = optimizer_shards.fragments_of_rank(engine.fragments(), engine.is_replicated, world.rank, world.size)
    tensors, index = optimizer_shards.pack_tensors(fragments, content.resting if world.is_main else {})
    documents: dict[str, object] = {
        optimizer_shards.shard_name(world.rank, world.size, "json"): index,
        rng_name(world.rank, world.size): capture(world.device),
    }
    if world.is_main:
        documents |= {
            STATE_FILE: content.state.model_dump(),
            MASK_FILE: content.mask.as_dict(),
            BASE_FILE: base_as_dict(content.base),
        }
    shard = optimizer_shards.shard_name(world.rank, world.size, "safetensors")
    metadata = optimizer_shards.shard_metadata(content.state.step, world.rank, world.size)
    return _RankFiles(shard, tensors, metadata, documents)
