"""The token store: the same rows as row by row, found again, never misread, shared, and small."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, KOREAN, make_tokenizer

import toolkit
from toolkit.config.schema import DataConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.examples import Encoder, Example
from toolkit.data.rows import Rows, shared_rows
from toolkit.data.sample_key import sample_key
from toolkit.data.sources import read_rows
from toolkit.data.token_file import COLUMNS, DamagedStoreError, EncodedRows
from toolkit.data.token_store import TokenStore, store_in_memory
from toolkit.runtime import signals
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import load_task

EXAMPLES = [
    Example((5, 6, 7, 8), ((2, 4),), origin="rows.jsonl line 12"),
    Example((9, 10), ((1, 2),), shortened=True, origin="rows.json key id-007 7", control_token="<|end|>"),
    Example((5, 6, 7, 8), ((1, 2), (3, 4)), origin="no number", reasons=True),
    Example((11,) * 9, ((3, 5), (7, 9)), origin="갑.csv row 0", normalised=True),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each row that this process tokenises."""
    counted: list[int] = []
    encode = Encoder.encode_all
    monkeypatch.setattr(Encoder, "encode_all", lambda self, sample: counted.append(1) or encode(self, sample))
    return counted


def load(tokenizer: Any, path: Path = ENGLISH, **data: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **data), tokenizer, 42)


def test_rows_come_back_as_they_were() -> None:
    rows = Rows.of(EXAMPLES)
    fields = [vars(example) for example in rows]
    assert fields == [vars(example) for example in EXAMPLES]
    assert rows.lengths.tolist() == [4, 2, 4, 9]
    assert rows.supervised.tolist() == [2, 1, 2, 4]
    assert [bytes(key).hex() for key in rows.keys] == [sample_key(example.token_ids) for example in EXAMPLES]
    assert (rows.largest_id, rows.shortened, rows.reasons) == (11, 1, True)
    assert (rows.with_control_token.tolist(), rows.normalised.tolist()) == ([1], [3])
    assert rows.longest_first().tolist() == [3, 0, 2, 1]
    assert rows.shortest() == EXAMPLES[1]
    assert list(rows.distinct()) == [EXAMPLES[0], EXAMPLES[1], EXAMPLES[3]]


def test_rows_of_several_stores_are_one_sequence() -> None:
    rows = Rows.of(EXAMPLES[:2]) + Rows.of(EXAMPLES[2:])
    assert list(rows) == EXAMPLES
    assert list(rows[1:3]) == EXAMPLES[1:3]
    assert rows[-1] == EXAMPLES[-1]
    assert rows.lengths.tolist() == [4, 2, 4, 9]
    assert rows == EXAMPLES != rows[:3]
    assert shared_rows(rows[:2], rows).tolist() == [0, 1, 2]  # the third has the ids of the first


def test_a_store_takes_four_bytes_a_token_and_little_more_a_row() -> None:
    rows = [Example(tuple(range(1, 401)), ((300, 400),), origin=f"rows.jsonl line {n}") for n in range(200)]
    columns = store_in_memory(EncodedRows.of(rows))._content.columns
    assert set(columns) == set(COLUMNS)
    assert columns["ids"].nbytes == 4 * 400 * 200
    assert sum(column.nbytes for column in columns.values()) < 8 * 400 * 200
    assert sum(column.nbytes for name, column in columns.items() if name != "ids") <= 110 * 200


@pytest.mark.parametrize(
    ("path", "share", "expected"),
    [
        (ENGLISH, None, "0f45d4a08f000b84579643f92faae158b688ae608dce9563002a8604d3585e0a"),
        (ENGLISH, 0.2, "3fd48fb421d61a61635aaa778195a67f67170a54371a674d480cb994c8c5b86a"),
        (KOREAN, None, "ddaf2ebb50ee97b54beea83e257a584e90a7079893d026095a21e931c6812510"),
        (KOREAN, 0.2, "d466c2c438462e9f41a92307e833d71455471de53919aa3cd42a713d0e20286b"),
    ],
)
def test_the_fingerprint_is_that_of_version_0_15(
    cache: Path, tokenizer: Any, path: Path, share: float | None, expected: str
) -> None:
    """Recorded before there was a store, when rows were tuples: runs of then resume."""
    length = 700 if path == KOREAN else 2048
    for _ in range(2):
        assert load(tokenizer, path, validation=share, max_length=length).fingerprint == expected


def test_the_store_holds_what_the_encoder_gives_row_by_row(cache: Path, tokenizer: Any) -> None:
    encoder, task = Encoder(tokenizer, 300), load_task("long_answer")
    expected = []
    for row in read_rows(str(ENGLISH)):
        expected.append(replace(encoder.encode(task.read(row.values)), origin=row.origin))
    assert [vars(row) for row in load(tokenizer, max_length=300).train] == [vars(row) for row in expected]


def test_a_second_start_tokenises_no_row(cache: Path, tokenizer: Any, encoded: list[int]) -> None:
    first = load(tokenizer, validation=0.2)
    assert len(encoded) == 20
    for share, seed in ((0.2, 42), (0.4, 42), (None, 7)):  # other splits are of the same rows
        load_dataset(DataConfig(path=str(ENGLISH), validation=share), tokenizer, seed)
    assert len(encoded) == 20
    assert first.fingerprint
    modes = {file.suffix: file.stat().st_mode & 0o777 for file in cache.iterdir()}
    assert modes == dict.fromkeys([".tokens", ".lock", ".fingerprints"], 0o600)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert first.train.stores[0].path is not None


