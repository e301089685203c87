"""The activation store: values come back bit by bit, trouble with the disk is counted, others' work is found."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_samples import NAMESPACE, WIDTH, key, leftovers, open_store, same, samples, shards, size_of, value

from toolkit.activation_cache import shard as shard_module
from toolkit.activation_cache import shard_index
from toolkit.activation_cache import store as store_module
from toolkit.activation_cache.namespace import Namespace, bytes_of, sample_key
from toolkit.activation_cache.store import ActivationStore


def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the store logs from now on."""
    messages: list[str] = []
    monkeypatch.setattr(store_module.log, "warning", lambda text, *values: messages.append(text % values))
    return messages


def quiet_directory(root: Path) -> None:
    """Make the namespace's directory look unchanged for long, so that its time can be trusted."""
    os.utime(root / NAMESPACE.sha256, (1e9, 1e9))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of ``owner.name`` from now on."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_a_sample_key_is_the_same_everywhere() -> None:
    expected = "e2e2033ae7e19d680599d4eb0a1359a2b48ec5baac75066c317fbf85159c54ef"
    forms = [[1, 2, 3], (1, 2, 3), torch.tensor([1, 2, 3]), np.array([1, 2, 3], dtype=">i4")]
    assert {sample_key(form) for form in forms} == {expected}
    assert sample_key([1, 2]) != sample_key([2, 1]) != sample_key([1, 2, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_bit_pattern_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (64, WIDTH * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator())
    rows = bits.view(dtype)  # with NaNs of many kinds, infinities and subnormal numbers
    namespace = Namespace({}, WIDTH, dtype)
    with open_store(tmp_path, namespace) as store:
        store.write({key(0): rows})
    with open_store(tmp_path, namespace) as store:
        found = store.read(key(0))
        assert found is not None
        assert (found.dtype, found.shape) == (dtype, rows.shape)
        assert torch.equal(found.view(torch.uint8), bits)


def test_parts_of_a_batch_are_stored_without_being_contiguous(tmp_path: Path) -> None:
    batch = torch.randn(2, 6, WIDTH).bfloat16()
    strided = torch.randn(WIDTH, 5).bfloat16().T
    entries = {key(0): batch[0, :4], key(1): batch[1, 2:], key(2): strided}
    with open_store(tmp_path) as store:
        store.write(entries)
        assert all(same(store.read(name), rows) for name, rows in entries.items())


def test_what_is_missing_is_named_once_and_in_order(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.write(samples([1, 3]))
        wanted = [key(number) for number in (4, 1, 0, 4, 3)]
        assert store.missing(wanted) == [key(4), key(0)]
        assert store.read(key(0)) is None


def test_many_entries_become_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "_SHARD_ENTRIES", 3)
    monkeypatch.setattr(shard_module, "SHARD_BYTES", 5 * WIDTH * 2)  # 5 tokens
    with open_store(tmp_path) as store:
        store.write(samples([0, 5, 10, 15, 4, 1, 2]))  # 1 1 1 | 1 | 5 | 2 3 tokens
        assert len(shards(tmp_path)) == 4
        assert all(same(store.read(key(number)), value(number)) for number in (0, 5, 10, 15, 4, 1, 2))


@pytest.mark.parametrize("alone", [True, False])
def test_the_size_said_before_is_an_upper_bound_and_near(alone: bool, tmp_path: Path) -> None:
    rows = {key(number): torch.zeros(1000 + number, 512).bfloat16() for number in range(8)}
    tokens = sum(len(tensor) for tensor in rows.values())
    with ActivationStore(tmp_path, Namespace({}, 512, torch.bfloat16), keep_free_bytes=0) as store:
        for part in [{name: tensor} for name, tensor in rows.items()] if alone else [rows]:
            store.write(part)
        assert store.statistics.written_bytes == size_of(tmp_path)
    said = bytes_of(tokens, len(rows), 512, torch.bfloat16)
    assert size_of(tmp_path) <= said <= 1.01 * size_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("ab", torch.zeros(1, WIDTH).bfloat16(), "key 'ab' of an activation; expected 64 hexadecimal digits"),
        (key(0), torch.zeros(1, WIDTH), "[1, 8] in torch.float32; expected [tokens, 8] in torch.bfloat16"),
        (key(0), torch.zeros(1, 9).bfloat16(), "[1, 9] in torch.bfloat16; expected [tokens, 8]"),
        (key(0), torch.zeros(0, WIDTH).bfloat16(), "[0, 8]"),
        (key(0), torch.zeros(WIDTH).bfloat16(), "[8]"),
    ],
)
def test_what_does_not_fit_the_namespace_is_refused(
    name: str, tensor: torch.Tensor, complaint: str, tmp_path: Path
) -> None:
    with open_store(tmp_path) as store, pytest.raises(ValueError, match=re.escape(complaint)):
        store.write({name: tensor})
    assert shards(tmp_path) == []


def test_a_namespace_of_another_dtype_or_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.float64 .* expected one of torch.bfloat16"):
        Namespace({}, 8, torch.float64)
    with pytest.raises(ValueError, match="width 0 of activations; expected at least 1"):
        Namespace({}, 0, torch.float32)


def test_a_read_maps_the_file_and_never_changes_it(tmp_path: Path) -> None:
    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    with open_store(tmp_path) as store:
        store.write(samples([3]))
        found = store.read(key(3))
        assert found is not None
        assert mapped()
        found.zero_()
        assert same(store.read(key(3)), value(3))
        shards(tmp_path)[0].unlink()
        assert not found.any(), "still there though its file is gone"
        del found
        assert not mapped()


