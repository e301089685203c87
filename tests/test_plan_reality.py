"""A plan made without weights agrees with what training then holds and computes: bytes are counted, not estimated."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_ranks, tiny_flags
from plan_worker import ENGINES
from test_optimizers import stored
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from toolkit.config.schema import MaskConfig, ModelConfig, OptimConfig, OptimName, RunConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import build_mask
from toolkit.models.load import load
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.meta_model import MetaModel, meta_model
from toolkit.planning.planner import Plan, Planner
from toolkit.planning.workload import Workload
from toolkit.runtime.distributed import World
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.logit_tiles import BLOCK_BYTES
from toolkit.split.suffix import split
from toolkit.split.supervised_loss import supervised_loss

TOKENS, SUPERVISED = 160, 24
LOCAL = engine_spec(None, 1, 1)
MASKS = [
    ["last:4", "head"],
    ["head"],
    ["last:2"],
    ["norm", "head"],
    ["blocks:20", "norm"],
    ["glob:*.self_attn.q_proj.weight"],
]
QUANTISED = {"lora": {"select": "last:4", "rank": 8, "dora": True, "base_precision": "nf4"}}


@cache
def bundled() -> MetaModel:
    return meta_model(ModelConfig())


def recipe(train: list[Any], attention: Any = None, optim: OptimName = "adamw", **options: Any) -> RunConfig:
    return RunConfig(
        optim=OptimConfig(name=optim),
        model=ModelConfig(attn_implementation=attention),
        mask=MaskConfig(train=train, tied="untie"),
        train=TrainConfig(**options),
    )


def planned(config: RunConfig, bare: MetaModel, checkpointing: bool) -> Plan:
    planner = Planner(config, bare, Workload(TOKENS, SUPERVISED, None, "a test"))
    return planner.plan(planner.variant(engine_spec(None, 1, 1, config.optim.name), checkpointing))


def batch() -> Batch:
    ids = torch.arange(TOKENS)[None] + 1000
    supervised = torch.zeros(1, TOKENS, dtype=torch.bool)
    supervised[:, -SUPERVISED:] = True
    return Batch(ids, None, supervised, ids[supervised], TOKENS)


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@contextmanager
def saved_bytes(standing: nn.Module, found: dict[int, int]) -> Iterator[None]:
    """Fill ``found`` with the storages that autograd saves, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in standing.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


class SplitModel:
    """The real model under a mask, split and with the local engine."""

    def __init__(self, config: RunConfig) -> None:
        loaded = load(config.model)
        self.mask = build_mask(config.mask, loaded.anatomy)
        apply_mask(loaded.model, self.mask, loaded.anatomy)
        self.model = loaded.model.train()
        self.prefix, self.suffix = split(
            self.model, loaded.anatomy, self.mask.boundary if self.mask.has_prefix else None
        )
        row = batch()
        self.suffix.choose_shortcuts(self.prefix(row) if self.prefix else None, row)
        self.trained = trainable_parameters(self.suffix.model, self.mask)
        self.config = config

    def engine(self) -> LocalEngine:
        return LocalEngine(
            self.suffix, self.trained, self.mask.groups, self.config.train, self.config.optim, 4, World()
        )


