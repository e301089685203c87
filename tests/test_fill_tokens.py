"""The first pass over streamed weights has batches that balance the copy, as far as training needs that much anyway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import invocation, tiny_flags

from toolkit.activation_cache.cached_prefix import FILL_TOKENS, STREAMED_FILL_TOKENS, CachedPrefix
from toolkit.config.schema import MaskConfig, ModelConfig, PrefixConfig, RunConfig, TrainConfig
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.meta_model import MetaModel, meta_model
from toolkit.planning.planner import Planner
from toolkit.planning.workload import Workload
from toolkit.runtime.distributed import World
from toolkit.training import phases
from toolkit.training.context import prepare

LOCAL = engine_spec(None, 1, 1)


@pytest.fixture(scope="module")
def bundled() -> MetaModel:
    return meta_model(ModelConfig())


def planner(meta: MetaModel, placement: Any, precision: Any = "model", rows: int = 1, **train: Any) -> Planner:
    config = RunConfig(
        mask=MaskConfig(train=["last:4", "head"], tied="untie"), train=TrainConfig(micro_batch_size=rows, **train),
        prefix=PrefixConfig(placement=placement, precision=precision),
    )  # fmt: skip
    return Planner(config, meta, Workload(400, 60, None, "a test"), packed=False)


def test_only_streamed_weights_make_the_batch_larger(bundled: MetaModel) -> None:
    plan = planner(bundled, "device", "int8", rows=64)
    assert plan.fill_tokens(plan.variant(LOCAL, False)) == FILL_TOKENS
    for precision, tokens in STREAMED_FILL_TOKENS.items():
        plan = planner(bundled, "cpu", precision, rows=64, gradient_checkpointing="off")
        assert plan.fill_tokens(plan.variant(LOCAL, False)) == tokens


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_the_larger_batch_is_never_the_peak_of_the_run(bundled: MetaModel, rows: int, mode: str) -> None:
    plan = planner(bundled, "cpu", rows=rows, gradient_checkpointing=mode)
    for checkpointing in {"auto": (False, True), "on": (True,), "off": (False,)}[mode]:
        variant = plan.variant(LOCAL, checkpointing)
        tokens, memory = plan.fill_tokens(variant), plan.memory(variant)
        assert tokens == FILL_TOKENS or memory.moment != "first pass"
        assert FILL_TOKENS <= tokens <= STREAMED_FILL_TOKENS["model"]
    assert (tokens > FILL_TOKENS) or rows == 1


def test_the_run_takes_the_batch_that_the_plan_has(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fill = CachedPrefix.fill

    def watched(self: CachedPrefix, examples: Any, tokens: int = 0, *lower: Any) -> None:
        seen.append(tokens)
        fill(self, examples, tokens, *lower)

    monkeypatch.setattr(CachedPrefix, "fill", watched)
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    words = tiny_flags(tiny_model, tmp_path / "run", "--mask.train", "last:2", "head", "--prefix.placement", "disk")
    context, handle = prepare(invocation(*words, "--train.micro_batch_size", "16", "--data.packing", "off"), World())
    phases.build_phase(context, handle, context.schedule.phases[0])
    planned = context.planners[0].fill_tokens(context.planners[0].variant(context.engine_spec, False))
    assert seen == [planned]
