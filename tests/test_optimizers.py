"""AdamW with moments in 8 bits: the bytes it promises, the updates it keeps, and where it stops."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from closeness import BFLOAT16_LOSS, assert_rounded_alike, rms
from helpers import ROOT, metrics, run_ranks, tiny_flags, train
from test_master_adamw import BFLOAT16, FLOAT32, by_hand, give, made, masters_of, settings
from torch import nn

from toolkit.config.schema import MaskConfig, OptimConfig, OptimName, RunConfig
from toolkit.engine.deepspeed.config import resolve_ds_config
from toolkit.engine.deepspeed.optimizers import KEEPS_FLOAT32, PartitionedAdamW, build_optimizer
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.flat_buffers import FlatBuffers
from toolkit.optim.low_bit_state import LowBitState
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.optim.rounding import stochastic_round
from toolkit.optim.state_fragments import KINDS, MOMENTS, FragmentState
from toolkit.optim.update_monitor import STEPS, UpdateMonitor
from toolkit.planning.engine_memory import engine_memory
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.prefix_memory import PrefixMemory
from toolkit.planning.tensor_sizes import TensorSizes
from toolkit.runtime.errors import ConfigError
from toolkit.training.loading import check_schedule_allowed

NAMES = get_args(OptimName)
SHAPES = [(100, 130), (7,), (64, 65), (33, 3)]
"""Whole and broken blocks of 256, over and under bitsandbytes' 4096 elements, over and under a piece of 1024."""


def stored(state: FragmentState) -> dict[str, torch.Tensor]:
    """Moments as they are stored, by kind."""
    tensors = {**state.read(), **state.raw()}
    return {kind: tensor for kind, tensor in tensors.items() if kind.startswith("exp_avg")}


@pytest.mark.parametrize("value", [0.02, -3e-7, 1.0, 5e-20])
def test_stochastic_rounding_is_right_on_average(value: float) -> None:
    exact, every = torch.full((1 << 16,), value), torch.arange(1 << 16, dtype=torch.int32)
    rounded = torch.empty(1 << 16, dtype=BFLOAT16)
    stochastic_round(exact.clone(), every, rounded)
    assert float(rounded.double().mean()) == pytest.approx(float(exact[0]), rel=1e-7)
    assert rounded.unique().numel() <= 2


@pytest.mark.parametrize("dtypes", [[BFLOAT16], [FLOAT32], [BFLOAT16, FLOAT32]], ids=["low", "float32", "mixed"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_masters_stay_beside_those_of_float32_moments(dtypes: list[torch.dtype], accumulates: bool) -> None:
    parameters = made(SHAPES, dtypes)
    start = {key: nn.Parameter(p.detach().clone()) for key, p in parameters.items()}
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, accumulates, piece=1024, name="adamw_8bit")
    steps = []
    for seed in range(20):
        steps.append(give(parameters, seed))
        optimizer.collect()
        optimizer.step()
    exact = by_hand(start, steps, torch.float64, 1.0)
    for key, found, expected in zip(parameters, masters_of(optimizer), exact, strict=True):
        path = (expected.detach() - start[key].detach().double()).norm()
        assert (found - expected.detach()).norm() < 0.04 * path, key
        assert torch.equal(parameters[key], found.to(parameters[key].dtype))


@pytest.mark.parametrize("name", NAMES)
def test_updates_that_bfloat16_rounds_away_are_kept_and_seen_to_move(
    name: OptimName, caplog: pytest.LogCaptureFixture
) -> None:
    """At 1e-5 a step on a weight of 1 is far below bfloat16's spacing of 1/128 there."""
    weight = nn.Parameter(torch.ones(4096, dtype=BFLOAT16))
    options = {"params": [weight], "lr": 1e-5, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = MasterAdamW({"w": weight}, [options], 0, name=name)
    moved = UpdateMonitor(optimizer.sample)
    for _ in range(500):
        weight.grad = torch.ones_like(weight)
        moved.before()
        optimizer.step()
        moved.after()
        assert moved.changed_share(*moved.counts.tolist(), 1e-5) == 1.0
    assert torch.allclose(masters_of(optimizer)[0], torch.tensor(0.995), atol=2e-4)
    assert not caplog.records


def test_a_warning_says_once_that_rounding_eats_the_updates(caplog: pytest.LogCaptureFixture) -> None:
    """Plain AdamW on bfloat16 weights, of which those above 2^-8 cannot take a step of 1e-5."""
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randn(4096) * 0.02).bfloat16())
    naive = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
    index = torch.arange(4096)
    moved = UpdateMonitor(
        lambda: [(weight.detach()[index], naive.state[weight]["exp_avg"] != 0 if naive.state else index < 0)]
    )
    shares = []
    for _ in range(3 * STEPS):
        weight.grad = torch.randn_like(weight)
        moved.before()
        naive.step()
        moved.after()
        shares.append(moved.changed_share(*moved.counts.tolist(), 1e-5))
    assert all(share is not None and 0.01 < share < 0.4 for share in shares)
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "rounding eats the updates" in caplog.records[0].message


