"""Eviction from the activation store: the limit holds, the least recently used goes first, live runs keep theirs."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from store_samples import NAMESPACE, WIDTH, key, leftovers, open_store, same, samples, shards, size_of, value

from toolkit.activation_cache.eviction import CacheWriter, cache_writer
from toolkit.activation_cache.namespace import Namespace
from toolkit.activation_cache.store import ActivationStore
from toolkit.runtime.distributed import World

YEAR = 31_536_000


def another(name: str) -> Namespace:
    return Namespace({"weights": name}, WIDTH, torch.bfloat16)


def past_run(root: Path, namespace: Namespace, number: int, used: int) -> Path:
    """A run of long ago that stored one sample, last used ``used`` seconds after the epoch."""
    known = set(shards(root))
    with open_store(root, namespace) as store:
        store.write(samples([number]))
    (path,) = set(shards(root)) - known
    os.utime(path, (used, path.stat().st_mtime))
    return path


def entry_size(tmp_path: Path) -> int:
    """Bytes of a shard with sample 0, or another of one token, alone."""
    with open_store(tmp_path / "scale") as store:
        store.write(samples([0]))
        return size_of(tmp_path / "scale")


def test_the_least_recently_used_goes_first_whatever_its_namespace(tmp_path: Path) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    middle = past_run(root, another("a"), 0, 2 * YEAR)
    newest = past_run(root, NAMESPACE, 5, 3 * YEAR)
    oldest = past_run(root, another("b"), 0, 1 * YEAR)
    with open_store(root, another("c"), limit=4 * size - 1) as store:
        assert store.available_bytes() == 4 * size - 1
        store.write(samples([0]))
        assert not oldest.exists(), "no more than needed"
        assert middle.exists()
        store.write(samples([5]))
        assert not middle.exists()
        assert newest.exists()
        assert store.statistics.evicted == 2
        assert size_of(root) == 3 * size
        assert same(store.read(key(0)), value(0))
        assert same(store.read(key(5)), value(5))


@pytest.mark.parametrize("use", ["read", "missing"])
def test_use_is_marked_once_a_run_and_counts_for_eviction(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    used = past_run(root, NAMESPACE, 0, 1 * YEAR)
    unused = past_run(root, NAMESPACE, 5, 2 * YEAR)
    with open_store(root) as store:
        marks: list[Any] = []
        original = os.utime
        monkeypatch.setattr(os, "utime", lambda path, **times: (marks.append(path), original(path, **times)))
        for _ in range(3):
            store.read(key(0)) if use == "read" else store.missing([key(0)])
        monkeypatch.undo()
        assert marks == [used]
    with open_store(root, another("c"), limit=2 * size) as store:
        store.write(samples([0]))
    assert used.exists()
    assert not unused.exists()


def test_what_a_live_run_has_used_stays_and_the_rest_of_its_namespace_goes(tmp_path: Path) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    unused, used = (past_run(root, NAMESPACE, number, year * YEAR) for number, year in ((0, 2), (5, 1)))
    with open_store(root) as live, open_store(root, another("c"), limit=2 * size) as store:
        assert live.missing([key(5)]) == []
        live.write(samples([10]))
        assert store.available_bytes() == 0
        store.write(samples([0]))
        assert store.statistics.failed == 1, "all that is left is needed"
        assert unused.exists(), "evicting it would not have been enough"
        with open_store(root, another("d"), limit=3 * size) as patient:
            assert patient.available_bytes() == size
            patient.write(samples([0]))
            assert patient.statistics.evicted == 1
        assert not unused.exists()
        assert used.exists()
        assert same(live.read(key(5)), value(5))
        assert same(live.read(key(10)), value(10))


def test_what_a_live_run_has_used_stays_though_others_were_used_later(tmp_path: Path) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    with open_store(root) as live:
        live.write(samples([0]))
        (needed,) = shards(root)
        later = past_run(root, another("a"), 5, 200 * YEAR)
        with open_store(root, another("c"), limit=2 * size) as store:
            store.write(samples([0]))
        assert needed.exists()
        assert not later.exists()


def test_a_runs_end_frees_what_it_used(tmp_path: Path) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    with open_store(root) as live:
        live.write(samples([0]))
    with open_store(root, another("c"), limit=size) as store:
        store.write(samples([5]))
        assert store.statistics.stored == 1
    assert size_of(root) == size


def test_a_shard_larger_than_the_limit_is_not_stored_and_evicts_nothing(tmp_path: Path) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    old = past_run(root, another("a"), 0, YEAR)
    with open_store(root, limit=size) as store:
        store.write({key(0): torch.zeros(100, WIDTH).bfloat16()})
        assert store.statistics.failed == 1
    assert old.exists()


def test_a_lower_limit_holds_once_the_run_has_ended(tmp_path: Path) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    paths = [past_run(root, NAMESPACE, 5 * number, (number + 1) * YEAR) for number in range(4)]
    with open_store(root, limit=2 * size) as store:
        assert store.read(key(0)) is not None
    assert [path.exists() for path in paths] == [True, False, False, True]
    assert store.statistics.evicted == 2


def test_no_limit_evicts_nothing(tmp_path: Path) -> None:
    old = past_run(tmp_path, another("a"), 0, YEAR)
    with open_store(tmp_path) as store:
        store.write(samples(range(8)))
    assert old.exists()


def test_an_evicted_entry_stays_readable_where_it_is_in_use_and_is_missing_after(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.write(samples([0, 1]))
        found = store.read(key(0))
        for path in shards(tmp_path):
            path.unlink()
        assert same(found, value(0))
        assert store.read(key(0)) is None
        assert store.missing([key(0), key(1)]) == [key(0), key(1)]
        assert store.statistics.damaged == 0


def test_an_eviction_is_noticed_when_the_run_says_what_it_needs(tmp_path: Path) -> None:
    past_run(tmp_path, NAMESPACE, 0, YEAR)
    with open_store(tmp_path) as store:
        assert store._index.entries(key(0))
        shards(tmp_path)[0].unlink()
        assert store.missing([key(0)]) == [key(0)]


def test_a_dead_runs_leftovers_go_and_a_live_runs_stay(tmp_path: Path) -> None:
    directory = tmp_path / NAMESPACE.sha256
    with open_store(tmp_path) as live:
        (lease,) = leftovers(tmp_path)
        mine = directory / lease.replace(".lease", "-0.partial")
        others = [
            directory / f".{'0' * 16}.lease",
            directory / f".{'0' * 16}-3.partial",
            directory / f".{'1' * 16}-0.partial",
        ]
        for path in (mine, *others):
            path.write_bytes(b"half")
        foreign = directory / ".notes"
        foreign.write_text("not ours")
        with open_store(tmp_path):
            assert mine.exists()
            assert foreign.exists()
            assert [path.exists() for path in others] == [False] * 3
        live.write(samples([0]))
        assert live.statistics.failed == 0


def test_filling_a_cache_under_a_limit_looks_at_each_shard_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = entry_size(tmp_path)
    root = tmp_path / "root"
    for number in range(10):
        past_run(root, another(str(number)), 0, (number + 1) * YEAR)
    looked_at: list[str] = []
    original = os.stat

    def count(path: Any, **options: Any) -> os.stat_result:
        looked_at.extend(str(path) for _ in range(1) if str(path).endswith(".safetensors"))
        return original(path, **options)

    with open_store(root, NAMESPACE, limit=40 * size) as store:
        monkeypatch.setattr(os, "stat", count)
        for number in range(40):
            store.write(samples([5 * number]))
        monkeypatch.undo()
        assert store.statistics.stored == 40
        assert store.statistics.evicted == 10
    assert len(looked_at) <= 2 * (10 + 40), "all of them at each write would be 1545"


def test_the_ranks_of_a_node_share_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[object] = []
    hosts = iter("aaabbb")
    monkeypatch.setattr("socket.gethostname", lambda: next(hosts))
    monkeypatch.setattr(World, "all_gather_object", lambda world, own: gathered.append(own) or gathered)
    writers = [cache_writer(World(rank, rank % 3, 6)) for rank in range(6)]
    assert [writer.holds_lease for writer in writers] == [True, False, False] * 2
    assert len({writer.lease for writer in writers[:3]}) == len({writer.lease for writer in writers[3:]}) == 1
    assert writers[0].lease != writers[3].lease


def test_locks_follow_the_nodes_and_not_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, ranks = 8, 64
    writers = [CacheWriter(f"{node:016x}", rank, rank == 0) for node in range(nodes) for rank in range(ranks)]
    locks: list[int] = []
    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: (locks.append(operation), original(file, operation)))
    stores = [ActivationStore(tmp_path, NAMESPACE, keep_free_bytes=0, writer=writer) for writer in writers]
    assert len(locks) == 3 * nodes + nodes * (nodes - 1) // 2, "a lease a rank would take 130,816 at these 512"
    assert len(leftovers(tmp_path)) == nodes
    assert len({store._lease.staging() for store in stores if store._lease is not None}) == nodes * ranks
    for number, store in enumerate(stores[:ranks]):
        store.write(samples([number]))
        assert store.statistics.stored == 1
    for store in stores:
        store.close()
    assert leftovers(tmp_path) == []


def test_without_file_locks_the_store_is_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        store.write(samples([0]))

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with ActivationStore(tmp_path, NAMESPACE, limit_bytes=10**6) as store:
        assert same(store.read(key(0)), value(0))
        store.write(samples([1]))
        assert store.read(key(1)) is None
        assert store.statistics.failed == 1
    assert leftovers(tmp_path) == []
