"""Offloaded blocks are copied ahead through two buffers: the same bits, locked once, however far the host is ahead."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_streams import FakeGpu
from helpers import tiny_llama
from test_zoo import masked

from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.frozen.block_stream import BlockStream
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.disk_offload import OnDisk
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import split

BLOCKS = 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))


def offloaded(precision: Any, place: Any) -> tuple[Prefix, FrozenWeights]:
    """The prefix of four blocks of a model of six, its weights stored so."""
    model = tiny_llama()
    masked(model, "last:2", "head")
    anatomy = detect_anatomy(model)
    blocks = [f"{anatomy.blocks}.{index}" for index in range(BLOCKS)]
    frozen = FrozenWeights(model, blocks, anatomy.embeddings, torch.device("cpu"), {})
    prefix, _ = split(model, anatomy, BLOCKS, frozen)
    assert prefix is not None
    frozen.place_weights(prefix.model, precision, place)
    return prefix.eval(), frozen


def batch() -> Batch:
    return collate([Example.with_answer(tuple(range(3, 20)), 9)], 0)


@pytest.mark.parametrize("precision", ["model", "int8", "nf4"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("refuses", [False, True])
def test_streamed_blocks_have_the_bits_of_those_that_stay(
    request: Any, said: list[str], precision: str, place: str, refuses: bool
) -> None:
    row = batch()
    expected = offloaded(precision, "device")[0](row)
    gpu: FakeGpu = request.getfixturevalue("gpu")
    gpu.refuses = refuses
    prefix, _ = offloaded(precision, place)
    before, locked = gpu.counts.copy(), len(gpu.pinned)
    for _ in range(3):
        assert torch.equal(prefix(row), expected)
    counts = gpu.counts - before
    assert counts["copies"] == counts["main waits"] == 3 * BLOCKS, "one copy a block, and the device waits for it"
    assert counts["side waits"] == 3 * BLOCKS, "no buffer is filled while a block computes from it"
    staged = place == "disk" or refuses
    assert counts["host waits"] <= (3 * BLOCKS if staged else 0)
    if not refuses:
        assert len(gpu.pinned) - locked == (2 if staged else 0), "locked once, before the passes"
    assert len([line for line in said if "page-locked" in line]) == refuses


def test_a_pass_has_two_buffers_on_the_device_and_none_after_it(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, frozen = offloaded("model", "cpu")
    stream, taken = frozen._stream, []
    assert stream is not None
    take = BlockStream.take

    def watched(self: BlockStream, weights: Any) -> torch.Tensor:
        memory = take(self, weights)
        taken.append(memory.untyped_storage().data_ptr())
        assert sum(buffer.memory.nbytes for buffer in self._buffers) == 2 * max(u.flat_bytes for u in frozen.units[1:])
        return memory

    monkeypatch.setattr(BlockStream, "take", watched)
    gpu.counts.clear()
    prefix(batch())
    assert list(Counter(taken).values()) == [2, 2], "they take turns"
    assert stream._buffers == []
    assert gpu.counts["recorded"] == 0, "the next pass may have their memory at once"


def test_a_buffer_waits_for_the_block_that_computed_from_it_last(gpu: FakeGpu) -> None:
    """The fake main stream counts what it computes: a copy waits for an event no older than its buffer's release."""
    prefix, frozen = offloaded("model", "cpu")
    stream = frozen._stream
    assert stream is not None
    released: list[int] = []
    release = stream.release

    def watched() -> None:
        gpu.main.issued += 1
        release()
        released.append(gpu.main.issued)

    stream.release = watched  # type: ignore[method-assign]
    seen = stream._copies.stream.seen  # type: ignore[attr-defined]
    seen.clear()
    prefix(batch())
    waits = [event.position for event in seen]
    assert released == [1, 2, 3, 4]
    assert waits == [0, 0, 1, 2], "block 2 goes where block 0 was, block 3 where block 1 was"


def test_a_pass_that_an_error_ended_spoils_no_later_one(gpu: FakeGpu) -> None:
    prefix, _ = offloaded("model", "disk")
    expected = prefix(batch())
    handle = prefix._blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        prefix(batch())
    handle.remove()
    assert torch.equal(prefix(batch()), expected)


def test_each_pass_reads_a_file_once(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, _ = offloaded("model", "disk")
    reads, read = Counter[str](), OnDisk.read

    def watched(self: OnDisk) -> torch.Tensor:
        reads[f"{id(self.file)} {self.name}"] += 1
        return read(self)

    monkeypatch.setattr(OnDisk, "read", watched)
    prefix(batch())
    assert set(reads.values()) == {1}
    assert len(reads) == BLOCKS * 9 + 1, "nine tensors a block and the table"
