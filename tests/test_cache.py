"""The activation cache in training: the same losses cold, warm, damaged or absent, and no prefix where none is needed."""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import invocation, make_tokenizer, metrics, tiny_flags, tiny_llama, train
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from toolkit.config.schema import PrefixConfig
from toolkit.data.batches import collate
from toolkit.data.examples import Example
from toolkit.distributed import World
from toolkit.errors import ConfigError
from toolkit.prefix.cached import CachedPrefix
from toolkit.prefix.caching import Request, decide, identity, open_store
from toolkit.train.setup import set_up
from toolkit.train.step import train_step

ROWS, EPOCHS, BLOCKS = 20, 3, 6


@contextmanager
def counting_blocks() -> Iterator[Counter[int]]:
    """How often each block of a tiny Llama runs, by its index."""
    runs: Counter[int] = Counter()

    def count(module: nn.Module, *_: Any) -> None:
        if isinstance(module, LlamaDecoderLayer):
            runs[module.self_attn.layer_idx] += 1

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield runs
    finally:
        handle.remove()


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
    rows = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        if isinstance(module, LlamaDecoderLayer) and module.self_attn.layer_idx == 0:
            rows += (args[0] if args else kwargs["hidden_states"]).shape[0]

    setup = set_up(invocation(*flags(tiny_model, tmp_path / "run", tmp_path / "cache", "--prefix.cache", "off")), World())
    assert setup.prefix is not None
    handle = nn.modules.module.register_module_forward_pre_hook(count, with_kwargs=True)
    try:
        assert train(*flags(tiny_model, tmp_path / "run", tmp_path / "cache")) == 0
    finally:
        handle.remove()
    checks = 7  # the start-up check runs it whole, whole again and cut; repeatability three times; the dry run once
    assert rows <= ROWS + checks


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_no_tensor_of_the_prefix_is_alive_while_a_cached_run_trains(
    tiny_model: Path, tmp_path: Path, warm: bool
) -> None:
    if warm:
        assert train(*flags(tiny_model, tmp_path / "first", tmp_path / "cache")) == 0
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    setup = set_up(invocation(*flags(tiny_model, tmp_path / "run", tmp_path / "cache")), World())
    assert isinstance(setup.prefix, CachedPrefix)
    assert setup.prefix.prefix is None
    gc.collect()
    new = [o for o in gc.get_objects() if isinstance(o, nn.Parameter) and id(o) not in before]
    suffix = {id(p) for p in setup.suffix.parameters()}
    masters = {id(p) for p in setup.engine.masters().values()}
    others = [tuple(p.shape) for p in new if id(p) not in suffix | masters and p.numel()]
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
    cache, cold = filled
    setup = set_up(invocation(*flags(tiny_model, tmp_path / "run", cache)), World())
    assert isinstance(setup.prefix, CachedPrefix)
    for path in shards(cache):
        flip(path)
    batch = collate(setup.dataset.train[:1], setup.pad_id)
    with caplog.at_level(logging.WARNING, "frostline"):
        losses = [train_step([batch], setup.prefix, setup.engine, World()).loss]
    assert setup.prefix.prefix is not None
    assert "loading the prefix again" in caplog.text
    assert all(loss == loss for loss in losses)


def test_other_weights_never_hit(tiny_model: Path, tmp_path: Path, filled: tuple[Path, list[float]]) -> None:
    other = tmp_path / "other"
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    assert train(*flags(other, tmp_path / "a", filled[0])) == 0
    assert train(*flags(other, tmp_path / "b", tmp_path / "elsewhere", "--prefix.cache", "off")) == 0
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True)) < 1e-5


def test_weights_above_the_line_do_not_matter_to_the_cache(
    tiny_model: Path, tmp_path: Path, filled: tuple[Path, list[float]]
) -> None:
    other = tmp_path / "other"
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with counting_blocks() as runs:
        assert train(*flags(other, tmp_path / "a", filled[0])) == 0
    assert set(runs) == {4, 5}


