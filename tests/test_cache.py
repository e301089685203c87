"""The activation cache in training: the same losses cold, warm, damaged or absent, and no prefix that is not needed."""

from __future__ import annotations

import gc
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, invocation, make_tokenizer, metrics, set_up, tiny_flags, tiny_llama, train
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import toolkit
from toolkit.activation_cache import store as store_module
from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.activation_cache.namespace import Namespace, sample_key
from toolkit.activation_cache.policy import decide, prefix_fingerprints
from toolkit.activation_cache.store import ActivationStore
from toolkit.config.policy import Decision
from toolkit.config.schema import ModelConfig, PrefixConfig
from toolkit.data.batches import collate
from toolkit.data.examples import Example
from toolkit.models.load import load
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.paths import replace_text
from toolkit.split.prefix import Prefix

ROWS, EPOCHS, BLOCKS = 20, 3, 6


@contextmanager
def counting_blocks() -> Iterator[Counter[int]]:
    """How many samples each block of a tiny Llama runs on, by its index, but for the plan's rehearsal without data."""
    runs: Counter[int] = Counter()
    forward = LlamaDecoderLayer.forward

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hidden_states.is_meta:
            runs[self.self_attn.layer_idx] += hidden_states.shape[0]
        return forward(self, hidden_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", counted)
        yield runs


def flags(model: Path, run: Path, cache: Path, *more: object) -> list[str]:
    return tiny_flags(model, run, "--mask.train", "last:2", "head", "--prefix.cache_dir", cache, *more)


@pytest.fixture(scope="module")
def uncached(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("uncached")
    assert train(*flags(tiny_model, run, run / "cache", "--prefix.cache", "off")) == 0
    assert not (run / "cache").exists()
    return metrics(run)


@pytest.fixture
def filled(tiny_model: Path, tmp_path: Path) -> tuple[Path, list[float]]:
    """A cache, and the step losses of the run that filled it."""
    assert train(*flags(tiny_model, tmp_path / "cold", tmp_path / "cache")) == 0
    return tmp_path / "cache", metrics(tmp_path / "cold")


def shards(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def test_a_cold_run_has_the_losses_of_an_uncached_one(uncached: list[float], filled: tuple[Path, list[float]]) -> None:
    assert len(filled[1]) == len(uncached) == ROWS * EPOCHS
    assert max(abs(a - b) for a, b in zip(filled[1], uncached, strict=True)) < 1e-5


def test_a_warm_run_repeats_the_cold_one_bit_by_bit_and_runs_no_block_of_the_prefix(
    tiny_model: Path, tmp_path: Path, filled: tuple[Path, list[float]]
) -> None:
    cache, cold = filled
    before = [(path, path.read_bytes()) for path in shards(cache)]
    with counting_blocks() as runs:
        assert train(*flags(tiny_model, tmp_path / "warm", cache)) == 0
    assert metrics(tmp_path / "warm") == cold
    assert set(runs) == {4, 5}
    assert [(path, path.read_bytes()) for path in shards(cache)] == before


def test_a_cold_run_computes_each_sample_once(tiny_model: Path, tmp_path: Path) -> None:
    with counting_blocks() as runs:
        assert train(*flags(tiny_model, tmp_path / "run", tmp_path / "cache")) == 0
    # beside the samples: the start-up check runs one whole, whole again and cut; that it repeats is tried three times;
    # the form of the blocks' output is looked up once
    assert runs[0] == ROWS + 3 + 3 + 1


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_no_tensor_of_the_prefix_is_alive_while_a_cached_run_trains(
    tiny_model: Path, tmp_path: Path, warm: bool
) -> None:
    if warm:
        assert train(*flags(tiny_model, tmp_path / "first", tmp_path / "cache")) == 0
    gc.collect()
    before = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    trainer = set_up(invocation(*flags(tiny_model, tmp_path / "run", tmp_path / "cache")), World())
    assert isinstance(trainer.state.prefix, CachedPrefix)
    assert trainer.state.prefix.prefix is None
    gc.collect()
    new = [o for o in gc.get_objects() if issubclass(type(o), nn.Parameter) and id(o) not in before]
    suffix = {id(p) for p in trainer.state.suffix.parameters()}
    masters = {id(p) for p in trainer.state.engine.masters().values()}
    others = [tuple(p.shape) for p in new if id(p) not in suffix | masters and p.numel() and not p.is_meta]
    assert others == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped byte", "truncated", "removed"])
def test_damaged_shards_are_computed_again(
    tiny_model: Path, tmp_path: Path, filled: tuple[Path, list[float]], damage: Any
) -> None:
    cache, cold = filled
    for path in shards(cache):
        damage(path)
    assert train(*flags(tiny_model, tmp_path / "again", cache)) == 0
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "again"), cold, strict=True)) < 1e-5
    with counting_blocks() as runs:
        assert train(*flags(tiny_model, tmp_path / "healed", cache)) == 0
    assert set(runs) == {4, 5}


