"""The prefix in fewer bits and in other places: bytes are counted, and only storage changes."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import invocation, make_tokenizer, metrics, set_up, tiny_flags, train
from test_zoo import make, masked
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from toolkit.config.schema import ModelConfig
from toolkit.data.batches import Batch, collate, epoch_order, step_batches
from toolkit.data.examples import Example
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.bundled import cache_root
from toolkit.models.disk_offload import offload_to_disk
from toolkit.models.load import load
from toolkit.models.quantization import (
    QuantizationSpec,
    check_quantisable,
    dequantise,
    quantisable,
    quantise,
    quantised_bytes,
)
from toolkit.models.weight_fingerprint import fingerprint
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError, ModelError
from toolkit.split.exactness import split_is_exact
from toolkit.split.suffix import split
from toolkit.training.trainer import Trainer


def smooth_llama() -> LlamaForCausalLM:
    """A Llama that one weight in a hundred does not turn upside down, large enough for blocks of 64 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0,
        bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("frozen") / "model"
    smooth_llama().to(torch.bfloat16).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ready(model: Path, *flags: str, dtype: str = "bfloat16") -> Trainer:
    base = tiny_flags(
        model, Path("unused"), "--model.dtype", dtype, "--mask.train", "last:2", "head", "--prefix.cache", "off"
    )
    return set_up(invocation(*base, *flags), World())


def first_batch(trainer: Trainer) -> Batch:
    order = epoch_order(trainer.context.batch_plan.rows, 0, 0)
    return next(
        iter(step_batches(trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id))
    )[0]


