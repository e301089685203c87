"""Plan and run of any architecture decide alike: cut, shortcuts, packing and cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from zoo import CUT, OTHER, UNCUT, make

from toolkit.activation_cache.packing import choose_packing
from toolkit.config.schema import MaskConfig, PrefixConfig, RunConfig, TrainConfig
from toolkit.data.batches import collate
from toolkit.data.examples import Example
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.meta_model import MetaModel
from toolkit.planning.planner import Planner
from toolkit.planning.table import as_dict, as_text
from toolkit.planning.workload import Workload
from toolkit.runtime.errors import PlanError
from toolkit.split.exactness import split_is_exact
from toolkit.split.loss_head import Shortcuts
from toolkit.split.suffix import split

LOCAL = engine_spec(None, 1, 1)
ROWS = [Example.with_answer(tuple(range(3, 3 + length)), 5) for length in (17, 11, 14)]
PACKED_ONLY_BY_THE_PLAN = {"llama4_text", "minimax", "xlm-roberta"}
"""Attention in chunks, a recurrence that transformers does not declare, and positions counted over the whole row."""
FAST = {
    *UNCUT, *PACKED_ONLY_BY_THE_PLAN, "bamba", "bloom", "ctrl", "falcon", "gemma2", "gpt2", "lfm2", "llama", "mamba",
    "mixtral", "openai-gpt", "opt", "recurrent_gemma", "stablelm", "zamba2",
}  # fmt: skip
TYPES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in (*CUT, *UNCUT, *OTHER)
    if name != "rwkv"
]


def recipe(name: str, **prefix: Any) -> RunConfig:
    train = ["blocks:1,3"] if name == "zamba2" else ["last:2"]
    mask = MaskConfig(train=train, tied="untie")  # type: ignore[arg-type]
    return RunConfig(mask=mask, train=TrainConfig(micro_batch_size=2), prefix=PrefixConfig(**prefix))


def on_meta(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)


def planner_of(model: Any, config: RunConfig) -> Planner:
    meta = on_meta(model)
    lengths = tuple((len(row.token_ids), row.supervised_tokens) for row in ROWS)
    load = Workload(17, 12, lengths, "a test", tuple(tokens for tokens, _ in lengths))
    return Planner(config, MetaModel(meta, detect_anatomy(meta), "a test"), load, passes=3)


def decided_by_run(model: Any, config: RunConfig) -> tuple[bool, Shortcuts, bool, bool]:
    anatomy = detect_anatomy(model)
    mask = build_mask(config.mask, anatomy)
    apply_mask(model, mask, anatomy)
    prefix, suffix = split(model.train(), anatomy, mask.boundary)
    row = collate([min(ROWS, key=lambda example: len(example.token_ids))], 0)
    assert prefix is not None
    is_cut = split_is_exact(model, prefix, suffix, row)
    is_cached = is_cut and torch.equal(prefix.train()(row), prefix.eval()(row))
    if not is_cut:
        prefix, suffix = split(model, anatomy, None)
    shortcuts = suffix.choose_shortcuts(prefix(row) if prefix else None, row)
    return is_cut, shortcuts, choose_packing("auto", 2, prefix, suffix, ROWS, torch.device("cpu")).on, is_cached


@pytest.mark.parametrize("name", [*CUT, *UNCUT, *OTHER])
def test_a_plan_finds_the_parts_that_the_run_finds(name: str) -> None:
    model = make(name)
    assert detect_anatomy(on_meta(model)) == detect_anatomy(model)


@pytest.mark.parametrize("name", TYPES)
def test_a_plan_decides_what_the_run_finds(name: str) -> None:
    model, config = make(name).bfloat16(), recipe(name)
    planner = planner_of(model, config)
    variant = planner.variant(LOCAL, checkpointing=False)
    part = planner._split(variant)
    planned = (part.is_cut, part.shortcuts, variant.packed, variant.cached)
    is_cut, shortcuts, is_packed, is_cached = decided_by_run(model, config)
    assert planned == (is_cut, shortcuts, is_packed or name in PACKED_ONLY_BY_THE_PLAN, is_cached)


def test_a_plan_says_what_only_a_run_can_find_out() -> None:
    planner = planner_of(make("llama4_text").bfloat16(), recipe("llama4_text"))
    text = as_text(planner.plan(planner.variant(LOCAL, checkpointing=False)))
    assert (
        "the run will try: the cache is empty and the disk has room for it; the model keeps packed rows apart" in text
    )


def test_a_prefix_that_cannot_be_cut_off_cannot_be_quantised_either() -> None:
    planner = planner_of(make("hrm_text").bfloat16(), recipe("hrm_text", precision="int8"))
    with pytest.raises(PlanError, match=r"HrmTextForCausalLM cannot be cut at block .*; leave out prefix\.precision"):
        planner.plan(planner.variant(LOCAL, checkpointing=False))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe"])
def test_a_mixture_of_experts_in_float32_is_planned_as_in_bfloat16(name: str) -> None:
    """torch takes products of experts on the meta device in bfloat16 alone; on real ones in both."""
    plans = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make(name).to(dtype)
        planner = planner_of(model, recipe(name))
        variant = planner.variant(LOCAL, checkpointing=False)
        part, plan = planner._split(variant), planner.plan(variant)
        if dtype == torch.float32:
            planned = (part.is_cut, part.shortcuts, variant.packed, variant.cached)
            assert planned == decided_by_run(model, recipe(name))
        plans.append(as_dict(plan))
    assert plans[0]["flops"] == plans[1]["flops"]
    activations = [values["memory"]["most"]["activations"] for values in plans]
    assert 1.5 < activations[0] / activations[1] <= 2.0