def test_another_boundary_dtype_or_attention_has_a_place_of_its_own(tiny_model: Path) -> None:
    from toolkit.config.schema import ModelConfig
    from toolkit.models.load import load

    loaded = load(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))
    half = load(ModelConfig(name_or_path=str(tiny_model)))
    eager = load(ModelConfig(name_or_path=str(tiny_model), dtype="float32", attn_implementation="eager"))
    cpu = torch.device("cpu")
    one = identity(loaded.model, loaded.anatomy, 4, cpu)
    others = [
        identity(loaded.model, loaded.anatomy, 3, cpu),
        identity(half.model, half.anatomy, 4, cpu),
        identity(eager.model, eager.anatomy, 4, cpu),
    ]
    assert one == identity(loaded.model, loaded.anatomy, 4, cpu)
    assert all(one != other for other in others)


def test_dropout_in_the_prefix_switches_the_cache_off(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    model.config.attention_dropout = 0.1
    directory = tmp_path / "dropout"
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    with caplog.at_level(logging.INFO, "frostline"):
        setup = set_up(invocation(*flags(directory, tmp_path / "run", tmp_path / "cache")), World())
    assert not isinstance(setup.prefix, CachedPrefix)
    assert "activation cache: off (auto: the prefix gives other values each time" in caplog.text
    with pytest.raises(ConfigError, match="prefix.cache is on, but the prefix gives other values"):
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
        setup = set_up(invocation(*given), World())
    assert not isinstance(setup.prefix, CachedPrefix)
    assert reason in caplog.text
    with pytest.raises(ConfigError, match="prefix.cache is on, but") as raised:
        set_up(invocation(*given, "--prefix.cache", "on"), World())
    assert reason in str(raised.value)
    assert not (tmp_path / "cache").exists()


def request(cache: str, passes: float = 3, limit: float | None = None) -> Request:
    settings = PrefixConfig(cache=cache, cache_limit_gib=limit)
    return Request(settings, (Example((1, 2, 3), 1), Example((4, 5), 1), Example((1, 2, 3), 1)), passes, 2**20)


def test_the_decision_weighs_passes_limit_and_disk(tmp_path: Path) -> None:
    store = open_store(PrefixConfig(cache_dir=str(tmp_path)), {"weights": "a"})
    plenty = 2**40
    assert decide(request("auto"), store, plenty).use
    assert "5.0 MiB, 0 of 2 samples" in decide(request("auto"), store, plenty).reason
    once = decide(request("auto", passes=1), store, plenty)
    assert not once.use
    assert "reads nothing twice" in once.reason
    assert decide(request("on", passes=1), store, plenty).use
    limited = decide(request("auto", limit=0.001), store, plenty)
    assert not limited.use
    assert "cache_limit_gib allows 0.001 GiB" in limited.reason
    full = decide(request("auto"), store, 2**20)
    assert not full.use
    assert "1.0 MiB are free" in full.reason
    for bad in (request("on", limit=0.001), request("on")):
        with pytest.raises(ConfigError, match="prefix.cache is on, but"):
            decide(bad, store, 2**20)


def test_a_sample_that_is_there_costs_no_disk_and_is_used_for_a_single_pass(tmp_path: Path) -> None:
    store = open_store(PrefixConfig(cache_dir=str(tmp_path)), {"weights": "a"})
    from toolkit.prefix.store import sample_key

    store.write({sample_key((1, 2, 3)): torch.zeros(3, 4), sample_key((4, 5)): torch.zeros(2, 4)})
    assert decide(request("auto", passes=1), store, free=0).use


def test_changing_the_cache_does_not_stop_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    first = flags(tiny_model, tmp_path / "run", tmp_path / "cache", "--prefix.cache", "off")
    assert train(*first, "--train.epochs", "1") == 0
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "cache: 'off'" in config or 'cache: "off"' in config
    assert train(*flags(tiny_model, tmp_path / "run", tmp_path / "cache", "--train.epochs", "1")) == 0


def test_a_full_disk_leaves_the_losses_right(
    tiny_model: Path, tmp_path: Path, uncached: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.prefix import store

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    assert train(*flags(tiny_model, tmp_path / "run", tmp_path / "cache")) == 0
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "run"), uncached, strict=True)) < 1e-5
    assert shards(tmp_path / "cache") == []
