"""Damaged, foreign and edited shards: the activation store gives right values or none, never wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from store_samples import NAMESPACE, WIDTH, key, open_store, put, same, samples, shards, value

from toolkit.activation_cache import store as store_module
from toolkit.activation_cache.namespace import Namespace
from toolkit.activation_cache.shard import encode
from toolkit.activation_cache.store import ActivationStore

NUMBERS = (0, 2, 4)
NAME, CONTENT = encode(samples(NUMBERS), NAMESPACE)
DATA = 8 + int.from_bytes(CONTENT[:8], "little")
"""Where the header ends."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the shard of ``CONTENT`` belongs."""
    directory = tmp_path / NAMESPACE.sha256
    directory.mkdir()
    return directory / NAME


def flipped(position: int) -> bytes:
    return CONTENT[:position] + bytes([CONTENT[position] ^ (1 << position % 8)]) + CONTENT[position + 1 :]


def right(store: ActivationStore) -> int:
    """Number of samples that are read; each must be right."""
    found = {number: store.read(key(number)) for number in NUMBERS}
    present = {number: tensor for number, tensor in found.items() if tensor is not None}
    assert all(same(tensor, value(number)) for number, tensor in present.items())
    return len(present)


def test_the_shard_is_whole_without_damage(path: Path, tmp_path: Path) -> None:
    put(path, CONTENT)
    with open_store(tmp_path) as store:
        assert right(store) == 3
        assert store.statistics.damaged == 0


