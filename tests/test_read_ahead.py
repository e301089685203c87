"""Hidden states come to the GPU while it computes: the same bits, few buffers, no wait of the host for what is new."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_streams import FakeGpu
from helpers import metrics, tiny_flags, train

from toolkit.activation_cache.namespace import Namespace, sample_key
from toolkit.activation_cache.read_ahead import AHEAD, HiddenReader
from toolkit.activation_cache.store import ActivationStore
from toolkit.data.batches import Batch, collate, pack
from toolkit.data.examples import Example
from toolkit.data.layout import lay_out
from toolkit.runtime import page_locked

WIDTH = 8


def micro_batches() -> list[Batch]:
    """Padded and packed ones of several lengths, and one row alone."""
    rows = [Example.with_answer(tuple(range(1, 4 + 5 * index)), 2) for index in range(9)]
    return [collate(rows[:3], 0), pack(rows[2:5]), collate(rows[8:], 0), pack(rows[:1]), collate(rows[4:8], 0)] * 3


def stored(folder: Path, batches: list[Batch]) -> ActivationStore:
    store = ActivationStore(folder, Namespace({}, WIDTH, torch.bfloat16), keep_free_bytes=0)
    rows = {sample_key(row.token_ids): row for batch in batches for row in batch.examples}
    store.write({key: torch.randn(len(row), WIDTH).to(torch.bfloat16) for key, row in rows.items()})
    return store


def expected(store: ActivationStore, batch: Batch) -> torch.Tensor:
    rows = [store.peek(sample_key(row.token_ids)) for row in batch.examples]
    return lay_out([row for row in rows if row is not None], batch)


def test_what_is_read_ahead_are_the_bits_of_the_store(tmp_path: Path, gpu: FakeGpu) -> None:
    batches = micro_batches()
    with stored(tmp_path, batches) as store, HiddenReader(torch.device("cpu")) as reader:
        coming = [reader.announce(batch, store) for batch in batches]
        for batch, plain in zip(coming, batches, strict=True):
            hidden = batch.hidden.take(store)  # type: ignore[attr-defined]
            assert torch.equal(hidden, expected(store, plain))
            assert batch.hidden.take(store) is None, "it is given away once"  # type: ignore[attr-defined]
        assert store.statistics.hits == sum(len(batch.examples) for batch in batches)
    assert gpu.counts["main waits"] == gpu.counts["recorded"] == gpu.counts["copies"] == len(batches)
    assert gpu.counts["host waits"] == len(batches) - 2, "a buffer is filled again once its copy is done"
    assert len(gpu.pinned) <= 2 * 4, "two buffers, each of which grew in powers of two"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frostline-hidden")]


def test_no_more_than_a_few_micro_batches_are_on_their_way(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, started = micro_batches(), []
    with stored(tmp_path, batches) as store, HiddenReader(torch.device("cpu")) as reader:
        start = reader._executor.submit  # type: ignore[union-attr]
        monkeypatch.setattr(reader._executor, "submit", lambda *given: started.append(1) or start(*given))
        coming = [reader.announce(batch, store) for batch in batches]
        assert len(started) == AHEAD
        coming[0].hidden.take(store)  # type: ignore[attr-defined]
        assert len(started) == AHEAD + 1


def test_what_nobody_takes_holds_nothing_up(tmp_path: Path, gpu: FakeGpu) -> None:
    """After a change of phase the hidden states of the old frost line are left where they are."""
    batches = micro_batches()
    with (
        stored(tmp_path / "a", batches) as old,
        stored(tmp_path / "b", batches) as new,
        HiddenReader(torch.device("cpu")) as reader,
    ):
        left = [reader.announce(batch, old) for batch in batches[:6]]
        assert left[0].hidden.take(new) is None  # type: ignore[attr-defined]
        coming = reader.announce(batches[6], new)
        assert torch.equal(coming.hidden.take(new), expected(new, batches[6]))  # type: ignore[attr-defined]
        assert left[1].hidden.take(old) is None  # type: ignore[attr-defined]
        again = reader.announce(batches[7], new)
        reader.clear()
        assert again.hidden.take(new) is None  # type: ignore[attr-defined]


def test_a_sample_that_is_missing_is_left_to_the_step(tmp_path: Path, gpu: FakeGpu) -> None:
    batches = micro_batches()
    with stored(tmp_path, batches[:1]) as store, HiddenReader(torch.device("cpu")) as reader:
        batch = reader.announce(batches[2], store)
        assert batch.hidden.take(store) is None  # type: ignore[attr-defined]
        assert store.statistics.hits == 0


def test_refused_page_locking_is_said_once_and_changes_no_bit(tmp_path: Path, gpu: FakeGpu, said: list[str]) -> None:
    gpu.refuses, batches = True, micro_batches()
    with stored(tmp_path, batches) as store, HiddenReader(torch.device("cpu")) as reader:
        for batch in batches:
            coming = reader.announce(batch, store)
            assert torch.equal(coming.hidden.take(store), expected(store, batch))  # type: ignore[attr-defined]
    (line,) = [line for line in said if "page-locked" in line]
    assert line.startswith("no page-locked memory (a test refuses): copies between host and GPU go on from pageable")
    assert gpu.pinned == []


@pytest.mark.parametrize(
    ("flags", "left_behind"),
    [
        (("--mask.train", "last:2", "head", "--data.validation", "0.25"), 0),
        (("--mask.train", "last:2", "--train.micro_batch_size", 2, "--train.gradient_accumulation_steps", 2), 0),
        (("--mask.train", "last:2", "--mask.schedule", '[{"train": ["last:1"], "until_step": 25}]'), 3),
    ],
    ids=["validation", "packed", "schedule"],
)
def test_a_run_reads_ahead_and_its_losses_are_those_of_a_run_that_does_not(
    tiny_model: Path, tmp_path: Path, request: Any, monkeypatch: pytest.MonkeyPatch, flags: Any, left_behind: int
) -> None:
    """Twenty rows, three times over; where the frost line moves, what was on its way is left behind."""
    more = (*flags, "--prefix.cache_dir", tmp_path / "cache")
    assert train(*tiny_flags(tiny_model, tmp_path / "plain", *more)) == 0
    fake: FakeGpu = request.getfixturevalue("gpu")
    readers, peek = set(), ActivationStore.peek

    def watched(self: ActivationStore, key: str) -> torch.Tensor | None:
        readers.add(threading.current_thread().name.split("_")[0])
        return peek(self, key)

    monkeypatch.setattr(ActivationStore, "peek", watched)
    assert train(*tiny_flags(tiny_model, tmp_path / "ahead", *more)) == 0
    for key in ("loss", "eval_loss", "cache_hit_share"):
        assert metrics(tmp_path / "ahead", key) == metrics(tmp_path / "plain", key)
    rows = 60 if "--train.micro_batch_size" not in flags else 30
    assert rows - left_behind <= fake.counts["main waits"] <= min(rows, fake.counts["copies"])
    assert fake.counts["copies"] <= rows
    assert not page_locked._warned.is_set()
    assert "frostline-hidden" in readers