class _UpdateBytes(TorchDispatchMode):
    """The most bytes of gradients at once in an update: those that backward left, and all that is made beside them."""

    def __init__(self, trained: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.holders = list(trained.values())
        self.left = nbytes([p.grad for p in self.holders if p.grad is not None])
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self.made += sum(storage.nbytes() for storage in made if storage._cdata not in known)
        return out


@pytest.mark.real_model
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("train", MASKS, ids=lambda train: "+".join(train))
def test_each_kind_of_bytes_is_what_training_holds(train: list[str], optim: OptimName) -> None:
    config = recipe(train, optim=optim)
    plan = planned(config, bundled(), checkpointing=False).memory.most
    real = SplitModel(config)
    engine, rows, saved = real.engine(), batch(), {}
    hidden = real.prefix(rows) if real.prefix else None
    with saved_bytes(real.model, saved):
        loss = supervised_loss(engine.forward_loss, hidden, rows, SUPERVISED)
    if hidden is not None:  # the loop holds it
        saved[hidden.untyped_storage().data_ptr()] = hidden.nbytes
    logits = SUPERVISED * 49152 * 2
    scores = BLOCK_BYTES // (49152 * 4) * 49152 * 4
    engine.backward(loss, is_last=True)
    with _UpdateBytes(real.trained) as gradients:
        engine.update()
    states = engine._optimizer.by_name.values()
    if optim != "adamw":  # bitsandbytes' kernel for the CPU works on float32 copies of a piece
        gradients.made = 0
    held = {
        "prefix weights": nbytes({id(p): p for p in real.model.parameters()}.values())
        - nbytes(real.suffix.parameters()),
        "suffix weights": nbytes(real.suffix.parameters()),
        "masters": nbytes(state.read()["master"] for state in states),
        "moments": sum(nbytes(stored(state).values()) for state in states),
        "gradients": gradients.left + gradients.made,
        "activations": sum(saved.values()) - logits,
        "logits": logits + scores,  # in bfloat16 for all positions, in float32 for a few at a time
    }
    deviations = {kind: plan[kind] / size - 1 for kind, size in held.items() if size}
    print(train, {kind: f"{deviation:+.2%}" for kind, deviation in deviations.items()})
    assert max(map(abs, deviations.values())) < 0.1, deviations


class _LiveBytes(TorchDispatchMode):
    """The most bytes at once in storages that are made while it is entered."""

    def __init__(self, standing: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in standing}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.real_model
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", [["last:4", "head"], ["blocks:20", "norm"], [QUANTISED]], ids=str)
def test_the_peak_of_a_micro_batch_is_that_of_all_storages_alive(train: list[Any], checkpointing: bool) -> None:
    config = recipe(train)
    planner = Planner(config, bundled(), Workload(TOKENS, SUPERVISED, None, "a test"))
    plan = planner._trace(planner.variant(LOCAL, checkpointing)).peak()
    real, rows = SplitModel(config), batch()
    if checkpointing:
        checkpoint_blocks(real.suffix.blocks(real.mask.boundary))
    parts = (real.model, real.prefix, real.suffix)
    with _LiveBytes([tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]) as live:
        hidden = real.prefix(rows)
        loss = supervised_loss(real.suffix, hidden, rows, SUPERVISED)
        loss.backward()
    assert sum(plan.values()) == pytest.approx(live.most, rel=0.02)


@pytest.mark.real_model
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_pytorch_counts(checkpointing: bool) -> None:
    """With plain attention, whose products PyTorch's counter sees on every device."""
    config = recipe(["last:4", "head"], attention="eager")
    plan = planned(config, meta_model(config.model), checkpointing)
    real, rows = SplitModel(config), batch()
    if checkpointing:
        checkpoint_blocks(real.suffix.blocks(real.mask.boundary))
    with FlopCounterMode(display=False) as prefix:
        hidden = real.prefix(rows)
    with FlopCounterMode(display=False) as forward:
        loss = supervised_loss(real.suffix, hidden, rows, SUPERVISED)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = plan.flops.of([(TOKENS, SUPERVISED)])
    assert expected["prefix forward"] == pytest.approx(prefix.get_total_flops(), rel=0.02)
    assert expected["suffix forward"] == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert expected["backward"] + expected["recomputation"] == pytest.approx(backward.get_total_flops(), rel=0.02)
    assert (expected["recomputation"] > 0) is checkpointing


@pytest.mark.real_model
def test_flops_of_other_lengths_follow_from_one_trace() -> None:
    config = recipe(["last:2"])
    plan = planned(config, bundled(), checkpointing=True)
    planner = Planner(config, bundled(), Workload(3 * TOKENS, SUPERVISED // 2, None, "a test"))
    longer = planner.plan(planner.variant(LOCAL, checkpointing=True))
    row = [(3 * TOKENS, SUPERVISED // 2)]
    assert plan.flops.of(row) == pytest.approx(longer.flops.of(row), rel=1e-6)


@pytest.mark.real_model
def test_the_traces_attention_is_gone_afterwards() -> None:
    kernel = nn.functional.scaled_dot_product_attention
    planned(recipe(["last:2"]), bundled(), checkpointing=True)
    assert nn.functional.scaled_dot_product_attention is kernel


@pytest.fixture(scope="module")
def on_two_ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What DeepSpeed holds on rank 0 of 2 after a step, under each stage, beside the plan."""
    output = tmp_path_factory.mktemp("stages") / "result.json"
    flags = tiny_flags(tiny_model, output.parent / "run", "--model.dtype", "bfloat16", "--prefix.cache", "off")
    result = run_ranks("tests/plan_worker.py", output, *flags)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return json.loads(output.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_zero_holds_on_each_rank_what_was_planned(on_two_ranks: dict[str, Any], engine: str) -> None:
    """On a CPU, where what is offloaded to the host comes from the same memory."""
    found = on_two_ranks[engine]
    most = found["plan"]["memory"]["most"]
    assert found["plan"]["engine"] == {
        "name": f"zero-{engine[4]}", "ranks": 2, "optimizer": "adamw", "gradient_checkpointing": False,
    }  # fmt: skip
    for kind, size in found["held"].items():
        assert most[kind] == pytest.approx(size, rel=0.1), kind
    # the optimizer sees float32 gradients of its part; in 16 bit they were there a moment before
    assert found["gradients"] <= most["gradients"] <= 2.5 * found["gradients"]
    assert found["plan"]["disk"]["checkpoint"] == pytest.approx(found["written"], rel=0.1)
