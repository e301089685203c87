"""Whole runs with adapters: what is kept, resumed, exported to transformers and peft, and begun from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import assert_learned_alike, back_to, checkpoint_of, logits, mask, save_of_zoo
from helpers import (
    ENGLISH,
    invocation,
    make_tiny_model,
    masters_of,
    metrics,
    run_here,
    run_ranks,
    set_up,
    tiny_flags,
    train,
)
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from toolkit.commands.export import export
from toolkit.inference.open_model import open_model
from toolkit.mask.adapters import is_adapter_tensor
from toolkit.runtime.errors import CheckpointError, UsageError

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]

ENTRY = {"lora": {"select": "last:3", "rank": 4, "alpha": 12, "dropout": 0.2}}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters with dropout and a whole head on a tied model."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    assert train(*tiny_flags(tiny_model, folder, "--train.epochs", 2, *mask(ENTRY, "head"))) == 0
    return folder


def test_the_optimizer_and_the_checkpoint_hold_the_adapters_and_the_head_alone(run: Path, tiny_model: Path) -> None:
    masters = masters_of(checkpoint_of(run))
    assert {name for name in masters if not is_adapter_tensor(name)} == {"lm_head.weight"}
    adapters = {name: tensor for name, tensor in masters.items() if name != "lm_head.weight"}
    assert len(adapters) == 3 * 7 * 2
    assert {len(tensor) for name, tensor in adapters.items() if "lora_A" in name} == {4}
    trained = sum(tensor.numel() for tensor in masters.values())
    shards = list((checkpoint_of(run) / "optimizer").glob("*.safetensors"))
    assert len(shards) == 1
    stored = 0
    with safe_open(shards[0], "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no iterator)
    assert stored == 3 * trained, "masters and two moments of what trains"
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    after = open_model(str(run)).loaded.model.state_dict()
    frozen = {name.replace("base_layer.", ""): tensor for name, tensor in after.items() if ".lora_" not in name}
    assert set(frozen) == set(before)
    assert [name for name in before if not torch.equal(frozen[name], before[name])] == ["lm_head.weight"]


def test_dropout_above_the_frost_line_leaves_the_cache_exact(tiny_model: Path, tmp_path: Path) -> None:
    """The same drops with and without the cache: the prefix draws nothing."""
    losses = {}
    for cache in ("on", "off"):
        flags = tiny_flags(tiny_model, tmp_path / cache, "--train.epochs", 2, "--prefix.cache", cache, *mask(ENTRY))
        assert train(*flags) == 0
        losses[cache] = metrics(tmp_path / cache)
    assert losses["on"] == losses["off"]
    other = tiny_flags(tiny_model, tmp_path / "seed", "--train.epochs", 2, "--train.seed", 7, *mask(ENTRY))
    assert train(*other) == 0
    starts = [masters_of(checkpoint_of(tmp_path / name)) for name in ("on", "seed")]
    assert not any(torch.equal(starts[0][name], starts[1][name]) for name in starts[0] if "lora_A" in name)


def test_a_run_goes_on_exactly_after_a_stop(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--train.epochs", 2, "--output.save_every_steps", 7, "--output.keep", 9, *mask(ENTRY, "head")]
    flags = tiny_flags(tiny_model, tmp_path / "run", *flags)
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == metrics(run)
    back_to(tmp_path / "run", 7)
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == metrics(run)
    again, expected = masters_of(checkpoint_of(tmp_path / "run")), masters_of(checkpoint_of(run))
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_the_export_is_the_model_merged_and_peft_loads_the_adapters(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    ours = logits(open_model(str(run)).loaded.model)
    assert run_here("export.py", run, "--output", tmp_path / "merged").returncode == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not any("lora" in name for name in merged.state_dict())
    assert float((logits(merged) - ours).abs().max()) < 1e-4 * float(ours.abs().max())
    assert not merged.config.tie_word_embeddings
    export(run, tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    untrained = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert torch.equal(loaded, ours)
    assert float((loaded - untrained).abs().max()) > 1e-2


def test_rounding_to_bfloat16_happens_once(run: Path, tmp_path: Path) -> None:
    """Each merged weight is the float32 sum of base and update, rounded; or at random one of its two neighbours."""
    exact = {}
    for name, rounding in (("float32", "nearest"), ("bfloat16", "nearest"), ("up-or-down", "stochastic")):
        dtype = "float32" if name == "float32" else "bfloat16"
        flags = ("--output", tmp_path / name, "--dtype", dtype, "--rounding", rounding)
        assert run_here("export.py", run, *flags).returncode == 0
        exact[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
    name = "model.layers.5.mlp.down_proj.weight"
    assert torch.equal(exact["float32"][name].bfloat16().float(), exact["bfloat16"][name])
    apart = (exact["up-or-down"][name] - exact["float32"][name]).abs() / exact["float32"][name].abs()
    assert 2**-9 < float(apart.max()) < 2**-7
    assert not torch.equal(exact["up-or-down"][name], exact["bfloat16"][name])


def test_a_run_begins_from_a_run_or_from_pefts_directory_alike(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "adapter", adapter=True)
    losses = []
    for name, source in (("run", run), ("peft", tmp_path / "adapter")):
        flags = tiny_flags(tiny_model, tmp_path / name, "--train.epochs", 1, "--model.delta", source, *mask("last:1"))
        assert train(*flags) == 0
        losses.append(metrics(tmp_path / name))
    assert losses[0] == losses[1]
    assert losses[0][0] < metrics(run)[0]


def test_an_adapter_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "adapter", adapter=True)
    other = make_tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 4}
    (other / "config.json").write_text(json.dumps(config))
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(other)
    with pytest.raises(CheckpointError, match="does not fit"):
        set_up(invocation(*tiny_flags(other, tmp_path / "x", "--model.delta", tmp_path / "adapter", *mask("last:1"))))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a readable peft adapter"):
        set_up(invocation(*tiny_flags(other, tmp_path / "x", "--model.delta", tmp_path / "adapter", *mask("last:1"))))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"lora": {"select": "last:2", "targets": ["q_prj"]}}], "Did you mean q_proj"),
        ([{"lora": {"select": "head"}}], "no block has a linear layer"),
        ([{"lora": {"select": ["last:2", "head"]}}], "lora.select has 'head', among which no block"),
        ([{"lora": "last:2"}], "expected keys under it, such as {select: last:8}"),
        ([{"dora": {"select": "last:2"}}], "expected {lora: {select: …, dora: true}}"),
        ([{"lora": {"select": "last:2/norms"}}], "no block has a linear layer"),
        ([{"lora": {"select": "last:2"}}, "last:1"], "whole and through an adapter"),
        ([{"lora": {"select": "last:2"}}, {"lora": {"select": "last:1"}}], "one adapter a layer"),
        ([{"lora": {"select": "last:2", "rank": 0}}], "rank is 0; expected greater than or equal to 1"),
        ([{"lora": {"select": "last:2", "lora_alpha": 3}}], r"did you mean mask\.train\.0\.lora\.alpha"),
        ([{"lora": {"rank": 2}}], r"mask\.train\.0\.lora\.select is missing"),
        ([{"lora": {"select": "last:2", "init": "pissa"}}], "expected 'kaiming' or 'gaussian'"),
    ],
)
def test_a_wrong_entry_is_one_clear_error(entries: list[Any], message: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", *mask(*entries))))


def test_what_is_frozen_gets_no_adapter(tiny_model: Path, tmp_path: Path) -> None:
    """mask.freeze takes layers away from an entry, and says so if none is left."""
    entry = {"lora": {"select": "last:2", "rank": 2}}
    flags = tiny_flags(tiny_model, tmp_path / "run", *mask(entry), "--mask.freeze", "last:2/attention", "blocks:4")
    assert {name.split(".")[3] for name in set_up(invocation(*flags)).state.mask.names} == {"mlp"}
    flags = tiny_flags(tiny_model, tmp_path / "run", *mask(entry), "--mask.freeze", "all")
    with pytest.raises(UsageError, match="takes away all 14 linear layers"):
        set_up(invocation(*flags))


def test_a_layer_that_a_phase_trains_whole_gets_an_adapter_in_the_next(tiny_model: Path, tmp_path: Path) -> None:
    """Both updates are in the checkpoint and in the export; settings of a layer may not change between phases."""
    first = json.dumps({"train": ["blocks:5/mlp"], "until_step": 3})
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 6, "--mask.schedule", first, *mask(ENTRY))
    assert train(*flags) == 0
    masters = masters_of(checkpoint_of(tmp_path / "run"))
    assert {"model.layers.5.mlp.up_proj.weight", "model.layers.5.mlp.up_proj.lora_A.default.weight"} <= set(masters)
    ours = logits(open_model(str(tmp_path / "run")).loaded.model)
    assert run_here("export.py", tmp_path / "run").returncode == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32)
    assert float((logits(merged) - ours).abs().max()) < 1e-4 * float(ours.abs().max())
    other = json.dumps({"train": [{"lora": {"select": "last:1", "rank": 8}}], "until_step": 3})
    with pytest.raises(UsageError, match="other settings in two phases"):
        set_up(invocation(*tiny_flags(tiny_model, tmp_path / "x", "--mask.schedule", other, *mask(ENTRY))))


def test_the_plan_counts_the_adapters(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", *mask({"lora": {"select": "last:3", "rank": 4}}))
    assert "(2,048 in adapters each)" in run_here("plan.py", *flags).stdout
    trainer = set_up(invocation(*flags))
    trained = sum(parameter.numel() for parameter in trainer.state.suffix.parameters() if parameter.requires_grad)
    plan = trainer.state.plan
    assert plan.mask.parameters == trained == 3 * 2048


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_learn_what_one_process_learns_and_one_process_goes_on(
    stage: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Without dropout, whose draws are each rank's own."""
    entry = {"lora": {"select": "last:3", "rank": 4, "dora": stage != 1, "rslora": stage == 1}}
    common = ["--data.path", ENGLISH, "--train.epochs", 2, *mask(entry, "head")]
    common += ["--output.save_every_steps", 10, "--output.keep", 9]
    assert train(*tiny_flags(tiny_model, tmp_path / "one", "--train.gradient_accumulation_steps", 2, *common)) == 0
    flags = tiny_flags(tiny_model, tmp_path / "two", "--ds", f"ds_configs/zero{stage}.json", *common)
    result = run_ranks("launch/train.py", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_learned_alike(tmp_path / "two", tmp_path / "one")
    back_to(tmp_path / "two", 10)
    alone = tiny_flags(tiny_model, tmp_path / "two", "--train.gradient_accumulation_steps", 2, *common)
    assert train(*alone, "--resume-override") == 0
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-5)


