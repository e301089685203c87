"""Whole runs with a base in 8 or 4 bits: they learn what runs on the dequantised model learn, in fewer bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import checkpoint_of, logits, mask
from helpers import invocation, masters_of, metrics, run_here, run_script, set_up, tiny_flags, train
from test_frozen_weights import live
from transformers import AutoModelForCausalLM

from toolkit.commands.export import export
from toolkit.inference.open_model import open_model
from toolkit.mask.adapters import is_adapter_tensor
from toolkit.models.quantised_linear import dequantise_layers, quantise_layer, quantised_layer_bytes

PRECISIONS: Any = ("int8", "nf4")
BLOCKS = (3, 4, 5)


def entry(precision: str, **more: Any) -> dict[str, Any]:
    """Adapters in the last three of six blocks."""
    return {"lora": {"select": "last:3", "rank": 4, "alpha": 12, "base_precision": precision, **more}}


def dequantised(model: Path, directory: Path, precision: Any, dtype: Any = torch.float32, blocks: Any = BLOCKS) -> Path:
    """The model with the linear weights of some blocks replaced by what their codes stand for."""
    shutil.copytree(model, directory)
    changed = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    for name, layer in changed.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(tuple(f"model.layers.{b}." for b in blocks)):
            quantise_layer(layer, precision)
    dequantise_layers(changed)
    changed.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def base(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A precision, and the model as its codes have it."""
    return request.param, dequantised(tiny_model, tmp_path_factory.mktemp("base") / "model", request.param)


