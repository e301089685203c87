from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from toolkit.config.schema import RunConfig, TrainConfig
from toolkit.engine.deepspeed.clipping import without_norm_and_clipping
from toolkit.engine.deepspeed.config import resolve_ds_config, with_fitting_bucket
from toolkit.engine.deepspeed.json_file import read_ds_config, zero_stage
from toolkit.planning.engine_memory import engine_memory
from toolkit.planning.engine_spec import engine_spec, zero_spec
from toolkit.planning.prefix_memory import PrefixMemory
from toolkit.planning.tensor_sizes import TensorSizes
from toolkit.runtime.errors import ConfigError

CONFIG = RunConfig(train=TrainConfig(micro_batch_size=2, gradient_accumulation_steps=3, max_grad_norm=0.5))


def resolve(ds_config: dict[str, Any], config: RunConfig = CONFIG) -> dict[str, Any]:
    return resolve_ds_config(ds_config, config, ranks=4, hidden_size=100, path=Path("x.json"))


def faults_of(ds_config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve(ds_config)
    return error.value.faults


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json")))
def test_shipped_files_are_auto_and_filled_from_the_recipe(name: str) -> None:
    ds_config = read_ds_config(ROOT / "ds_configs" / f"{name}.json")
    assert zero_stage(ds_config) == int(name[4])
    resolved = resolve(ds_config)
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 3
    assert resolved["train_batch_size"] == 24
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] is True
    is_away = "offload" in name or "nvme" in name
    assert resolved["zero_optimization"]["reduce_bucket_size"] == (10_000 if is_away else 50_000_000)
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["zero_force_ds_cpu_optimizer"] is False
    assert '"auto"' not in json.dumps(resolved)
    assert '"auto"' in json.dumps(ds_config), "the file's own content is left unchanged"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json")))
def test_shipped_files_overlap_where_deepspeed_keeps_gradients_until_they_are_read(name: str) -> None:
    """Its ZeRO-2 frees those of a tensor larger than a bucket while its second stream may read them (0.19.8)."""
    zero = read_ds_config(ROOT / "ds_configs" / f"{name}.json")["zero_optimization"]
    assert zero["overlap_comm"] is (zero["stage"] != 2)
    spec = engine_spec(resolve({"zero_optimization": zero}), 2, 1)
    shipped = zero_spec(zero["stage"], 2, False, 100, "adamw", "offload_optimizer" in zero)
    assert (spec.bucket, spec.buckets) == (shipped.bucket, shipped.buckets)


def test_a_bucket_is_no_larger_than_what_trains() -> None:
    resolved = resolve(read_ds_config(ROOT / "ds_configs" / "zero2.json"))
    for elements, bucket in ((1000, 1000), (10**9, 50_000_000)):
        fitting = with_fitting_bucket(resolved, elements)
        assert fitting["zero_optimization"] == {**resolved["zero_optimization"], "reduce_bucket_size": bucket}
    assert with_fitting_bucket({"zero_optimization": {"stage": 1}}, 7)["zero_optimization"]["reduce_bucket_size"] == 7


@pytest.mark.parametrize(
    ("in_file", "asked", "found"),
    [
        (None, None, None), ("auto", None, None), ("fp32", None, "fp32"), (None, "bfloat16", "bf16"),
        ("auto", "float32", "fp32"), ("BF16", "bfloat16", "bf16"),
    ],
)  # fmt: skip
def test_sums_over_ranks_have_the_precision_of_the_recipe_or_else_of_the_file(
    in_file: str | None, asked: Any, found: str | None
) -> None:
    ds_config = {} if in_file is None else {"communication_data_type": in_file}
    assert resolve(ds_config, RunConfig(train=TrainConfig(reduce_dtype=asked))).get("communication_data_type") == found


def test_a_file_that_sums_in_another_precision_than_the_recipe_is_refused() -> None:
    config = RunConfig(train=TrainConfig(reduce_dtype="float32"))
    with pytest.raises(ConfigError, match=r"communication_data_type is 'bf16', the recipe's train\.reduce_dtype makes"):
        resolve({"communication_data_type": "bf16"}, config)


@pytest.mark.parametrize("value", ["float32", 32, ""])
def test_a_precision_that_deepspeed_does_not_know_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"communication_data_type is .*; DeepSpeed sums gradients in 'fp32', 'bf16'"):
        resolve({"communication_data_type": value})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_plan_counts_sums_in_float32_of_a_bfloat16_model(stage: int) -> None:
    tensors = TensorSizes(shared=0, trained=(1000, 200), frozen=(), width=2)
    buffers = []
    for asked in (None, "bfloat16", "float32"):
        config = RunConfig(train=TrainConfig(reduce_dtype=asked), model={"dtype": "bfloat16"})  # type: ignore[arg-type]
        spec = engine_spec(resolve({"zero_optimization": {"stage": stage}}, config), 2, 1)
        buffers.append(engine_memory(spec, tensors, PrefixMemory(0, 0, 0)).buffers)
    more = {3: 2}.get(stage, 4)  # ZeRO-3 has its buckets in that precision, the others sum a copy
    assert [own - buffers[0] for own in buffers] == [0, 0, 1200 * more]