@pytest.mark.parametrize("change", ["same size", "time alone", "max_length", "template", "tokenizer"])
def test_what_changes_the_rows_makes_another_store(
    cache: Path, tmp_path: Path, encoded: list[int], change: str
) -> None:
    path, tokenizer, length = tmp_path / "rows.jsonl", make_tokenizer(), 2048
    text = ENGLISH.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    before, time = load(tokenizer, path), path.stat()
    if change == "same size":
        path.write_text(text.replace("patient", "patienz", 1), encoding="utf-8")
        os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    elif change == "time alone":
        os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns + 1))
    elif change == "max_length":
        length = 250
    elif change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>\n", "<|end|>")
    else:
        tokenizer.add_tokens(["patient"])
    after = load(tokenizer, path, max_length=length)
    assert len(encoded) == 40
    assert (after.fingerprint == before.fingerprint) == (change == "time alone")


def test_rows_to_evaluate_on_are_tokenised_once_and_may_be_in_another_form(
    cache: Path, tmp_path: Path, tiny_model: Path, encoded: list[int]
) -> None:
    (tmp_path / "rows.csv").write_bytes("QUESTION|LONG_ANSWER\nwhy?|because.\nhow?|thus.\n".encode("utf-16"))
    losses = [toolkit.evaluate(str(tiny_model), tmp_path / "rows.csv", encoding="utf-16") for _ in range(2)]
    assert losses[0] == losses[1]
    assert (losses[0].rows, len(encoded)) == (2, 2)


def test_other_keys_of_the_recipe_find_the_same_store(cache: Path, tokenizer: Any, encoded: list[int]) -> None:
    load(tokenizer)
    load(tokenizer, packing="off", on_bad_row="skip", validation=0.3, limit=5)
    assert len(encoded) == 20


@pytest.mark.parametrize("damage", ["torn", "empty", "ids", "lengths", "footer", "other format"])
def test_a_damaged_store_is_built_again(
    cache: Path, tokenizer: Any, encoded: list[int], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    before = list(load(tokenizer).train)
    (file,) = cache.glob("*.tokens")
    content = bytearray(file.read_bytes())
    at = {"ids": 100, "lengths": 4 * sum(map(len, before)) + 9, "footer": len(content) - 60}.get(damage)
    if at is not None:
        content[at] ^= 1
    content = {"torn": content[:-7], "empty": bytearray(), "other format": content[:-1] + b"9"}.get(damage, content)
    file.write_bytes(content)
    assert list(load(tokenizer).train) == before
    assert len(encoded) == 40
    assert "is not used" in caplog.text
    assert list(load(tokenizer).train) == before
    assert len(encoded) == 40


def test_ids_of_a_large_store_are_compared_when_they_are_read(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tokenizer)
    (file,) = cache.glob("*.tokens")
    content = bytearray(file.read_bytes())
    content[8] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr("toolkit.data.token_store._EAGER_BYTES", 0)
    dataset = load(tokenizer)
    with pytest.raises(DataError, match="is damaged, and is removed now; start the same command again"):
        dataset.train[0]
    assert not file.exists()
    assert len(load(tokenizer).train) == 20


def test_a_cache_that_cannot_be_written_costs_only_the_next_start(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "file"))
    dataset = load(tokenizer)
    assert dataset.train.stores[0].path is None
    assert len(dataset.fingerprint) == 64
    assert "the rows are tokenised for this process alone" in caplog.text


def test_processes_of_a_node_wait_for_the_first(cache: Path, tokenizer: Any, encoded: list[int]) -> None:
    threads = [threading.Thread(target=load, args=(tokenizer,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(encoded) == 20
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".tokens"]


def test_stores_that_nobody_opened_for_a_month_are_removed(cache: Path, tmp_path: Path, tokenizer: Any) -> None:
    load(tokenizer)
    load(tokenizer, KOREAN)
    old, kept = sorted(cache.glob("*.tokens"), key=lambda file: file.stat().st_size)
    os.utime(old, (0, 0))
    path = tmp_path / "rows.jsonl"
    path.write_text(ENGLISH.read_text(encoding="utf-8"), encoding="utf-8")
    load(tokenizer, path)
    assert not old.exists()
    assert not old.with_suffix(".lock").exists()
    assert kept.exists()


def test_a_stop_while_tokenising_leaves_no_file(cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "stop_requested", lambda: True)
    with pytest.raises(signals.StopRequested):
        load(tokenizer)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed_by_the_next_that_makes_the_store(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: os._exit(9))
        child = os.fork()
        if not child:
            load(tokenizer)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    other = cache / ".another-x.partial"
    other.write_text("being made")
    assert len(list(cache.glob(".*.partial"))) == 2
    load(tokenizer)
    assert list(cache.glob(".*.partial")) == [other]


def test_a_text_that_is_no_store_is_refused() -> None:
    with pytest.raises(DamagedStoreError):
        TokenStore(b"x" * 100)


def test_nothing_grows_with_the_rows_but_arrays(cache: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Python objects that a data set holds, counted by the collector, are as many for 20 rows as for 400."""
    import gc

    counts = []
    for times in (1, 1, 20):  # the first time, what other tests left is collected too
        path = tmp_path / f"{times}.jsonl"
        path.write_text("\n".join(ENGLISH.read_text(encoding="utf-8").splitlines() * times), encoding="utf-8")
        load(tokenizer, path)
        gc.collect()
        before = len(gc.get_objects())
        dataset = load(tokenizer, path)
        dataset.rows.distinct()
        gc.collect()
        counts.append(len(gc.get_objects()) - before)
        assert len(dataset.train) == 20 * times
    assert abs(counts[2] - counts[1]) < 50