OPTIONS = {
    "cached": ["--prefix.cache", "on"],
    "not cached, checkpointed": ["--prefix.cache", "off", "--train.gradient_checkpointing", "on"],
    "packed": ["--train.micro_batch_size", 2, "--data.packing", "on", "--train.gradient_checkpointing", "on"],
    "padded and accumulated": [
        "--train.micro_batch_size", 2, "--data.packing", "off", "--train.gradient_accumulation_steps", 2,
    ],
    "8-bit moments": ["--optim.name", "adamw_8bit"],
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [pytest.param(name, marks=[] if name == "cached" else pytest.mark.slow) for name in OPTIONS]
)
def test_a_run_learns_step_by_step_what_a_run_on_the_dequantised_model_learns(
    options: str, base: tuple[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    precision, whole = base
    more = ["--train.epochs", 2, *OPTIONS[options]]
    quantised = entry(precision, dora=options == "cached", rslora=options == "packed")
    plain = entry("model", dora=options == "cached", rslora=options == "packed")
    assert train(*tiny_flags(tiny_model, tmp_path / "codes", *more, *mask(quantised, "head"))) == 0
    assert train(*tiny_flags(whole, tmp_path / "whole", *more, *mask(plain, "head"))) == 0
    assert metrics(tmp_path / "codes") == pytest.approx(metrics(tmp_path / "whole"), abs=1e-5)
    expected = masters_of(checkpoint_of(tmp_path / "whole"))
    found = masters_of(checkpoint_of(tmp_path / "codes"))
    assert {name for name in found if not is_adapter_tensor(name)} == {"lm_head.weight"}
    assert all(torch.allclose(found[name], expected[name], atol=2e-5) for name in expected)
    if options == "cached":
        assert train(*tiny_flags(tiny_model, tmp_path / "other", *more, *mask(plain, "head"))) == 0
        assert metrics(tmp_path / "other") != metrics(tmp_path / "codes")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_the_float_weights_are_gone_and_the_plan_counts_what_is_held(
    precision: str, dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    def ready(base_precision: str) -> Any:
        flags = tiny_flags(tiny_model, tmp_path / "run", "--prefix.cache", "off", "--model.dtype", dtype)
        return set_up(invocation(*flags, *mask(entry(base_precision))))

    ready(precision)  # what the first set-up leaves behind for good
    before = live()
    plain = ready("model")
    whole = live() - before
    blocks = plain.state.suffix.blocks(3)
    floats = sum(p.nbytes for block in blocks for name, p in block.named_parameters() if "base_layer" in name)
    planned = plain.plan.memory.most["suffix weights"]
    del plain, blocks
    assert live() == before
    trainer = ready(precision)
    held = quantised_layer_bytes(trainer.state.suffix)
    assert held < {"int8": 0.6, "nf4": 0.31}[precision] * floats * (1 if dtype == "bfloat16" else 0.5)
    assert whole - (live() - before) == pytest.approx(floats - held, abs=4096), "but for the values of nf4's codes"
    assert planned - trainer.plan.memory.most["suffix weights"] == floats - held
    assert trainer.plan.quantised == held


def test_the_plan_the_audit_and_the_comparison_say_the_precision(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", *mask(entry("nf4", targets=["q_proj"])))
    said = run_here("plan.py", *flags).stdout
    assert "(256 in adapters, 9,216 held in nf4 each)" in said
    assert "21 frozen linear layers of adapted blocks held in nf4" in said
    values = json.loads(run_here("plan.py", *flags, "--json").stdout)
    assert values["quantised"]["layers"] == {"nf4": 21}
    assert "quantised" not in json.loads(run_here("plan.py", *flags[:-1], "last:1", "--json").stdout)
    rows = json.loads(run_here("plan.py", *flags, "--json", "--compare", "lora last:3", "qlora last:3").stdout)
    assert rows[1]["memory"] < rows[0]["memory"]
    assert rows[1]["trained"] == rows[0]["trained"]


@pytest.fixture(scope="module", params=[pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def run(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 run with validation, some of whose quantised layers have no adapter."""
    folder = tmp_path_factory.mktemp("quantised") / request.param
    more = ["--model.dtype", "bfloat16", "--train.epochs", 2, "--data.validation", 0.3, "--train.learning_rate", "1e-2"]
    targets = ["q_proj", "v_proj", "down_proj"]
    assert train(*tiny_flags(tiny_model, folder, *more, *mask(entry(request.param, targets=targets)))) == 0
    return folder


def test_the_commands_after_a_run_compute_what_was_validated(run: Path, tmp_path: Path) -> None:
    said = json.loads(run_here("evaluate.py", run).stdout.splitlines()[-1])
    assert said["loss"] == pytest.approx(metrics(run, "eval_loss")[-1], abs=1e-3)
    assert run_here("generate.py", run, "--question", "Is it?", "--context", "Yes.", "--max-new-tokens", 3).stdout
    opened = open_model(str(run)).loaded.model
    export(run, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    exact = logits(open_model(str(run), dtype="float32").loaded.model)
    assert float((logits(merged) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    weight = "model.layers.4.mlp.up_proj"
    assert torch.equal(merged.get_parameter(f"{weight}.weight"), opened.get_submodule(weight).weight.float())
    card = " ".join((tmp_path / "merged" / "README.md").read_text().split())
    assert (
        f"were held in fewer bits (21 in {run.name}, by bitsandbytes). Their weights here are the dequantised" in card
    )
    assert f"held in {run.name}" in card.split("Frost line:")[0]


def test_a_run_begins_from_the_merged_dequantised_model(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    """From the run, from its delta and from its export alike."""
    export(run, tmp_path / "delta", delta=True)
    export(run, tmp_path / "merged")
    losses = []
    for name, source, delta in (
        ("run", tiny_model, run), ("delta", tiny_model, tmp_path / "delta"), ("merged", tmp_path / "merged", None),
    ):  # fmt: skip
        more = ["--model.dtype", "bfloat16", "--train.epochs", 1, *(["--model.delta", delta] if delta else [])]
        assert train(*tiny_flags(source, tmp_path / f"from-{name}", *more, *mask("last:1"))) == 0
        losses.append(metrics(tmp_path / f"from-{name}"))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_a_plan_of_adapters_prints_nothing_of_other_libraries(tiny_model: Path, tmp_path: Path) -> None:
    done = run_script("launch/plan.py", *tiny_flags(tiny_model, tmp_path / "run"), "--compare", "qlora last:2")
    others = [line for line in done.stderr.splitlines() if not line.startswith("[frostline] ")]
    assert (done.returncode, others) == (0, [])