def test_what_is_not_meant_to_move_is_not_counted() -> None:
    weight = nn.Parameter(torch.ones(2, 2048, dtype=BFLOAT16))
    optimizer = MasterAdamW({"w": weight}, [{**settings({"w": weight})[0], "weight_decay": 0.0}], 1.0)
    moved = UpdateMonitor(optimizer.sample)
    weight.grad = torch.zeros_like(weight)
    weight.grad[1] = 1.0  # the other row is a token that does not occur
    moved.before()
    optimizer.step()
    moved.after()
    changed, expected = moved.counts.tolist()
    assert 0 < changed == expected < 256
    assert moved.changed_share(changed, expected, 0.0) is None, "at a rate of 0 nothing is meant to move"
    assert moved.changed_share(0, 0, 1e-5) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameters = made(SHAPES, [BFLOAT16, FLOAT32])
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, piece=1024, name="adamw_8bit")

    def everything() -> list[torch.Tensor]:
        kept = [t for state in optimizer.by_name.values() for t in (*state.read().values(), *state.raw().values())]
        return [t.detach().clone() for t in (*parameters.values(), *kept)]

    for gradient in (0.0, bad, 0.0):
        give(parameters, 0)
        parameters["t2"].grad[3, 3] = gradient
        before = everything()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True)) == (gradient is bad)
        assert all(p.grad is None for p in parameters.values())
    assert optimizer.by_name["t0"].updates == 2


@pytest.mark.parametrize("name", NAMES)
def test_from_the_stored_state_it_goes_on_to_the_bit(name: OptimName) -> None:
    def fresh() -> tuple[dict[str, nn.Parameter], MasterAdamW]:
        parameters = made(SHAPES, [BFLOAT16, FLOAT32])
        return parameters, MasterAdamW(parameters, settings(parameters), 1.0, piece=1024, name=name)

    def steps(parameters: dict[str, nn.Parameter], optimizer: MasterAdamW, seeds: range) -> None:
        for seed in seeds:
            give(parameters, seed)
            optimizer.step()

    parameters, optimizer = fresh()
    steps(parameters, optimizer, range(4))
    kept = {
        key: [{kind: t.clone() for kind, t in tensors.items()} for tensors in (own.read(), own.raw())]
        for key, own in optimizer.by_name.items()
    }
    again, resumed = fresh()
    for key, own in resumed.by_name.items():
        values, raw = kept[key]
        own.write(values, 4)
        if raw:
            own.set_raw(raw)
    resumed.write_back()
    for pair in ((parameters, optimizer), (again, resumed)):
        steps(*pair, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(masters_of(optimizer), masters_of(resumed), strict=True))
    assert all(torch.equal(parameters[key], again[key]) for key in parameters)