def test_damage_that_appears_during_a_run_brings_the_prefix_back(
    tiny_model: Path, tmp_path: Path, filled: tuple[Path, list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    cache, _ = filled
    trainer = set_up(invocation(*flags(tiny_model, tmp_path / "run", cache)), World())
    assert isinstance(trainer.state.prefix, CachedPrefix)
    for path in shards(cache):
        flip(path)
    with caplog.at_level(logging.WARNING, "frostline"):
        hidden = trainer.state.prefix(collate(trainer.context.dataset.train, trainer.context.pad_id))
    assert trainer.state.prefix.prefix is not None
    assert "loading the prefix again" in caplog.text
    expected = trainer.state.prefix.prefix(collate(trainer.context.dataset.train, trainer.context.pad_id))
    padding = collate(trainer.context.dataset.train, trainer.context.pad_id).attention_mask
    assert padding is not None
    assert (hidden - expected * padding.unsqueeze(-1)).abs().max() < 1e-5


def with_another_weight(directory: Path, block: int) -> Path:
    """The tiny model but for one number in one block."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[block].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def test_other_weights_never_hit(tiny_model: Path, tmp_path: Path, filled: tuple[Path, list[float]]) -> None:
    other = with_another_weight(tmp_path / "other", block=0)
    assert train(*flags(other, tmp_path / "a", filled[0])) == 0
    assert train(*flags(other, tmp_path / "b", tmp_path / "elsewhere", "--prefix.cache", "off")) == 0
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True)) < 1e-5


def test_weights_above_the_line_do_not_matter_to_the_cache(
    tiny_model: Path, tmp_path: Path, filled: tuple[Path, list[float]]
) -> None:
    other = with_another_weight(tmp_path / "other", block=5)
    with counting_blocks() as runs:
        assert train(*flags(other, tmp_path / "a", filled[0])) == 0
    assert set(runs) == {4, 5}


def test_another_boundary_dtype_or_attention_has_a_place_of_its_own(tiny_model: Path) -> None:
    loaded = load(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))
    half = load(ModelConfig(name_or_path=str(tiny_model)))
    eager = load(ModelConfig(name_or_path=str(tiny_model), dtype="float32", attn_implementation="eager"))
    cpu = torch.device("cpu")
    plain, int8 = PrefixConfig(), PrefixConfig(precision="int8")
    one = prefix_fingerprints(loaded, 4, plain, cpu)
    others = [
        prefix_fingerprints(loaded, 3, plain, cpu),
        prefix_fingerprints(half, 4, plain, cpu),
        prefix_fingerprints(eager, 4, plain, cpu),
        prefix_fingerprints(loaded, 4, int8, cpu),
    ]
    assert one == prefix_fingerprints(loaded, 4, plain, cpu)
    assert all(one != other for other in others)


def test_another_build_of_the_forward_pass_has_a_place_of_its_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, plain, cpu = load(ModelConfig(name_or_path=str(tiny_model))), PrefixConfig(), torch.device("cpu")
    released = prefix_fingerprints(loaded, 4, plain, cpu)
    package = tmp_path / "toolkit"
    shutil.copytree(ROOT / "toolkit", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(toolkit, "__file__", str(package / "__init__.py"))
    assert prefix_fingerprints(loaded, 4, plain, cpu) == released
    for unrelated in ("monitor.py", "engine/local.py"):
        with (package / unrelated).open("a") as file:
            file.write("# changed\n")
    assert prefix_fingerprints(loaded, 4, plain, cpu) == released
    with (package / "models" / "products.py").open("a") as file:
        file.write("# changed\n")
    assert prefix_fingerprints(loaded, 4, plain, cpu) != released


def test_dropout_in_the_prefix_switches_the_cache_off(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    model.config.attention_dropout = 0.1
    directory = tmp_path / "dropout"
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    with caplog.at_level(logging.INFO, "frostline"):
        trainer = set_up(invocation(*flags(directory, tmp_path / "run", tmp_path / "cache")), World())
    assert not isinstance(trainer.state.prefix, CachedPrefix)
    assert "activation cache: off (auto: the prefix gives other values each time" in caplog.text
    with pytest.raises(ConfigError, match=r"prefix\.cache is on, but the prefix gives other values"):
        set_up(invocation(*flags(directory, tmp_path / "run", tmp_path / "cache", "--prefix.cache", "on")), World())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--mask.train", "all", "--mask.tied", "both"), "nothing below the trained tensors is frozen"),
        (("--mask.tied", "head_only"), "the embeddings move with every step"),
    ],
)
def test_masks_without_a_constant_prefix_have_no_cache(
    tiny_model: Path, tmp_path: Path, more: tuple[str, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = flags(tiny_model, tmp_path / "run", tmp_path / "cache", *more)
    with caplog.at_level(logging.INFO, "frostline"):
        trainer = set_up(invocation(*given), World())
    assert not isinstance(trainer.state.prefix, CachedPrefix)
    assert reason in caplog.text
    with pytest.raises(ConfigError, match=r"prefix\.cache is on, but") as raised:
        set_up(invocation(*given, "--prefix.cache", "on"), World())
    assert reason in str(raised.value)
    assert not (tmp_path / "cache").exists()


SAMPLES = (Example.with_answer((1, 2, 3), 1), Example.with_answer((4, 5), 1), Example.with_answer((1, 2, 3), 1))


def decide_for(store: ActivationStore, cache: str, passes: float = 3, limit: float | None = None) -> Decision:
    return decide(PrefixConfig(cache=cache, cache_limit_gib=limit), SAMPLES, passes, store)


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path, Namespace({"weights": "a"}, 4, torch.float32))


def with_room(store: ActivationStore, room: int, monkeypatch: pytest.MonkeyPatch) -> ActivationStore:
    monkeypatch.setattr(store, "available_bytes", lambda: room)
    return store


def test_the_decision_weighs_passes_limit_and_disk(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(store, 2**40, monkeypatch)
    assert decide_for(store, "auto").on
    assert "0 of 2 samples are there" in decide_for(store, "auto").reason
    once = decide_for(store, "auto", passes=1)
    assert not once.on
    assert "reads nothing twice" in once.reason
    assert decide_for(store, "on", passes=1).on
    limited = decide_for(store, "auto", limit=1e-9)
    assert not limited.on
    assert "prefix.cache_limit_gib allows 1e-09 GiB" in limited.reason
    with_room(store, 10, monkeypatch)
    full = decide_for(store, "auto")
    assert not full.on
    assert "has room for 0.0 MiB" in full.reason
    for limit in (1e-9, None):
        with pytest.raises(ConfigError, match=r"prefix\.cache is on, but"):
            decide_for(store, "on", limit=limit)


def test_samples_that_are_there_need_no_room_and_serve_a_single_pass(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write({sample_key((1, 2, 3)): torch.zeros(3, 4), sample_key((4, 5)): torch.zeros(2, 4)})
    assert decide_for(with_room(store, 0, monkeypatch), "auto", passes=1).on


def test_changing_the_cache_does_not_stop_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    first = flags(tiny_model, tmp_path / "run", tmp_path / "cache", "--prefix.cache", "off")
    assert train(*first, "--train.epochs", "1") == 0
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "cache: 'off'" in config or 'cache: "off"' in config
    assert train(*flags(tiny_model, tmp_path / "run", tmp_path / "cache", "--train.epochs", "1")) == 0


def test_a_full_disk_leaves_the_losses_right(
    tiny_model: Path, tmp_path: Path, uncached: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "publish", full)
    assert train(*flags(tiny_model, tmp_path / "run", tmp_path / "cache")) == 0
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "run"), uncached, strict=True)) < 1e-5
    assert shards(tmp_path / "cache") == []


class Node(World):
    """One of two ranks whose disks are apart, so that nobody waits."""

    def barrier(self) -> None:
        """The other one is somewhere else."""

    def max(self, value: float) -> float:
        """It is asked nothing either."""
        return value


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_see_the_others_disk_fills_its_own(tiny_model: Path, tmp_path: Path, rank: int) -> None:
    trainer = set_up(
        invocation(*flags(tiny_model, tmp_path / "run", tmp_path / "cache", "--prefix.cache", "off")), World()
    )
    assert isinstance(trainer.state.prefix, Prefix)
    store = ActivationStore(tmp_path, Namespace({"weights": "a"}, 32, torch.float32))
    unneeded = [lambda: pytest.fail("it is there")] * 2
    cached = CachedPrefix(trainer.state.prefix, *unneeded, store, Node(rank, 0, 2))
    cached.fill(trainer.context.dataset.train)
    assert store.missing(sample_key(row.token_ids) for row in trainer.context.dataset.train) == []
    assert store.statistics.computed == ROWS


def test_int8_hidden_states_are_kept_apart_and_read_back(tiny_model: Path, tmp_path: Path) -> None:
    """With bfloat16 weights; the cold run and the warm one agree to the bit, the other precision is not met."""
    given = ("--model.dtype", "bfloat16", "--prefix.precision", "int8")
    cache = tmp_path / "cache"
    assert train(*flags(tiny_model, tmp_path / "plain", cache, "--model.dtype", "bfloat16")) == 0
    assert train(*flags(tiny_model, tmp_path / "cold", cache, *given)) == 0
    with counting_blocks() as runs:
        assert train(*flags(tiny_model, tmp_path / "warm", cache, *given)) == 0
    assert set(runs) == {4, 5}
    assert metrics(tmp_path / "warm") == metrics(tmp_path / "cold") != metrics(tmp_path / "plain")


def test_many_may_write_one_file_at_once(tmp_path: Path) -> None:
    texts = [str(number) * 1000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda text: replace_text(tmp_path / "note.json", text), texts))
    assert (tmp_path / "note.json").read_text(encoding="utf-8") in texts
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
