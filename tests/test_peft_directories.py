"""Directories that peft wrote, and those written for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import logits, mask, save_of_zoo
from exaone_reference import make_exaone
from helpers import tiny_flags, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from toolkit.commands.export import export
from toolkit.config.schema import ModelConfig
from toolkit.inference.open_model import load_base, open_model
from toolkit.runtime.errors import CheckpointError

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
]


def laid_on(model: Path, adapter: Path) -> Any:
    """The model with a directory of peft's as its ``model.delta``."""
    return load_base(ModelConfig(name_or_path=str(model), dtype="float32", delta=str(adapter))).model


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def peft_directory(
    model: Path, directory: Path, modules: tuple[str, ...] = ("q_proj", "down_proj"), **settings: Any
) -> Any:
    """A directory that peft wrote, its adapters and saved modules changed at random; returns peft's logits."""
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(**{"r": 4, "target_modules": list(modules), "task_type": "CAUSAL_LM", **settings}),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    wrapped.save_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, str(directory)))


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}, {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {r"layers\.[45]\..*q_proj": 32}}, {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_peft_wrote_is_laid_on_as_peft_loads_it(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    expected = peft_directory(tiny_model, tmp_path / "adapter", **settings)
    found = logits(
        load_base(ModelConfig(name_or_path=str(tiny_model), dtype="float32", delta=str(tmp_path / "adapter"))).model
    )
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_gpt2s_adapters_come_back(tmp_path: Path) -> None:
    save_of_zoo("gpt2", tmp_path / "gpt2")
    expected = peft_directory(tmp_path / "gpt2", tmp_path / "adapter", ("c_attn", "mlp.c_proj"), fan_in_fan_out=True)
    assert_alike(logits(laid_on(tmp_path / "gpt2", tmp_path / "adapter")), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora', which changes the base"),
        ({"alora_invocation_tokens": [5, 6]}, r"sets alora_invocation_tokens \(\[5, 6\]\)"),
        ({"bias": "all"}, r"sets bias \('all'\)"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "holds no adapter of a linear layer"),
    ],
    ids=str,
)
def test_what_would_be_laid_on_otherwise_is_refused(
    settings: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    peft_directory(tiny_model, tmp_path / "adapter", **settings)
    with pytest.raises(CheckpointError, match=message):
        laid_on(tiny_model, tmp_path / "adapter")


def test_a_damaged_directory_of_peft_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    peft_directory(tiny_model, tmp_path / "adapter", use_dora=True)
    file, settings = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    whole, values = load_file(file), json.loads(settings.read_text())
    for part in ("lora_B.weight", "lora_magnitude_vector"):
        gone = next(name for name in whole if name.endswith(part))
        save_file({name: tensor for name, tensor in whole.items() if name != gone}, file)
        with pytest.raises(CheckpointError, match=r"lacks .* it is damaged"):
            laid_on(tiny_model, tmp_path / "adapter")
    save_file({}, file)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        laid_on(tiny_model, tmp_path / "adapter")
    save_file(whole, file)
    for wrong in ({"lora_alpha": None}, {"lora_alpha": "much"}, {"alpha_pattern": {"(": 3}}):
        settings.write_text(json.dumps({**values, **wrong}))
        with pytest.raises(CheckpointError, match="alpha cannot be read"):
            laid_on(tiny_model, tmp_path / "adapter")
    settings.write_text(json.dumps(values))
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(CheckpointError, match="pickled weights are not loaded"):
        laid_on(tiny_model, tmp_path / "adapter")


def test_exaones_adapters_go_out_and_come_back_with_their_alphas(tmp_path: Path) -> None:
    make_exaone(tmp_path / "exaone", tied=True)
    first, second = ({"lora": {"select": f"blocks:{n}", "rank": n, "alpha": a}} for n, a in ((4, 4), (5, 64)))
    flags = tiny_flags(tmp_path / "exaone", tmp_path / "run", "--train.max_steps", 4, *mask(first, second, "head"))
    assert train(*flags) == 0
    ours = logits(open_model(str(tmp_path / "run")).loaded.model)
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.transformer.h.4.attn.attention.out_proj.lora_A.weight" in file.keys()  # noqa: SIM118
    assert_alike(logits(laid_on(tmp_path / "exaone", tmp_path / "adapter")), ours)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"lora": {"select": "last:1"}}, "re:.*layers.5.self_attn.*bias"], "whole and .* through an adapter"),
        ([{"lora": {"select": "last:1"}}, "re:.*layers.2.self_attn.q_proj.weight"], "trained a part of .*not its bias"),
    ],
)
def test_what_peft_has_no_place_for_is_not_exported_in_its_form(
    entries: list[Any], message: str, tmp_path: Path
) -> None:
    save_of_zoo("qwen2", tmp_path / "qwen2", num_hidden_layers=6)
    flags = tiny_flags(tmp_path / "qwen2", tmp_path / "run", "--train.max_steps", 2, *mask(*entries))
    assert train(*flags) == 0
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "run", tmp_path / "adapter", adapter=True)


def test_an_export_names_its_own_base_and_not_another(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 1, *mask({"lora": {"select": "last:1"}}))
    assert train(*flags) == 0
    save_of_zoo("gpt2", tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"config\.json has changed: .*model_type was 'llama', is 'gpt2'"):
        export(tmp_path / "run", tmp_path / "adapter", adapter=True, base=tmp_path / "gpt2")
