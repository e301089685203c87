"""A base in 8 or 4 bits over a run's life: schedules, stops, ranks, peft's directory, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapter_runs import IDS, assert_learned_alike, back_to, checkpoint_of, logits, mask, save_of_zoo
from bitsandbytes.functional import dequantize_4bit
from helpers import (
    ENGLISH,
    invocation,
    make_tokenizer,
    masters_of,
    metrics,
    reseal,
    run_here,
    run_ranks,
    set_up,
    tiny_flags,
    train,
)
from peft import PeftModel
from row_runs import ADD, TOKENS, rows
from test_frozen_weights import smooth_llama
from test_quantised_runs import dequantised, entry
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from toolkit.commands.export import export
from toolkit.config.schema import ModelConfig
from toolkit.inference.open_model import load_base, open_model
from toolkit.models.quantised_linear import quantised_layer_bytes
from toolkit.runtime.errors import CheckpointError, UsageError

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
]


def phases(first: dict[str, Any] | str, *last: Any) -> list[str]:
    """Flags of a schedule of two phases."""
    return ["--mask.schedule", json.dumps({"train": [first], "until_step": 8}), *mask(*last)]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("order", ["shrinks", "grows"])
def test_a_block_keeps_its_codes_in_all_phases(order: str, cache: str, tiny_model: Path, tmp_path: Path) -> None:
    """Also where it is below the frost line, and the cache knows it from the block as it was."""
    whole, losses = dequantised(tiny_model, tmp_path / "model", "nf4"), []
    common = ["--train.max_steps", 16, "--prefix.cache", cache, "--prefix.cache_dir", tmp_path / "cache"]
    for precision, model in (("model", tiny_model), ("nf4", tiny_model), ("model", whole)):
        many, few = entry(precision), {"lora": {**entry(precision)["lora"], "select": "last:1"}}
        masks = phases(many, few) if order == "shrinks" else phases(few, many)
        run = tmp_path / f"run-{len(losses)}"
        assert train(*tiny_flags(model, run, *common, *masks)) == 0
        losses.append(metrics(run))
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)
    assert losses[1] != losses[0]


def test_what_a_phase_trains_whole_is_never_quantised(tiny_model: Path, tmp_path: Path) -> None:
    flags = phases("blocks:5/mlp", entry("nf4", select="last:2"))
    trainer = set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", *flags)))
    quantised = trainer.state.mask.quantised[0].modules
    assert {module.split(".")[3] for module in quantised if ".5." in module} == {"self_attn"}
    assert sum(".4." in module for module in quantised) == 7
    assert all(plan.mask.quantised == trainer.state.mask.quantised for plan in trainer.state.plans)
    assert trainer.state.plans[0].memory.most["prefix weights"] > 0
    assert quantised_layer_bytes(trainer.state.prefix.model) > 0, "block 4, below the frost line of this phase"
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *flags)) == 0
    ours = logits(open_model(str(tmp_path / "run")).loaded.model)
    export(tmp_path / "run", tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), ours, atol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_only_with_the_same_precision(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--train.epochs", 2, "--output.save_every_steps", 7, "--output.keep", 9]
    flags = tiny_flags(tiny_model, tmp_path / "run", *flags)
    assert train(*flags, *mask(entry("nf4"), "head")) == 0
    before, expected = metrics(tmp_path / "run"), masters_of(checkpoint_of(tmp_path / "run"))
    back_to(tmp_path / "run", 7)
    for other in ("model", "int8"):
        with pytest.raises(CheckpointError, match=r"mask\.train was .*'base_precision': 'nf4'"):
            train(*flags, *mask(entry(other), "head"), "--resume-override")
    assert train(*flags, *mask(entry("nf4"), "head")) == 0
    assert metrics(tmp_path / "run") == before
    again = masters_of(checkpoint_of(tmp_path / "run"))
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_from_before_the_key_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--train.epochs", 2, "--output.save_every_steps", 7, "--output.keep", 9, *mask(entry("model"))]
    flags = tiny_flags(tiny_model, tmp_path / "run", *flags)
    assert train(*flags) == 0
    before = metrics(tmp_path / "run")
    back_to(tmp_path / "run", 7)
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-*/state.json")
    values = json.loads(state.read_text())
    del values["recipe"]["mask"]["train"][0]["lora"]["base_precision"]
    state.write_text(json.dumps(values))
    reseal(state.parent)
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == before


def test_bitsandbytes_loads_the_base_that_the_card_of_the_adapter_names(tmp_path: Path) -> None:
    """As the card has it; on the plain base the adapters compute something else."""
    model = tmp_path / "model"
    llama, tokenizer = smooth_llama(), make_tokenizer()
    llama.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    llama.save_pretrained(model)
    tokenizer.save_pretrained(model)
    added = [*ADD, "--mask.tied", "both", *mask(rows("embeddings", "head"), entry("nf4"))]
    assert train(*tiny_flags(model, tmp_path / "run", "--train.epochs", 2, *added)) == 0
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    opened = open_model(str(tmp_path / "run")).loaded.model
    ours = logits(opened)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    code = card.split("```python\n")[1].split("```")[0].replace("this directory", str(tmp_path / "adapter"))
    assert "'model.layers.8.self_attn.q_proj'" in code
    names: dict[str, Any] = {}
    exec(code, names)
    layer = names["base"].get_submodule("model.layers.10.mlp.up_proj").base_layer
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(weight, opened.get_submodule("model.layers.10.mlp.up_proj.base_layer").weight)
    with torch.no_grad():  # in evaluation its kernel for CPUs rounds scales to bfloat16
        loaded = names["model"].train()(IDS).logits
    assert float((loaded - ours).abs().max()) / float(ours.abs().max()) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(model)
    base.resize_token_embeddings(len(tokenizer) + len(TOKENS))
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert float((logits(plain) - ours).abs().max()) / float(ours.abs().max()) > 1e-3
    assert isinstance(names["config"], BitsAndBytesConfig)
    kept = names["config"].llm_int8_skip_modules
    linear = [
        name.removesuffix(".base_layer") for name, layer in opened.named_modules() if hasattr(layer, "in_features")
    ]
    layers = [name for name in linear if ".layers." in name and ".lora_" not in name]
    for rule in (re.match, re.search):  # of transformers 5.14, and of 4: a part of the name
        assert {name for name in layers if not any(rule(key, name) for key in kept)} == {
            name for name in layers if int(name.split(".")[2]) >= 9
        }


def test_pefts_directory_of_quantised_layers_is_laid_onto_the_plain_base_with_a_warning(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(*tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 2, *mask(entry("nf4")))) == 0
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    with caplog.at_level("WARNING", "frostline"):
        load_base(ModelConfig(name_or_path=str(tiny_model), dtype="float32", delta=str(tmp_path / "adapter")))
    assert "trained on layers in nf4" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "frostline"):
        load_base(ModelConfig(name_or_path=str(tiny_model), dtype="float32", delta=str(tmp_path / "run")))
    assert not caplog.text


def test_the_card_of_an_int8_adapter_names_the_merged_export(tiny_model: Path, tmp_path: Path) -> None:
    assert train(*tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 2, *mask(entry("int8")))) == 0
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "LLM.int8()" in card
    assert "Export the run as a whole model" in card
    assert train(*tiny_flags(tiny_model, tmp_path / "plain", "--train.max_steps", 2, *mask(entry("model")))) == 0
    export(tmp_path / "plain", tmp_path / "plain-adapter", adapter=True)
    assert not (tmp_path / "plain-adapter" / "README.md").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("fp4")], r"base_precision is 'fp4'; expected 'model', 'int8' or 'nf4'"),
        ([{"qlora": {"select": "last:2"}}], "expected {lora: {select: …, base_precision: nf4}}"),
        ([{"lora": {"select": "last:2", "quant_type": "nf4"}}], r"did you mean mask\.train\.0\.lora\.base_precision"),
        (
            [entry("nf4", select="last:2/attention"), entry("model", select="last:2/mlp")],
            "give block 4 base_precision nf4 and model",
        ),
    ],
)
def test_a_wrong_precision_is_one_clear_error(
    entries: list[Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", *mask(*entries))))


def test_phases_that_disagree_and_blocks_with_little_to_quantise_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    def message(model: Path, *flags: str) -> str:
        said = run_here("plan.py", *tiny_flags(model, tmp_path / "run", *flags))
        assert said.returncode == 2
        return said.stderr

    assert "give block 3 base_precision int8 and nf4" in message(tiny_model, *phases(entry("int8"), entry("nf4")))
    said = message(tiny_model, *phases("last:1", entry("nf4", select="last:1")))
    assert "base_precision: nf4 can quantise 0 of the" in said
    save_of_zoo("mixtral", tmp_path / "mixtral")
    said = message(tmp_path / "mixtral", *mask({"lora": {"select": "last:2", "base_precision": "nf4"}}))
    assert "the rest is in experts.gate_up_proj" in said
    assert "no stacked experts" in said


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "precision"), [(1, "int8"), (2, "nf4"), (3, "nf4")])
def test_two_ranks_learn_what_one_process_learns_and_one_process_goes_on(
    stage: int, precision: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Against one process on the dequantised model; ZeRO leaves the codes as they are."""
    whole = dequantised(tiny_model, tmp_path / "model", precision)
    common = ["--data.path", ENGLISH, "--train.epochs", 2, "--output.save_every_steps", 10, "--output.keep", 9]
    kind = {"dora": stage == 3, "rslora": stage == 1}
    alone = ["--train.gradient_accumulation_steps", 2, *common]
    assert train(*tiny_flags(whole, tmp_path / "one", *alone, *mask(entry("model", **kind), "head"))) == 0
    flags = [*common, *mask(entry(precision, **kind), "head")]
    zero = tiny_flags(tiny_model, tmp_path / "two", "--ds", f"ds_configs/zero{stage}.json", *flags)
    result = run_ranks("launch/train.py", *zero)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_learned_alike(tmp_path / "two", tmp_path / "one")
    back_to(tmp_path / "two", 10)
    resumed = tiny_flags(tiny_model, tmp_path / "two", *alone, *mask(entry(precision, **kind), "head"))
    assert train(*resumed, "--resume-override") == 0
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-5)


@pytest.mark.distributed
def test_zero_3_hands_adapters_over_to_the_next_phase(tmp_path: Path) -> None:
    """With layers that have biases, which ZeRO-3 partitions, beside codes, which it leaves."""
    save_of_zoo("qwen2", tmp_path / "qwen2")
    common = ["--data.path", ENGLISH, "--train.max_steps", 16]
    common += phases(entry("nf4", select="last:2"), entry("nf4", select="last:1"))
    alone = ["--train.gradient_accumulation_steps", 2, *common]
    assert train(*tiny_flags(tmp_path / "qwen2", tmp_path / "one", *alone)) == 0
    flags = tiny_flags(tmp_path / "qwen2", tmp_path / "two", "--ds", "ds_configs/zero3.json", *common)
    result = run_ranks("launch/train.py", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-5)