def test_the_identity_is_written_down_for_people(tmp_path: Path) -> None:
    with open_store(tmp_path):
        text = (tmp_path / NAMESPACE.sha256 / "namespace.json").read_text()
    assert text == NAMESPACE.text
    assert '"boundary": "26"' in text


@pytest.mark.parametrize(
    ("call", "number"),
    [("open", errno.EACCES), ("write", errno.ENOSPC), ("write", errno.EDQUOT), ("utime", errno.EPERM),
     ("fsync", errno.EIO), ("replace", errno.EROFS)],
)  # fmt: skip
def test_a_disk_that_refuses_is_counted_logged_once_and_leaves_nothing(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = warnings_of(monkeypatch)
    with open_store(tmp_path) as store:
        with monkeypatch.context() as broken:

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise OSError(number, os.strerror(number))

            broken.setattr(shard_module.os, call, refuse)
            store.write(samples([0, 1]))
            store.write(samples([2]))
        assert (store.statistics.computed, store.statistics.stored, store.statistics.failed) == (3, 0, 3)
        assert len(messages) == 1
        assert os.strerror(number) in messages[0]
        assert "3 computed, 0 stored (0.0 MiB), 3 not stored" in store.summary()
        assert store.missing(samples([0, 1, 2])) == list(samples([0, 1, 2]))
        assert len(leftovers(tmp_path)) == 1, "its own lease"
        store.write(samples([0]))
        assert same(store.read(key(0)), value(0))


def test_the_free_disk_is_looked_at_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = warnings_of(monkeypatch)
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with ActivationStore(tmp_path, NAMESPACE, keep_free_bytes=4800) as store:
        assert store.available_bytes() == 200
        written = counted(monkeypatch, os, "write")
        store.write(samples([0]))
        assert written == []
        assert store.statistics.failed == 1
        assert "0.0 MiB of disk beside the 0.0 MiB that stay free" in messages[0]


def test_a_root_that_cannot_be_made_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = warnings_of(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    with open_store(tmp_path / "file") as store:
        store.write(samples([0]))
        assert store.missing([key(0)]) == [key(0)]
        assert store.read(key(0)) is None
        assert store.statistics.failed == 1
        assert store.available_bytes() == 0
    assert "cannot be claimed" in messages[0]


def test_what_another_process_stored_is_found(tmp_path: Path) -> None:
    with open_store(tmp_path) as mine, open_store(tmp_path) as other:
        other.write(samples([0]))
        assert mine.missing([key(0), key(1)]) == [key(1)]
        other.write(samples([1]))
        assert same(mine.read(key(1)), value(1))
        other.write(samples([2]))
        assert not mine._index.entries(key(2))
        mine.refresh()
        assert mine._index.entries(key(2))


def test_an_unchanged_directory_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store, open_store(tmp_path) as other:
        quiet_directory(tmp_path)
        store.refresh()
        listed = counted(monkeypatch, shard_index.os, "scandir")
        assert [store.read(key(number)) for number in range(10)] == [None] * 10
        assert listed == []
        other.write(samples([4]))
        assert same(store.read(key(4)), value(4))
        assert len(listed) == 1
        headers = counted(monkeypatch, shard_index, "read_shard_header")
        store.refresh()
        assert headers == [], "known shards are not read again"


def test_bytes_are_verified_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        store.write(samples([0, 1]))
        verified = counted(monkeypatch, store_module, "matches_checksum")
        assert [store.read(key(0)) is not None for _ in range(3)] == [True] * 3
        assert len(verified) == 1


def test_reading_ahead_verifies_before_the_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        store.write(samples(range(6)))
        verified = counted(monkeypatch, store_module, "matches_checksum")
        asked = counted(monkeypatch, store_module, "prefetch_pages")
        store.prefetch([key(number) for number in (2, 4, 99)])
        store._prefetcher.wait()
        assert [call[0].key for call in verified] == [key(2), key(4)]
        assert same(store.read(key(2)), value(2))
        assert len(verified) == 2
        store.prefetch([key(2)])
        store._prefetcher.wait()
        assert [call[0].key for call in asked] == [key(2)], "of a verified entry the pages alone"
        assert (store.statistics.hits, store.statistics.misses) == (1, 0)


def test_a_closed_store_gives_nothing_and_its_thread_has_ended(tmp_path: Path) -> None:
    others = set(threading.enumerate())  # of stores that other tests have left open in this process
    store = open_store(tmp_path)
    store.write(samples([0]))
    store.prefetch([key(0)])
    assert set(threading.enumerate()) - others
    store.close()
    store.close()
    assert not set(threading.enumerate()) - others
    store.prefetch([key(0)])
    assert store.read(key(0)) is None
    assert store.missing([key(0)]) == [key(0)]
    assert leftovers(tmp_path) == []


def test_an_entry_stored_again_is_the_one_that_is_read(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.write(samples([2]))
        store.write({key(2): value(2, version=1)})
        assert same(store.read(key(2)), value(2, version=1))
        store.write(samples([2]))
        assert same(store.read(key(2)), value(2))
    with open_store(tmp_path) as store:
        assert same(store.read(key(2)), value(2))
        assert len(shards(tmp_path)) == 2, "equal entries have equal names"
