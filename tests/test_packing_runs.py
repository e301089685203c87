"""Packed runs: the same step losses in one process and on two ranks, in evaluation, and a plan that follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import ENGLISH, ROOT, invocation, metrics, run_ranks, set_up, tiny_flags, tiny_llama, train
from test_packing import ROWS, choose
from test_plan_reality import _LiveBytes

from toolkit.config.schema import DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig
from toolkit.data.batches import pack
from toolkit.data.dataset import load_dataset
from toolkit.inference.evaluation import evaluate_rows
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.load import load
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.meta_model import meta_model
from toolkit.planning.planner import Planner
from toolkit.planning.table import as_dict, as_text
from toolkit.planning.workload import Workload
from toolkit.runtime.distributed import World
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.suffix import split
from toolkit.split.supervised_loss import supervised_loss


def test_evaluation_gives_the_same_loss_packed() -> None:
    model = tiny_llama().eval()
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert choose("auto", prefix, suffix).on
    losses = [evaluate_rows(suffix, prefix, ROWS, 3, 0, World(), packed).loss for packed in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_twenty_steps_have_the_same_losses_packed(tiny_model: Path, tmp_path: Path) -> None:
    results = {}
    for mode in ("auto", "off"):
        run = tmp_path / mode
        flags = tiny_flags(tiny_model, run, "--train.micro_batch_size", 3, "--train.max_steps", 20)
        more = ["--data.validation", "0.2", "--data.packing", mode, "--train.epochs", "4"]
        assert train(*flags, *more) == 0
        results[mode] = run
        assert json.loads((run / "plan.json").read_text())["micro_batch"]["packed"] is (mode == "auto")
    packed, padded = metrics(results["auto"]), metrics(results["off"])
    assert len(packed) == 20
    assert packed == pytest.approx(padded, abs=1e-5)
    assert metrics(results["auto"], "tokens") == metrics(results["off"], "tokens")
    assert metrics(results["auto"], "eval_loss") == pytest.approx(metrics(results["off"], "eval_loss"), abs=1e-5)


def test_the_trial_of_packing_counts_as_no_use_of_the_cache(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--train.micro_batch_size", 3, "--train.epochs", 4, "--prefix.cache", "on"]
    trainer = set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", *flags)))
    assert trainer.state.packing.on
    statistics = trainer.state.prefix.store.statistics
    assert (statistics.hits, statistics.misses) == (1, 0)  # the row that the short cuts are tried on


@pytest.mark.distributed
def test_two_ranks_under_zero_have_the_same_losses_packed(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.micro_batch_size", 2, "--train.max_steps", 20)
    more = ["--train.epochs", 5, "--train.gradient_checkpointing", "on", "--ds", ROOT / "ds_configs" / "zero2.json"]
    result = run_ranks("tests/packing_worker.py", output, *flags, *more)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    found = json.loads(output.read_text())
    assert (found["auto"]["engine"], found["auto"]["packed"], found["off"]["packed"]) == ("zero-2", True, False)
    assert len(found["auto"]["losses"]) == 20
    assert found["auto"]["losses"] == pytest.approx(found["off"]["losses"], abs=1e-5)
    assert found["auto"]["computed"] == found["auto"]["tokens"] < found["off"]["computed"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plans_peak_is_that_of_all_storages_alive(tiny_model: Path, checkpointing: bool) -> None:
    data = DataConfig(path=str(ENGLISH))
    config = RunConfig(
        model=ModelConfig(name_or_path=str(tiny_model), dtype="float32"),
        mask=MaskConfig(train=["last:2", "head"], tied="untie"),
        data=data,
        train=TrainConfig(micro_batch_size=3),
    )
    loaded = load(config.model)
    examples = load_dataset(data, loaded.tokenizer, 0).train
    longest = sorted(examples, key=lambda example: -len(example.token_ids))[:3]
    batch = pack(longest)
    assert batch.is_packed
    lengths = tuple((len(example.token_ids), batch.supervised_tokens // 3) for example in longest)
    planner = Planner(config, meta_model(config.model), Workload(*lengths[0], lengths, "a test"))
    planned = planner._trace(planner.variant(engine_spec(None, 1, 1), checkpointing)).peak()
    mask = build_mask(config.mask, loaded.anatomy)
    apply_mask(loaded.model, mask, loaded.anatomy)
    prefix, suffix = split(loaded.model.train(), loaded.anatomy, mask.boundary)
    assert prefix is not None
    assert choose("auto", prefix, suffix, 3, longest).on
    suffix.choose_shortcuts(prefix(batch), batch)
    if checkpointing:
        checkpoint_blocks(suffix.blocks(mask.boundary))
    parts = (loaded.model, prefix, suffix)
    with _LiveBytes([tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]) as live:
        hidden = prefix(batch)
        loss = supervised_loss(suffix, hidden, batch, batch.supervised_tokens)
        loss.backward()
    assert sum(planned.values()) == pytest.approx(live.most, rel=0.02)


def test_the_plan_counts_packed_rows_without_padding(tiny_model: Path) -> None:
    lengths = ((60, 9), (20, 5), (35, 7), (10, 3))
    load = Workload(60, 9, lengths, "a test")
    plans = {}
    for mode in ("auto", "off"):
        config = RunConfig.model_validate(
            {
                "model": ModelConfig(name_or_path=str(tiny_model), dtype="float32"),
                "mask": MaskConfig(train=["last:2"]),
                "train": TrainConfig(micro_batch_size=3),
                "data": {"packing": mode},
            }
        )
        planner = Planner(config, meta_model(config.model), load)
        plans[mode] = planner.plan(planner.variant(engine_spec(None, 1, 1), checkpointing=False))
    packed, padded = plans["auto"], plans["off"]
    assert "micro batch of 3 rows packed into one of 115 tokens" in as_text(packed)
    assert [as_dict(plan)["micro_batch"]["packed"] for plan in (packed, padded)] == [True, False]
    assert packed.flops.of(lengths) == pytest.approx(padded.flops.of(lengths), rel=1e-6)
    share = packed.memory.most["activations"] / padded.memory.most["activations"]
    assert share == pytest.approx(115 / 180, rel=0.1)
