"""What the files of an export say: true to the weights, in the form that the base has, in keys that others read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from every_type import make_any
from helpers import CHAT_TEMPLATE, make_tiny_model, make_tokenizer, tiny_flags, tiny_llama, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from zoo import make

from toolkit.checkpoint.delta import Base, Delta, save_delta
from toolkit.config.schema import MaskConfig, ModelConfig
from toolkit.exporting.run_export import export_model
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import build_mask
from toolkit.models import weight_files
from toolkit.models.bundled import BUNDLED_NAME, bundled_directory
from toolkit.models.config_json import config_to_write
from toolkit.models.load import LoadedModel, load

IDS = torch.arange(3, 40)[None]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def loaded_from(directory: Path, *, untied: bool = False) -> LoadedModel:
    loaded = load(ModelConfig(name_or_path=str(directory), dtype="float32"))
    if untied:
        apply_mask(loaded.model, build_mask(MaskConfig(train=["head"], tied="untie"), loaded.anatomy), loaded.anatomy)
        with torch.no_grad():
            loaded.model.get_output_embeddings().weight.add_(0.1)
    return loaded


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return logits


def rename(directory: Path, rename_one: Any) -> None:
    """Give the tensors of a model's file other names; none leaves one out."""
    file = directory / "model.safetensors"
    new = {name: tensor for old, tensor in load_file(file).items() if (name := rename_one(old))}
    save_file(new, file, metadata={"format": "pt"})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base")


def test_tying_is_what_the_weights_are_and_not_what_the_config_said(base: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": torch.randn(512, 32)}, file, metadata={"format": "pt"})
    assert read(base / "config.json")["tie_word_embeddings"] is True
    loaded_from(base).save(tmp_path / "own")
    assert read(tmp_path / "own" / "config.json")["tie_word_embeddings"] is False
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, file, metadata={"format": "pt"})
    loaded_from(base).save(tmp_path / "tied")
    assert read(tmp_path / "tied" / "config.json")["tie_word_embeddings"] is True
    written = load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], copy), "stored under two names, as it came"


def test_the_ends_that_were_trained_join_those_of_the_generation_config(base: Path, tmp_path: Path) -> None:
    name = "generation_config.json"
    (base / name).write_text('{"eos_token_id": 7, "temperature": 0.6, "do_sample": false}')  # refused by its own check
    loaded_from(base).save(tmp_path / "more", ends=[0, 7])
    assert read(tmp_path / "more" / name) == {"eos_token_id": [7, 0], "temperature": 0.6, "do_sample": False}
    loaded_from(base).save(tmp_path / "same", ends=[7])
    assert (tmp_path / "same" / name).read_bytes() == (base / name).read_bytes()
    (base / name).write_text('{"eos_token_id": [7, 300]}')  # 300 is part of a word
    loaded_from(base).save(tmp_path / "fewer", ends=[7])
    assert read(tmp_path / "fewer" / name) == {"eos_token_id": 7}
    (base / name).unlink()
    loaded_from(base).save(tmp_path / "new", ends=[0, 2])
    assert read(tmp_path / "new" / name) == {"pad_token_id": 0, "eos_token_id": [0, 2]}