def live() -> int:
    """Bytes of all storages that any tensor of this process holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def lower_bytes(trainer: Trainer) -> int:
    """Bytes of the ten frozen blocks as they were."""
    blocks = trainer.state.prefix.model.model.layers[:10]  # type: ignore[union-attr]
    return sum(p.nbytes for block in blocks for p in block.parameters())


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 96), (6, 5), (3, 32, 24)])
def test_a_quantised_weight_is_near_and_as_large_as_reckoned(precision: Any, dtype: torch.dtype, shape: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    form = QuantizationSpec(precision, shape, dtype, transposed=False)
    parts = quantise(weight, form)
    assert sum(part.nbytes for part in parts.values()) == quantised_bytes(form)
    restored = dequantise(parts, form)
    assert (restored.shape, restored.dtype) == (weight.shape, dtype)
    bound = {"int8": 1 / 127, "nf4": 0.17}[precision]  # half a step of 254, and of nf4's widest gap, and rounding
    assert ((restored - weight).abs().max() / weight.abs().max()).item() < bound


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_transposed_weight_is_quantised_by_its_outputs(precision: Any) -> None:
    weight = torch.randn(48, 96)
    plain = QuantizationSpec(precision, (48, 96), torch.float32, transposed=False)
    other = QuantizationSpec(precision, (96, 48), torch.float32, transposed=True)
    turned = dequantise(quantise(weight.t().contiguous(), other), other)
    assert torch.equal(turned, dequantise(quantise(weight, plain), plain).t())


def test_linears_conv1d_and_stacked_experts_are_quantised_and_nothing_else() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=64))
    names = quantisable(gpt2.transformer.h[0], "int8")
    assert set(names) == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert all(form.transposed for form in names.values())
    config = Qwen2MoeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
        intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
    )  # fmt: skip
    block = Qwen2MoeForCausalLM(config).model.layers[0]
    found = quantisable(block, "nf4")
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"} <= set(found)
    assert not [name for name in found if "norm" in name or "bias" in name]


def test_blocks_that_hold_little_to_quantise_are_refused_by_the_names_of_their_modules() -> None:
    block = nn.ModuleDict({"conv": nn.Conv1d(64, 64, 4), "proj": nn.Linear(8, 8)})
    with pytest.raises(ModelError, match=r"64 of the 16,520 parameters .* the rest is in Conv1d 16,448, Linear 8"):
        check_quantisable([block], "int8")


def test_the_whole_weights_are_gone_once_they_are_quantised(model: Path) -> None:
    ready(model)  # what the first set-up leaves behind for good
    before = live()
    plain = ready(model)
    whole, lower = live() - before, lower_bytes(plain)
    del plain
    assert live() == before
    for precision, share in (("int8", 0.54), ("nf4", 0.30)):
        trainer = ready(model, "--prefix.precision", precision)
        assert trainer.state.prefix is not None
        assert trainer.state.prefix.frozen is not None
        stored = trainer.state.prefix.frozen.nbytes()["device"]
        assert stored < share * lower
        assert whole - (live() - before) == pytest.approx(lower - stored, abs=2048), "but for the values of nf4's codes"
        assert trainer.plan is not None
        assert trainer.plan.memory.most["prefix weights"] == stored + 512 * 64 * 2
        del trainer


class Watch:
    """The most bytes of parameters that the frozen blocks hold at once, looked at within each block."""

    def __init__(self, trainer: Trainer) -> None:
        assert trainer.state.prefix is not None
        self.blocks = list(trainer.state.prefix.model.model.layers[:10])
        self.most = 0
        for block in self.blocks:
            block.mlp.register_forward_pre_hook(self._look)

    def _look(self, *_: Any) -> None:
        held = sum(p.nbytes for block in self.blocks for p in block.parameters() if not p.is_meta)
        self.most = max(self.most, held)


def test_on_disk_no_weight_is_held_but_a_blocks_own_while_it_computes(model: Path, cache: Path) -> None:
    ready(model)
    before = live()
    plain = ready(model)
    whole, lower, table = live() - before, lower_bytes(plain), 512 * 64 * 2
    expected = plain.state.prefix(first_batch(plain))  # type: ignore[misc]
    sha = plain.context.base.sha256
    del plain
    trainer = ready(model, "--prefix.placement", "disk")
    assert trainer.context.base.sha256 == sha, "the identity of the base does not depend on where it lies"
    assert trainer.state.prefix is not None
    assert trainer.state.prefix.frozen is not None
    assert trainer.state.prefix.frozen.nbytes() == {"disk": lower + table}
    held = live() - before - expected.nbytes
    assert whole - held == pytest.approx(lower + table, abs=64)
    assert trainer.plan is not None
    assert trainer.plan.memory.most["prefix weights"] == 0
    watch = Watch(trainer)
    assert torch.equal(trainer.state.prefix(first_batch(trainer)), expected)
    assert watch.most == lower // 10
    assert trainer.plan.prefix_memory.streamed == 2 * watch.most, "the plan allows for one more that is on its way"
    kept = {path.name for path in cache.iterdir()} - {"float32-gradients.json", "attention-gradients.json", "tokens"}
    assert not kept, "files without a name vanish with the process"


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_place_changes_no_bit(model: Path, precision: str) -> None:
    hidden = []
    for place in ("device", "disk"):
        trainer = ready(model, "--prefix.precision", precision, "--prefix.placement", place)
        assert trainer.state.prefix is not None
        trainer.state.prefix.train()
        hidden.append(trainer.state.prefix(first_batch(trainer)))
        trainer.state.prefix.eval()
        hidden.append(trainer.state.prefix(first_batch(trainer)))
        assert trainer.state.prefix.frozen is not None
        assert set(trainer.state.prefix.frozen.nbytes()) == {place}
    assert all(torch.equal(hidden[0], other) for other in hidden[1:])


def test_hidden_states_of_a_row_do_not_depend_on_the_rows_beside_it(model: Path) -> None:
    trainer = ready(model, "--prefix.precision", "int8", "--train.micro_batch_size", "2", dtype="float32")
    both = first_batch(trainer)
    assert both.attention_mask is not None
    length = int(both.attention_mask[0].sum())
    alone = Batch(both.input_ids[:1, :length], None, both.supervised[:1, :length], both.targets, length)
    assert trainer.state.prefix is not None
    together = trainer.state.prefix(both)[:1, :length]
    assert torch.allclose(together, trainer.state.prefix(alone), atol=1e-5)


def test_training_on_a_quantised_prefix_learns_alike(model: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("model", "int8", "nf4"):
        run = tmp_path / precision
        more = ("--prefix.precision", precision, "--train.learning_rate", "1e-4", "--mask.train", "last:2", "head")
        assert train(*tiny_flags(model, run, "--model.dtype", "bfloat16", *more)) == 0
        every = metrics(run)
        size = len(every) // 3
        losses[precision] = [sum(every[e * size : (e + 1) * size]) / size for e in range(3)]
    gain = {precision: means[0] - means[-1] for precision, means in losses.items()}
    assert losses["int8"] != losses["model"], "the prefix was not quantised"
    assert abs(losses["int8"][-1] - losses["model"][-1]) < 0.02
    assert gain["nf4"] > 0.9 * gain["model"] > 0


def test_a_mixture_whose_experts_are_stored_one_by_one_can_stay_on_disk(tmp_path: Path, cache: Path) -> None:
    config = Qwen2MoeConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
        intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    wanted = ModelConfig(name_or_path=str(tmp_path / "moe"), dtype="float32")
    whole = load(wanted)
    part = load(wanted, whole.tokenizer, whole.anatomy, blocks_on_disk=2)
    own = dict(whole.model.named_parameters())
    assert {name.split(".")[2] for name in part.on_disk} == {"0", "1"}
    assert all(torch.equal(stored.read(), own[name]) for name, stored in part.on_disk.items())
    assert fingerprint(part.model, part.on_disk) == fingerprint(whole.model)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama4_text", "qwen2_moe", "mamba"])
def test_any_architecture_borrows_its_lower_weights_unchanged(name: str) -> None:
    model = make(name)
    masked(model, "last:2", "head")
    anatomy, batch = detect_anatomy(model), collate([Example.with_answer(tuple(range(3, 20)), 9)], 0)
    prefix, _ = split(model, anatomy, 2)
    assert prefix is not None
    expected = prefix.eval()(batch)
    blocks = [f"{anatomy.blocks}.{index}" for index in range(2)]
    frozen = FrozenWeights(model, blocks, anatomy.embeddings, torch.device("cpu"), {})
    lent, suffix = split(model, anatomy, 2, frozen)
    assert lent is not None
    assert split_is_exact(model, lent, suffix, batch)
    assert torch.equal(lent.eval()(batch), expected)
    frozen.place_weights(lent.model, "nf4", "disk")
    assert 0 < ((lent(batch) - expected).norm() / expected.norm()).item() < 0.7


def test_a_shared_table_that_the_head_trains_stays_where_the_head_is(model: Path) -> None:
    flags = (
        "--mask.train",
        "head",
        "--mask.tied",
        "head_only",
        "--prefix.placement",
        "disk",
        "--prefix.precision",
        "nf4",
    )
    trainer = set_up(invocation(*tiny_flags(model, Path("unused"), "--prefix.cache", "off", *flags)), World())
    assert trainer.state.prefix is not None
    table = trainer.state.prefix.model.model.embed_tokens.weight
    assert table.data_ptr() == trainer.state.suffix.model.lm_head.weight.data_ptr()


def test_the_host_is_the_device_of_a_cpu_run_and_the_log_says_so(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "frostline"):
        trainer = ready(model, "--prefix.placement", "cpu")
    assert "prefix.placement: cpu changes nothing here" in caplog.text
    assert trainer.state.prefix is not None
    assert trainer.state.prefix.frozen is None


@pytest.mark.parametrize("flags", [("--prefix.precision", "nf4"), ("--prefix.placement", "disk")])
def test_without_a_frozen_block_there_is_nothing_to_store_otherwise(model: Path, flags: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"{flags[0][2:]} is '{flags[1]}', but the mask leaves no block frozen"):
        ready(model, *flags, "--mask.train", "all", "--mask.tied", "both")


def test_an_architecture_that_cannot_be_cut_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.training.cut.split_is_exact", lambda *_: False)
    with pytest.raises(ModelError, match="does not give the same logits when cut at block 10, so it has no prefix"):
        ready(model, "--prefix.precision", "int8")


def test_a_full_disk_is_an_error_that_names_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.models.disk_offload.write_safetensors", full)
    with pytest.raises(ModelError, match=rf"could not be written to {cache_root()} .*No space left"):
        offload_to_disk({"weight": torch.ones(4)})
