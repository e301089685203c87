"""What a checkpoint holds beside what its model uses: said by name, used where that is defined, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from every_type import make_any
from helpers import CHAT_TEMPLATE, make_tiny_model, make_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file

from toolkit.config.schema import MaskConfig, ModelConfig
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.load import load, load_tokenizer
from toolkit.planning.meta_model import meta_model
from toolkit.runtime.errors import MaskError, ModelError


def add(directory: Path, **tensors: torch.Tensor) -> None:
    """Put tensors into a model's file; two underscores stand for a dot."""
    file = directory / "model.safetensors"
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | new, file, metadata={"format": "pt"})


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config_of(directory: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(name_or_path=str(directory), dtype=dtype)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base")


def test_tensors_that_the_model_does_not_use_are_named_and_carried(base: Path, said: list[str], tmp_path: Path) -> None:
    add(base, model__layers__6__eh_proj__weight=torch.randn(3, 5, dtype=torch.float16),
        model__layers__0__self_attn__q_proj__bias=torch.randn(32),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.randn(4))  # fmt: skip
    loaded = load(config_of(base, "bfloat16"))
    (line,) = [text for text in said if "not used" in text]
    assert "3 tensors of the checkpoint are not used by LlamaForCausalLM" in line
    assert "model.layers.6.eh_proj.weight" in line
    assert "rotary_emb.inv_freq" in line
    assert "Of these, model.layers.0.self_attn.q_proj.bias: the model has the module but" in line
    comparison = loaded.save(tmp_path / "export")
    assert len(comparison.carried) == 3
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in comparison.carried:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])


def test_blocks_beyond_those_that_the_config_counts_are_named_and_carried(
    base: Path, said: list[str], tmp_path: Path
) -> None:
    edit(base / "config.json", num_hidden_layers=4)
    comparison = load(config_of(base)).save(tmp_path / "export")
    assert any("18 tensors of the checkpoint are not used" in text for text in said)
    assert {name.split(".")[2] for name in comparison.carried} == {"4", "5"}
    edit(tmp_path / "export" / "config.json", num_hidden_layers=6)
    assert load(config_of(tmp_path / "export")).anatomy.block_count == 6


def test_a_checkpoint_without_more_than_its_model_uses_is_not_talked_about(base: Path, said: list[str]) -> None:
    load(config_of(base))
    assert not said


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "nonsense"])
def test_a_quantisation_config_over_plain_weights_is_left_out_and_said(
    base: Path, said: list[str], tmp_path: Path, method: str
) -> None:
    edit(base / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    loaded = load(config_of(base))
    assert any(f"has a quantization_config ({method}), but its weights are stored plain (F32)" in text for text in said)
    loaded.save(tmp_path / "export")
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_eight_bits_are_refused_also_where_no_config_says_so(base: Path, dtype: torch.dtype) -> None:
    add(base, model__layers__0__mlp__up_proj__weight=torch.ones(64, 32).to(dtype))
    with pytest.raises(ModelError, match=r"holds quantised weights \(model\.layers\.0\.mlp\.up_proj\.weight"):
        load(config_of(base))


def test_weights_that_are_rounded_are_said(base: Path, said: list[str]) -> None:
    load(config_of(base, "bfloat16"))
    assert any("56 of 56 tensors are stored in float32 and rounded to bfloat16" in text for text in said)


def test_a_template_in_chat_template_json_is_used_and_said(base: Path, said: list[str]) -> None:
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert load_tokenizer(config_of(base)).chat_template == CHAT_TEMPLATE
    assert any("the chat template is that in its chat_template.json" in text for text in said)


@pytest.mark.parametrize("content", ["{", '{"chat_template": 3}', '{"template": "x"}', '{"chat_template": []}'])
def test_a_chat_template_json_without_a_template_is_refused(base: Path, content: str) -> None:
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(config_of(base))


@pytest.mark.parametrize("form", ["tokenizer_config", "files", "chat_template.json"])
def test_of_named_templates_the_default_is_used(base: Path, said: list[str], form: str) -> None:
    (base / "chat_template.jinja").unlink()
    named = [{"name": name, "template": f"{name}{CHAT_TEMPLATE}"} for name in ("default", "tool_use")]
    if form == "tokenizer_config":
        edit(base / "tokenizer_config.json", chat_template=named)
    elif form == "chat_template.json":
        (base / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    else:
        (base / "chat_template.jinja").write_text(named[0]["template"])
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text(named[1]["template"])
    assert load_tokenizer(config_of(base)).chat_template == f"default{CHAT_TEMPLATE}"
    assert any("of its chat templates (default, tool_use) the one named default is used" in text for text in said)


def test_several_templates_without_a_default_are_refused(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    edit(base / "tokenizer_config.json", chat_template=[{"name": n, "template": "x"} for n in ("alpaca", "rag")])
    with pytest.raises(ModelError, match=r"2 chat templates \(alpaca, rag\) and none named default"):
        load_tokenizer(config_of(base))


def test_an_integer_table_among_the_weights_is_loaded_and_planned(tmp_path: Path) -> None:
    make_any("deepseek_v4").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    tables = [tensor for tensor in stored.values() if tensor.dtype == torch.int64]
    assert tables
    state = load(config_of(tmp_path)).model.state_dict().values()
    assert sum(tensor.dtype == torch.int64 for tensor in state) == len(tables)
    assert meta_model(config_of(tmp_path)).anatomy.block_count == 4


def test_an_integer_parameter_is_never_trained() -> None:
    model = tiny_llama(tied=False)
    table = torch.nn.Parameter(torch.arange(4), requires_grad=False)
    model.model.layers[5].mlp.register_parameter("table", table)
    anatomy = detect_anatomy(model)
    mask = build_mask(MaskConfig(train=["all"]), anatomy)
    assert {tensor.name for tensor in anatomy.tensors} - set(mask.names) == {"model.layers.5.mlp.table"}
    apply_mask(model, mask, anatomy)
    with pytest.raises(MaskError, match="integer tables, which have no gradient"):
        build_mask(MaskConfig(train=["glob:*.table"]), anatomy)


def test_a_parameter_of_a_block_itself_is_part_of_the_block_and_of_no_component() -> None:
    anatomy = detect_anatomy(make_any("doge"))
    assert anatomy.by_name["model.layers.2.input_residual"].block == 2
    assert "model.layers.3.input_residual" in build_mask(MaskConfig(train=["last:1"]), anatomy).names
    assert not [n for n in build_mask(MaskConfig(train=["last:1/mlp"]), anatomy).names if "residual" in n]