def test_auto_buckets_follow_from_the_hidden_size() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    resolved = resolve({"zero_optimization": zero})["zero_optimization"]
    assert (resolved["reduce_bucket_size"], resolved["stage3_prefetch_bucket_size"]) == (10_000, 9_000)


def test_offload_to_files_needs_stage_3_and_a_folder() -> None:
    section = {"device": "nvme", "nvme_path": 7}
    (stage, folder) = faults_of({"zero_optimization": {"stage": 2, "offload_optimizer": section}})
    assert stage == "zero_optimization.offload_optimizer.device is 'nvme' under stage 2; it needs stage 3"
    assert folder.startswith("zero_optimization.offload_optimizer.nvme_path is 7; expected a folder on the drive, or")


def test_deepspeeds_throughput_timer_is_off_unless_the_file_asks_for_it() -> None:
    assert resolve({})["timers"] == {"throughput": {"enabled": False}}
    asked = {"throughput": {"enabled": True, "synchronized": False}}
    assert resolve({"timers": asked})["timers"] == asked


def test_float32_turns_bf16_off() -> None:
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"dtype": "float32"})})
    assert resolve({"bf16": {"enabled": "auto"}}, config)["bf16"]["enabled"] is False


def test_all_contradictions_are_listed_together() -> None:
    faults = faults_of(
        {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 1.0,
            "fp16": {"enabled": True},
            "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "momentum": 0.9, "eps": "auto"}},
            "scheduler": {"type": "OneCycle"},
            "zero_optimization": {"stage": 2, "sub_group_size": "auto"},
        }
    )
    assert len(faults) == 8
    text = "\n".join(faults)
    assert "train_micro_batch_size_per_gpu is 8, the recipe's train.micro_batch_size makes it 2" in text
    assert "gradient_clipping is 1.0, the recipe's train.max_grad_norm makes it 0.5" in text
    assert "fp16.enabled is True" in text
    assert "optimizer.type is 'Lamb'" in text
    assert "optimizer.params.lr is 0.001, the recipe makes it 1e-05" in text
    assert "optimizer.params.momentum is 0.9; the recipe has no such setting" in text
    assert "scheduler.type is 'OneCycle'" in text
    assert 'zero_optimization.sub_group_size is "auto", but nothing in the recipe fills it' in text


def test_blocks_that_agree_are_dropped_because_the_recipe_builds_them() -> None:
    resolved = resolve(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": "auto"}},
            "scheduler": {"type": "WarmupDecayLR", "params": "auto"},
        }
    )
    assert "optimizer" not in resolved
    assert "scheduler" not in resolved
    assert "optimizer" not in resolve({"optimizer": {"type": "AdamW", "params": "auto"}})


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; expected 0, 1, 2 or 3"),
        ({"zero_optimization": 2}, "zero_optimization is 2; expected an object"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "would take the float32 masters away"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, "optimizer.params is 3; expected an object"),
        ({"bf16": {"check_grad_overflow": False}}, "a NaN would reach the weights; remove it"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "nobody would know whether the gradient is finite"),
    ],
)
def test_values_that_cannot_be_meant(ds_config: dict[str, Any], message: str) -> None:
    assert message in "\n".join(faults_of(ds_config))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"zero_optimisation": {}}',
            "zero_optimisation: not a key that can be used here (did you mean zero_optimization?)",
        ),
        ('{"dataloader_drop_last": true, "x": 1}', "2 faults"),
        ("[]", "holds a list; expected an object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_that_deepspeed_would_misread_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_ds_config(tmp_path / "ds.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("file", "accumulation", "is_ours"),
    [
        ("zero1", 1, True),
        ("zero1", 2, False),
        ("zero2", 1, True),
        ("zero2", 2, True),
        ("zero2_offload", 1, False),
        ("zero3", 1, False),
    ],
)
def test_deepspeed_leaves_clipping_to_us_wherever_it_can(file: str, accumulation: int, is_ours: bool) -> None:
    config = RunConfig(train=TrainConfig(gradient_accumulation_steps=accumulation, max_grad_norm=0.5))
    ds_config = resolve(read_ds_config(ROOT / "ds_configs" / f"{file}.json"), config)
    lean = without_norm_and_clipping(ds_config)
    assert ds_config["gradient_clipping"] == 0.5
    assert (lean is not None) is is_ours
    if lean is not None:
        assert lean["gradient_clipping"] == 0
        assert lean["zero_optimization"]["compute_grad_norm"] is lean["bf16"]["check_grad_overflow"] is False


def test_deepspeed_clips_where_the_old_key_for_offload_is_written() -> None:
    ds = resolve({"zero_optimization": {"stage": 2, "cpu_offload": True}}, RunConfig())
    assert without_norm_and_clipping(ds) is None


@pytest.mark.slow
def test_an_engine_starts_without_the_compiler_that_deepspeed_imports_for_muon() -> None:
    code = (
        "import os, sys\n"
        "from toolkit.engine.deepspeed.muon import import_muon_uncompiled\n"
        "import_muon_uncompiled()\n"
        "import deepspeed.runtime.zero.utils\n"
        "has_muon = 'deepspeed.runtime.zero.muon.original_muon' in sys.modules\n"
        "print(has_muon, 'torch._inductor.compile_fx' in sys.modules, os.environ.get('TORCHDYNAMO_DISABLE'))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "True False None"