@pytest.mark.parametrize(("name", "error"), [("adamw", 0), ("adamw_8bit", 0.02)])
def test_float32_values_can_be_put_in_and_read(name: OptimName, error: float) -> None:
    parameters = made(SHAPES, [BFLOAT16, FLOAT32])
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, piece=1024, name=name)
    for key, state in optimizer.by_name.items():
        values = {kind: torch.randn(parameters[key].numel()) * 1e-3 for kind in KINDS}
        values["exp_avg_sq"].square_()
        state.write(values, 7)
        written = state.read()
        assert torch.equal(written["master"], values["master"])
        assert state.updates == 7
        assert all((written[kind] - values[kind]).norm() <= error * values[kind].norm() for kind in MOMENTS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_the_plan_says_what_each_optimizer_holds(name: OptimName, dtype: torch.dtype) -> None:
    parameters = made([(300, 256), (4096,), (64, 100), (33,)], [dtype])
    tables = {id(parameters["t2"])}
    optimizer = MasterAdamW(parameters, settings(parameters), 1.0, name=name, embedding_ids=tables)
    sizes = tuple(p.numel() for p in parameters.values())
    tensors = TensorSizes(0, sizes, (), dtype.itemsize, tables=(6400,))
    plan = engine_memory(engine_spec(None, 1, 1, name, host_is_device=True), tensors, PrefixMemory(0, 0, 0))
    states = optimizer.by_name.values()
    assert plan.moments == sum(t.nbytes for state in states for t in stored(state).values())
    assert plan.masters == (0 if dtype == FLOAT32 else sum(sizes) * 4)
    own: list[torch.Tensor | None] = []
    for state in optimizer._states:
        assert isinstance(state, FlatBuffers | LowBitState)
        own.append(state._master)
    weights = {p.untyped_storage().data_ptr() for p in parameters.values()}
    assert plan.masters == sum(t.nbytes for t in own if t is not None and t.untyped_storage().data_ptr() not in weights)
    is_float32 = [stored(optimizer.by_name[key])["exp_avg"].dtype == FLOAT32 for key in parameters]
    assert is_float32 == ([True] * 4 if name == "adamw" else [False, False, True, True])


def test_deepspeed_gets_tables_in_partitions_of_their_own() -> None:
    parameters = {name: nn.Parameter(torch.zeros(70, 70)) for name in ("table", "matrix")}
    options = [parameters, [ParameterGroup(("table", "matrix"))], RunConfig().train, OptimConfig(name="adamw_8bit")]
    optimizer = build_optimizer(*options, embedding_ids={id(parameters["table"])})
    assert isinstance(optimizer, PartitionedAdamW)
    assert [(group["params"], group[KEEPS_FLOAT32]) for group in optimizer.param_groups] == [
        ([parameters["matrix"]], False), ([parameters["table"]], True),
    ]  # fmt: skip
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kinds = [optimizer.state[parameters[name]]["exp_avg"].dtype for name in ("matrix", "table")]
    assert kinds == [torch.uint8, FLOAT32]


def test_a_run_learns_what_float32_masters_learn_and_resumes_exactly(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--model.dtype", "bfloat16", "--train.max_steps", 10, "--train.learning_rate", "1e-4")
    assert train(*tiny_flags(tiny_model, tmp_path / "float32", *flags)) == 0
    saving = ("--output.save_every_steps", 3, "--output.keep", 20, "--optim.name", "adamw_8bit")
    run = tiny_flags(tiny_model, tmp_path / "run", *flags, *saving)
    assert train(*run) == 0
    whole = metrics(tmp_path / "run")
    assert whole != metrics(tmp_path / "float32")
    assert_rounded_alike(tmp_path / "run", tmp_path / "float32")
    shares = metrics(tmp_path / "run", "moved_share")
    assert shares[0] is None, "the warmup begins at 0"
    assert min(shares[1:]) > 0.95
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000003")
    assert train(*run) == 0
    assert metrics(tmp_path / "run") == whole


def test_the_monitor_and_the_log_show_a_run_whose_updates_are_lost(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if the engine had no masters: after each update they are what bfloat16 can hold."""
    step = MasterAdamW.step

    def without_masters(self: MasterAdamW) -> None:
        step(self)
        for own in self._states:
            for state, parameter in zip(own.states, own.parameters, strict=True):
                state.write({"master": parameter.detach().float().flatten()}, state.updates)

    monkeypatch.setattr(MasterAdamW, "step", without_masters)
    monkeypatch.setattr(logging.getLogger("frostline"), "propagate", True)
    flags = ("--model.dtype", "bfloat16", "--train.max_steps", 14, "--train.learning_rate", "1e-6")
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *flags)) == 0
    shares = [share for share in metrics(tmp_path / "run", "moved_share") if share is not None]
    assert max(shares) < 0.2
    assert sum("rounding eats the updates" in record.message for record in caplog.records) == 1


def ds_file(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **zero}}


@pytest.mark.parametrize(
    ("name", "ds_config", "reason"),
    [
        ("adamw_8bit", ds_file(offload_optimizer={"device": "nvme"}), "swaps float32 state alone to NVMe"),
        ("adamw_8bit", ds_file(zenflow={}), "DeepSpeed's own CPU Adam"),
        ("paged_adamw_8bit", {}, "stage is 0"),
        ("adamw", ds_file(offload_optimizer={"device": "cpu", "ratio": 0.5}), "ratio is 0.5"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_the_reason(
    name: OptimName, ds_config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve_ds_config(ds_config, RunConfig(optim=OptimConfig(name=name)), 1, 64, Path("ds.json"))


def test_deepspeed_is_told_that_these_optimizers_are_wanted() -> None:
    resolved = resolve_ds_config(ds_file(), RunConfig(optim=OptimConfig(name="adamw_8bit")), 1, 64, Path("ds.json"))
    assert resolved["zero_allow_untested_optimizer"] is True


def test_paged_moments_are_refused_with_a_schedule() -> None:
    mask = MaskConfig(schedule=[{"train": ["head"], "until_epoch": 1}])
    config = RunConfig(mask=mask, optim=OptimConfig(name="paged_adamw_8bit"))
    with pytest.raises(ConfigError, match="never frees"):
        check_schedule_allowed(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def on_two_ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker saw under ZeRO-1, and under 2 and 3 with the optimizer on the host."""
    folder = tmp_path_factory.mktemp("optimizers")
    for stage in (1, 2, 3):
        ds_config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        if stage > 1:
            ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        (folder / f"ds-{stage}.json").write_text(json.dumps(ds_config))
    flags = tiny_flags(tiny_model, folder / "run", "--model.dtype", "bfloat16", "--prefix.cache", "off")
    schedule = ("--train.max_steps", 8, "--train.warmup_ratio", 0)
    result = run_ranks("tests/optimizer_worker.py", folder / "result.json", *flags, *schedule)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_zero_it_learns_the_same_resumes_exactly_and_holds_what_was_planned(
    on_two_ranks: dict[str, Any], stage: int
) -> None:
    found, first = on_two_ranks[f"{stage} adamw_8bit"], on_two_ranks["1 adamw_8bit"]
    assert found["engine"] == f"zero-{stage}"
    assert rms(found["losses"], first["losses"]) < BFLOAT16_LOSS
    assert found["resumed"] == found["losses"][2:]
    assert min(found["shares"]) > 0.95
    for kind, size in found["stored"].items():
        assert found["planned"][kind] == pytest.approx(size, rel=0.1), kind
    assert found["apart"]["master"] == 0, "what goes on to another phase"
    assert max(found["apart"].values()) < 0.02