def test_a_layer_that_the_model_computes_past_is_refused(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of dt_proj itself; the other layers are adapted and exported."""
    save_of_zoo("mamba", tmp_path / "mamba")
    with pytest.raises(UsageError, match=r"dt_proj and 1 more layers that this model never calls.*lora\.targets"):
        set_up(invocation(*tiny_flags(tmp_path / "mamba", tmp_path / "x", *mask({"lora": {"select": "last:2"}}))))
    entry = {"lora": {"select": "last:2", "rank": 2, "targets": ["in_proj", "x_proj", "out_proj"]}}
    flags = tiny_flags(tmp_path / "mamba", tmp_path / "run", "--train.max_steps", 3, *mask(entry))
    assert train(*flags) == 0
    ours = logits(open_model(str(tmp_path / "run")).loaded.model)
    export(tmp_path / "run", tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), ours, atol=1e-4)


def test_adapters_that_peft_would_take_for_experts_are_not_exported_in_its_form(tmp_path: Path) -> None:
    save_of_zoo("deepseek_v3", tmp_path / "moe")
    entry = {"lora": {"select": "last:2", "rank": 2}}
    assert train(*tiny_flags(tmp_path / "moe", tmp_path / "run", "--train.max_steps", 2, *mask(entry))) == 0
    names = masters_of(checkpoint_of(tmp_path / "run"))
    assert any("shared_experts.gate_proj" in name for name in names)
    with pytest.raises(
        CheckpointError, match="takes some of the adapted layers of deepseek_v3 models for fused experts"
    ):
        export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    export(tmp_path / "run", tmp_path / "merged")
    ours = logits(open_model(str(tmp_path / "run")).loaded.model)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), ours, atol=1e-4)


def test_an_untrained_dora_is_the_base_whatever_the_precision(tiny_model: Path, tmp_path: Path) -> None:
    """In bfloat16 the norms are rounded in training, so they are when adapters are merged."""
    entry = {"lora": {"select": "all", "rank": 2, "dora": True}}
    flags = [*mask(entry), "--model.dtype", "bfloat16", "--train.learning_rate", "1e-12", "--train.max_steps", 1]
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *flags)) == 0
    export(tmp_path / "run", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())


def test_each_layer_draws_its_own_start_and_what_rests_drops_nothing(tiny_model: Path, tmp_path: Path) -> None:
    entries = [{"lora": {"select": f"blocks:{n}", "rank": 4}} for n in (4, 5)]
    starts = []
    for chosen in (entries, [{"lora": {"select": "blocks:4-5", "rank": 4}}]):
        trainer = set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", *mask(*chosen))))
        named = trainer.state.engine.masters().items()
        starts.append({name: tensor.clone() for name, tensor in named if "lora_A" in name})
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert len({tuple(tensor.flatten()[:3].tolist()) for tensor in starts[0].values()}) == len(starts[0])
    first = json.dumps({"train": [{"lora": {"select": "last:3", "rank": 2, "dropout": 0.4}}], "until_epoch": 1})
    flags = ["--mask.schedule", first, "--train.epochs", 3, "--prefix.cache", "on"]
    flags += mask({"lora": {"select": "last:1", "rank": 2, "dropout": 0.4}})
    assert train(*tiny_flags(tiny_model, tmp_path / "scheduled", *flags)) == 0