def test_the_tokenizers_class_is_one_that_transformers_4_knows(base: Path, tmp_path: Path) -> None:
    assert read(base / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    settings = read(base / "tokenizer_config.json") | {"extra_special_tokens": ["<|user|>"]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded_from(base).save(tmp_path / "export")
    written = read(tmp_path / "export" / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"], "else generate() is given token_type_ids"
    assert written["additional_special_tokens"] == ["<|user|>"]
    assert "extra_special_tokens" not in written
    texts = ["why <|user|>\n", "Ice."]
    tokenizers = [AutoTokenizer.from_pretrained(directory) for directory in (base, tmp_path / "export")]
    assert tokenizers[0](texts).input_ids == tokenizers[1](texts).input_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_weights_may_be_read_by_whoever_may_read_the_files_beside_them(base: Path, tmp_path: Path) -> None:
    loaded = loaded_from(base)
    loaded.save(tmp_path / "export")
    mask = build_mask(MaskConfig(train=["last:1"]), loaded.anatomy)
    trained = {name: dict(loaded.model.named_parameters())[name].data for name in mask.names}
    save_delta(Delta(trained, mask, Base(ModelConfig(name_or_path=str(base)), "0")), tmp_path / "delta")
    for directory in ("export", "delta"):
        assert len({path.stat().st_mode for path in (tmp_path / directory).iterdir()}) == 1


@pytest.mark.slow
def test_a_converted_bundled_model_may_be_read_by_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    directory = bundled_directory(BUNDLED_NAME)
    assert directory.stat().st_mode == directory.parent.stat().st_mode
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


def test_other_files_are_copied_in_the_form_they_came_in(base: Path, tmp_path: Path) -> None:
    settings = read(base / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    contents = {
        "tokenizer_config.json": json.dumps(settings | {"chat_template": CHAT_TEMPLATE}),
        "chat_template.json": json.dumps({"chat_template": CHAT_TEMPLATE}), "preprocessor_config.json": '{"size": 4}',
        "processor_config.json": "{}", "additional_chat_templates/rag.jinja": "{{ 1 }}", "LICENSE": "terms",
    }  # fmt: skip
    (base / "additional_chat_templates").mkdir()
    for name, text in contents.items():
        (base / name).write_text(text)
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (base / "notes.txt").write_text("not of the checkpoint")
    loaded_from(base).save(tmp_path / "export")
    for name in (*contents, "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "export" / name).read_bytes() == (base / name).read_bytes(), name
    assert not (tmp_path / "export" / "notes.txt").exists()


@pytest.mark.parametrize("untied", [False, True])
def test_names_without_the_base_models_prefix_stay_unless_a_head_is_added(tmp_path: Path, untied: bool) -> None:
    base = tmp_path / "base"
    make("gpt2", vocab_size=512).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    rename(base, lambda name: name.removeprefix("transformer."))
    tensors = load_file(base / "model.safetensors")
    masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril() for index in range(4)}
    save_file(tensors | masks, base / "model.safetensors", metadata={"format": "pt"})
    loaded = loaded_from(base, untied=untied)
    comparison = loaded.save(tmp_path / "export")
    assert comparison.carried == tuple(masks)
    written = load_file(tmp_path / "export" / "model.safetensors").keys() - masks.keys()
    names = {f"transformer.{name}" for name in tensors} | {"lm_head.weight"} if untied else tensors.keys()
    assert written == names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(loaded.model))


def test_a_wrapper_is_written_as_the_wrapper_with_its_vision_tower(tmp_path: Path) -> None:
    base, text = tmp_path / "base", make_any("qwen3_5_moe")
    text.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    rename(base, lambda name: name.replace("model.", "model.language_model.", 1))
    more = {"model.visual.blocks.0.weight": torch.randn(4, 4).half(), "mtp.fc.weight": torch.randn(2, 2)}
    tensors = load_file(base / "model.safetensors") | more
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    outer = {"model_type": "qwen3_5_moe", "text_config": read(base / "config.json"), "image_token_id": 5}
    (base / "config.json").write_text(json.dumps(outer | {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}))
    loaded = loaded_from(base, untied=True)
    comparison = loaded.save(tmp_path / "export")
    assert comparison.carried == tuple(more)
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert written.keys() == tensors.keys() | {"lm_head.weight"}
    assert torch.equal(written["model.visual.blocks.0.weight"], more["model.visual.blocks.0.weight"])
    config = read(tmp_path / "export" / "config.json")
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
    assert (config["image_token_id"], config["architectures"]) == (5, ["Qwen3_5MoeForConditionalGeneration"])
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(loaded.model))


def test_shards_hold_what_is_carried_and_the_index_names_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 40_000)
    extra = {"mtp.weight": torch.randn(100, 100)}
    save_file(load_file(base / "model.safetensors") | extra, base / "model.safetensors", metadata={"format": "pt"})
    loaded_from(base).save(tmp_path / "export")
    index = read(tmp_path / "export" / "model.safetensors.index.json")["weight_map"]
    assert len(set(index.values())) > 2
    for name, file in index.items():
        with safe_open(tmp_path / "export" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert torch.equal(logits_of(loaded_from(tmp_path / "export").model), logits_of(tiny_llama()))


SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32}  # fmt: skip
BOTH = {"full_attention": {"rope_type": "default", "rope_theta": 9.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 8.0}}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rotary", "older"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 7.0}, {"rope_theta": 7.0, "rope_scaling": None}),
        ("llama", {**SCALED, "rope_theta": 7.0}, {"rope_theta": 7.0, "rope_scaling": SCALED}),
        ("stablelm", {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5},
         {"rope_theta": 7.0, "partial_rotary_factor": 0.5}),
        ("gpt_neox", {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5},
         {"rotary_emb_base": 7.0, "rotary_pct": 0.5}),
        ("phi3", {**LONG, "rope_theta": 7.0, "partial_rotary_factor": 1.0},
         {"rope_theta": 7.0, "rope_scaling": {key: LONG[key] for key in ("short_factor", "long_factor")}
          | {"type": "longrope"}}),
        ("gemma3_text", BOTH, {"rope_theta": 9.0, "rope_local_base_freq": 8.0, "rope_scaling": None}),
    ],
)  # fmt: skip
def test_rotary_settings_are_written_in_the_older_keys_too(
    kind: str, rotary: dict[str, Any], older: dict[str, Any]
) -> None:
    model = make(kind, rope_parameters=rotary)
    written = config_to_write(model.config.to_dict(), model)
    assert {key: written.get(key) for key in older} == older
    assert written["rope_parameters"] == model.config.rope_parameters
    assert written["torch_dtype"] == written["dtype"] == "float32"
    again = AutoConfig.for_model(**written).rope_parameters
    assert {key: again[key] for key in written["rope_parameters"]} == written["rope_parameters"]


def test_older_keys_of_the_base_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    config = read(base / "config.json")
    config.pop("rope_parameters")
    given = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (base / "config.json").write_text(json.dumps(config | given))
    loaded_from(base).save(tmp_path / "export")
    written = read(tmp_path / "export" / "config.json")
    assert {key: written[key] for key in given} == given
    assert written["rope_parameters"]["rope_theta"] == 5e5


def test_the_card_says_what_was_found_when_the_weights_were_compared(base: Path, tmp_path: Path) -> None:
    flags = ("--mask.train", "last:2", "--train.max_steps", 2)
    for dtype in ("bfloat16", "float32"):
        assert train(*tiny_flags(base, tmp_path / dtype, *flags, "--model.dtype", dtype)) == 0
        export_model(tmp_path / dtype, tmp_path / f"{dtype}-export")
    rounded, same = ((tmp_path / f"{dtype}-export" / "README.md").read_text() for dtype in ("bfloat16", "float32"))
    assert "- 29 the base model's values rounded, and otherwise unchanged" in rounded
    assert "- 38 bit-identical to the base model's" in same
    assert "bit-identical" not in rounded
    assert "- 18 of other values" in same
    shutil.rmtree(tmp_path / "float32-export")
    export_model(tmp_path / "float32", tmp_path / "float32-export", "bfloat16")
    assert "- 29 the base model's values rounded" in (tmp_path / "float32-export" / "README.md").read_text()