def test_any_flipped_byte_of_the_header_loses_the_shard(path: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for position in range(DATA):
            put(path, flipped(position))
            store.refresh()
            assert right(store) == 0, position
            assert store.statistics.damaged == position + 1
            assert not path.exists(), "nothing can be read from it"


def test_any_flipped_byte_of_the_data_loses_its_entry_alone(path: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for position in range(DATA, len(CONTENT)):
            put(path, flipped(position))
            store.refresh()
            assert right(store) == 2, position
            assert store.statistics.damaged == position - DATA + 1
            path.unlink()


def test_any_cut_loses_the_shard(path: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for length in range(len(CONTENT)):
            put(path, CONTENT[:length])
            store.refresh()
            assert right(store) == 0, length
            assert store.statistics.damaged == length + 1


@pytest.mark.parametrize("position", [0, 3, 8, 40, DATA - 1, DATA, DATA + 20, len(CONTENT) - 1])
def test_a_new_process_finds_the_damage_and_repairs_it(position: int, path: Path, tmp_path: Path) -> None:
    put(path, flipped(position))
    with open_store(tmp_path) as store:
        assert right(store) == (2 if position >= DATA else 0)
        assert store.statistics.damaged == 1
        lost = store.missing(samples(NUMBERS))
        store.write({name: rows for name, rows in samples(NUMBERS).items() if name in lost})
        assert right(store) == 3
    with open_store(tmp_path) as store:
        assert right(store) == 3
        assert store.statistics.damaged == 0, "the new entry hides the damaged one"


def test_more_bytes_at_the_end_lose_the_shard(path: Path, tmp_path: Path) -> None:
    put(path, CONTENT + b"\0")
    with open_store(tmp_path) as store:
        assert right(store) == 0
        assert store.statistics.damaged == 1


def test_damage_after_the_first_read_is_seen_too(path: Path, tmp_path: Path) -> None:
    put(path, CONTENT)
    with open_store(tmp_path) as store:
        assert right(store) == 3
        put(path, flipped(DATA))
        assert right(store) == 2
        put(path, CONTENT[:-1])
        assert right(store) == 0
        put(path, CONTENT)
        assert right(store) == 3


def test_the_first_damage_is_logged_the_rest_counted(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(store_module.log, "warning", lambda text, *values: messages.append(text % values))
    put(path, CONTENT[:DATA] + bytes(len(CONTENT) - DATA))
    with open_store(tmp_path) as store:
        assert right(store) == 0
        assert "3 damaged" in store.summary()
    assert len(messages) == 1
    assert f"{path} is not used (its bytes do not give their checksum)" in messages[0]
    assert "computed anew" in messages[0]


def test_a_disk_that_cannot_be_read_is_damage(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(entry: Any) -> bool:
        raise OSError(5, "Input/output error")

    put(path, CONTENT)
    with open_store(tmp_path) as store:
        with monkeypatch.context() as broken:
            broken.setattr(store_module, "matches_checksum", fail)
            assert right(store) == 0
        assert store.statistics.damaged == 3
        assert path.exists()


@pytest.mark.parametrize(
    "other",
    [
        Namespace({**NAMESPACE.identity, "weights": "4567"}, WIDTH, torch.bfloat16),
        Namespace({**NAMESPACE.identity, "boundary": "27"}, WIDTH, torch.bfloat16),
        Namespace(NAMESPACE.identity, WIDTH, torch.float16),
        Namespace(NAMESPACE.identity, WIDTH // 2, torch.bfloat16),
    ],
    ids=["weights", "boundary", "dtype", "width"],
)
def test_what_another_computation_stored_is_never_read(other: Namespace, path: Path, tmp_path: Path) -> None:
    put(path, CONTENT)
    with open_store(tmp_path, other) as store:
        assert store.missing(samples(NUMBERS)) == list(samples(NUMBERS))
        stray = tmp_path / other.sha256 / NAME
        path.rename(stray)
        assert store.missing(samples(NUMBERS)) == list(samples(NUMBERS))
        assert right(store) == 0
        assert store.statistics.damaged == 1, "counted once"
        assert stray.exists(), "it is sound, and may be put back"


def test_a_well_formed_file_of_another_form_is_refused(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import save

    from toolkit.activation_cache.shard import _name_of

    form, owner, *sums = json.loads(CONTENT[8:DATA])["__metadata__"]["frostline"].split()
    rows = samples(NUMBERS)
    variants = [
        save(rows),
        save(rows, {"frostline": " ".join([form, owner, *sums[1:]])}),
        save({name: tensor.float() for name, tensor in rows.items()}, {"frostline": " ".join([form, owner, *sums])}),
        save({name: tensor[0] for name, tensor in rows.items()}, {"frostline": " ".join([form, owner, *sums])}),
    ]
    with open_store(tmp_path) as store:
        for count, content in enumerate(variants):
            name = _name_of(content[: 8 + int.from_bytes(content[:8], "little")])
            put(path.with_name(name), content)
            store.refresh()
            assert right(store) == 0
            assert store.statistics.damaged == count + 1


class Sequences(RuleBasedStateMachine):
    """Writes, reads, new runs, damage and eviction in any order, against a dictionary of what was stored."""

    @initialize(limit=st.sampled_from([None, 700, 1500]))
    def begin(self, limit: int | None) -> None:
        self.root = Path(self.directory())
        self.limit = limit
        self.history: dict[int, list[torch.Tensor]] = {}
        self.certain: set[int] = set()  # nothing has happened to their newest entry
        self.version = 0
        self.store = open_store(self.root, limit=limit)

    def directory(self) -> str:
        raise NotImplementedError

    @rule(numbers=st.sets(st.integers(0, 7), min_size=1, max_size=4))
    def write(self, numbers: set[int]) -> None:
        self.version += 1
        stored, evicted = self.store.statistics.stored, self.store.statistics.evicted
        self.store.write({key(number): value(number, self.version) for number in numbers})
        if self.store.statistics.evicted > evicted:
            self.certain.clear()
        if self.store.statistics.stored > stored:
            for number in numbers:
                self.history.setdefault(number, []).append(value(number, self.version))
            self.certain |= numbers
        if self.limit:
            assert sum(path.stat().st_size for path in shards(self.root)) <= self.limit

    @rule(number=st.integers(0, 7))
    def read(self, number: int) -> None:
        found = self.store.read(key(number))
        history = self.history.get(number, [])
        if number in self.certain:
            assert same(found, history[-1])
        else:
            assert found is None or any(same(found, stored) for stored in history)

    @rule()
    def new_run(self) -> None:
        before = self.store.statistics
        self.store.close()
        if before.evicted:
            self.certain.clear()
        self.store = open_store(self.root, limit=self.limit)

    @rule(numbers=st.sets(st.integers(0, 7)))
    def ask(self, numbers: set[int]) -> None:
        missing = self.store.missing(map(key, sorted(numbers)))
        assert not {key(number) for number in numbers & self.certain} & set(missing)
        assert {key(number) for number in numbers - self.history.keys()} <= set(missing)

    @precondition(lambda self: shards(self.root))
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(shards(self.root)))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, max(len(content) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "remove"] if content else ["remove"])):
            case "flip":
                content[position] ^= data.draw(st.integers(1, 255))
                put(path, content)
            case "cut":
                put(path, content[:position])
            case _:
                path.unlink()
        self.certain.clear()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


def test_any_sequence_gives_what_was_stored_or_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    class Here(Sequences):
        def directory(self) -> str:
            return str(tmp_path_factory.mktemp("sequence"))

    checks = settings(
        max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Here, settings=checks)
