"""A plan made without weights agrees with what training then holds and computes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import invocation, run_script, tiny_flags
from plan_shapes import EXAONE, exaone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from toolkit.config.flags import byte_size
from toolkit.config.schema import MaskConfig, ModelConfig, RunConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.distributed import World
from toolkit.engine.local import LocalEngine
from toolkit.errors import ConfigError, MaskError, ModelError, PlanError
from toolkit.loss import supervised_loss
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import build_mask
from toolkit.models.load import load
from toolkit.plan.command import plan_command
from toolkit.plan.fit import RESERVE, choose_recompute, judge
from toolkit.plan.load import Load
from toolkit.plan.memory import KINDS, engine_spec, zero_spec
from toolkit.plan.picture import draw
from toolkit.plan.planner import Plan, Planner
from toolkit.plan.report import as_dict
from toolkit.plan.skeleton import Skeleton, skeleton
from toolkit.prefix.recompute import recompute_blocks
from toolkit.prefix.split import split

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


@cache
def bundled() -> Skeleton:
    return skeleton(ModelConfig())


def recipe(train: list[str], attention: Any = None, **options: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(attn_implementation=attention),
        mask=MaskConfig(train=train, tied="untie"),
        train=TrainConfig(**options),
    )


def planned(config: RunConfig, bare: Skeleton, recompute: bool) -> Plan:
    planner = Planner(config, bare, Load(TOKENS, SUPERVISED, None, "a test"))
    return planner.plan(planner.variant(LOCAL, recompute))


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


class Halves:
    """The real model under a mask, split and with the local engine."""

    def __init__(self, config: RunConfig) -> None:
        loaded = load(config.model)
        self.mask = build_mask(config.mask, loaded.anatomy)
        apply_mask(loaded.model, self.mask, loaded.anatomy)
        self.model = loaded.model.train()
        self.prefix, self.suffix = split(self.model, loaded.anatomy, self.mask.boundary)
        self.trained = trainable_parameters(self.suffix.model, self.mask)
        self.config = config

    def engine(self) -> LocalEngine:
        return LocalEngine(self.suffix, self.trained, self.config.train, self.config.optim, 4, World())


class _GradientBytes(TorchDispatchMode):
    """The most bytes of gradients at once, counted whenever one is copied to float32."""

    def __init__(self, real: Halves, engine: LocalEngine) -> None:
        super().__init__()
        self.holders = [*real.trained.values(), *engine._weights.by_name.values()]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and any(args[0] is holder.grad for holder in self.holders):
            self.most = max(self.most, nbytes([h.grad for h in self.holders if h.grad is not None]) + out.nbytes)
        return out


@pytest.mark.real_model
@pytest.mark.parametrize("train", MASKS, ids=lambda train: "+".join(train))
def test_each_kind_of_bytes_is_what_training_holds(train: list[str]) -> None:
    config = recipe(train)
    plan = planned(config, bundled(), recompute=False).memory.most
    real = Halves(config)
    engine, rows, saved = real.engine(), batch(), {}
    hidden = real.prefix(rows) if real.prefix else None
    with saved_bytes(real.model, saved):
        loss = supervised_loss(engine.forward, hidden, rows, SUPERVISED)
    if hidden is not None:  # the loop holds it
        saved[hidden.untyped_storage().data_ptr()] = hidden.nbytes
    log_probabilities = SUPERVISED * 49152 * 4
    with _GradientBytes(real, engine) as gradients:
        engine.backward(loss, is_last=True)
    engine.update()
    state = engine._optimizer.state.values()
    held = {
        "prefix weights": nbytes({id(p): p for p in real.model.parameters()}.values())
        - nbytes(real.suffix.parameters()),
        "suffix weights": nbytes(real.suffix.parameters()),
        "masters": nbytes(engine._weights.by_name.values()),
        "moments": sum(nbytes((moments["exp_avg"], moments["exp_avg_sq"])) for moments in state),
        "gradients": gradients.most,
        "activations": sum(saved.values()) - log_probabilities,
        "logits": 3 * log_probabilities,  # log-probabilities, their gradient, and that of the float32 logits
    }
    deviations = {kind: plan[kind] / size - 1 for kind, size in held.items() if size}
    print(train, {kind: f"{deviation:+.2%}" for kind, deviation in deviations.items()})
    assert max(map(abs, deviations.values())) < 0.1, deviations


@pytest.mark.real_model
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_pytorch_counts(recompute: bool) -> None:
    """With plain attention, whose products PyTorch's counter sees on every device."""
    config = recipe(["last:4", "head"], attention="eager")
    plan = planned(config, skeleton(config.model), recompute)
    real, rows = Halves(config), batch()
    if recompute:
        recompute_blocks(real.suffix.blocks(real.mask.boundary))
    with FlopCounterMode(display=False) as prefix:
        hidden = real.prefix(rows)
    with FlopCounterMode(display=False) as forward:
        loss = supervised_loss(real.suffix, hidden, rows, SUPERVISED)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = plan.compute.of([(TOKENS, SUPERVISED)])
    assert expected["prefix forward"] == pytest.approx(prefix.get_total_flops(), rel=0.02)
    assert expected["suffix forward"] == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert expected["backward"] + expected["recomputation"] == pytest.approx(backward.get_total_flops(), rel=0.02)
    assert (expected["recomputation"] > 0) is recompute


@pytest.mark.real_model
def test_flops_of_other_lengths_follow_from_one_rehearsal() -> None:
    config = recipe(["last:2"])
    plan = planned(config, bundled(), recompute=True)
    planner = Planner(config, bundled(), Load(3 * TOKENS, SUPERVISED // 2, None, "a test"))
    longer = planner.plan(planner.variant(LOCAL, recompute=True))
    row = [(3 * TOKENS, SUPERVISED // 2)]
    assert plan.compute.of(row) == pytest.approx(longer.compute.of(row), rel=1e-6)


@pytest.mark.real_model
def test_the_rehearsals_attention_is_gone_afterwards() -> None:
    kernel = nn.functional.scaled_dot_product_attention
    planned(recipe(["last:2"]), bundled(), recompute=True)
    assert nn.functional.scaled_dot_product_attention is kernel


@pytest.mark.parametrize("name", EXAONE)
def test_exaone_is_planned_from_its_config_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = exaone(tmp_path / name, name)
    plan_command(
        invocation("--model.name_or_path", str(directory), "--mask.tied", "untie", "--data.path", "org/none"),
        1, 80 * 2**30, True, None,
    )  # fmt: skip
    plan = json.loads(capsys.readouterr().out)
    parameters = sum(part["parameters"] for part in plan["mask"]["parts"])
    assert parameters == {"2.4b": 2_667_471_360, "7.8b": 7_818_448_896, "32b": 32_003_200_000}[name]
    assert plan["mask"]["boundary"] == {"2.4b": 26, "7.8b": 28, "32b": 60}[name]
    assert plan["memory"]["peak"] == sum(plan["memory"]["at_peak"][kind] for kind in KINDS)
    assert plan["fit"]["fits"] is (name != "32b")
    assert plan["micro_batch"]["tokens"] == 2048
    assert plan["flops"]["per_epoch"] is None


def tiny_planner(directory: Path, rows: int = 1, **options: Any) -> Planner:
    config = RunConfig(
        model=ModelConfig(name_or_path=str(directory), dtype="bfloat16"),
        mask=MaskConfig(train=["last:4"]),
        train=TrainConfig(micro_batch_size=rows, **options),
    )
    return Planner(config, skeleton(config.model), Load(512, 512, None, "a test"))


def first_turn(planner: Planner, budget_of: Any, spec: Any = LOCAL) -> str:
    variant = choose_recompute(planner, spec, None)
    verdict = judge(planner, variant, budget_of(planner, variant))
    assert not verdict.fits
    return verdict.turns[0][0] if verdict.turns else ""


def just_below(planner: Planner, variant: Any) -> int:
    return planner.memory(variant).peak + RESERVE - 1


def test_the_first_knob_is_the_one_that_costs_least(tiny_model: Path) -> None:
    off = {"gradient_checkpointing": "off"}
    assert first_turn(tiny_planner(tiny_model, rows=4, **off), just_below) == "train.gradient_checkpointing: on"
    on = {"gradient_checkpointing": "on"}
    assert first_turn(tiny_planner(tiny_model, rows=4, **on), just_below).startswith("train.micro_batch_size: 1 with")
    assert first_turn(tiny_planner(tiny_model, **on), just_below).startswith("data.max_length: 256")


def test_state_that_no_shorter_row_makes_room_for_goes_to_more_ranks_then_to_fewer_blocks(tmp_path: Path) -> None:
    directory = exaone(tmp_path / "7.8b", "7.8b")
    config = RunConfig(
        model=ModelConfig(name_or_path=str(directory)), mask=MaskConfig(train=["last:16"]),
        train=TrainConfig(gradient_checkpointing="on"),
    )  # fmt: skip
    planner = Planner(config, skeleton(config.model), Load(256, 64, None, "a test"))
    verdict = judge(planner, planner.variant(LOCAL, recompute=True), 40 * 2**30)
    assert [text for text, _ in verdict.turns] == ["--ds ds_configs/zero2.json on 4 ranks"]
    wide = planner.variant(zero_spec(3, 8, False, 4096), recompute=True)
    least = planner.memory(wide).peak + RESERVE
    assert judge(planner, wide, least).turns == ()
    assert judge(planner, wide, least - 2**30).turns[0][0].startswith("mask.train: last:")
    hopeless = judge(planner, wide, 2 * 2**30)
    assert not hopeless.helps


def test_auto_recomputes_exactly_where_the_budget_asks_for_it(tiny_model: Path) -> None:
    planner = tiny_planner(tiny_model)
    plain = choose_recompute(planner, LOCAL, None)
    needed = planner.memory(plain).peak + RESERVE
    assert not plain.recompute
    assert not choose_recompute(planner, LOCAL, needed).recompute
    assert choose_recompute(planner, LOCAL, needed - 1).recompute


def test_padded_rows_and_full_masks_can_be_planned(tiny_model: Path) -> None:
    planner = tiny_planner(tiny_model, rows=2)
    one, two = tiny_planner(tiny_model), planner.variant(LOCAL, recompute=False)
    activations = planner.memory(two).most["activations"]
    assert activations > 2 * one.memory(one.variant(LOCAL, recompute=False)).most["activations"]
    everything = RunConfig(model=planner.config.model, mask=MaskConfig(train=["re:.*"], tied="untie"))
    whole = Planner(everything, planner.skeleton, Load(64, 8, None, "a test"))
    plan = whole.plan(whole.variant(LOCAL, recompute=True))
    assert plan.memory.most["prefix weights"] == 0
    assert plan.compute.of([(64, 8)])["prefix forward"] == 0


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 gib", 3 * 2**29)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["24", "a lot", "-1GiB", "0GiB", "24 GiB of memory", ""])
def test_a_size_that_is_none_says_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 24GiB"):
        byte_size(text)


def test_the_command_exits_with_2_and_one_message_on_a_bad_size(tiny_model: Path) -> None:
    result = run_script("launch/plan.py", "--model.name_or_path", tiny_model, "--gpu-memory", "plenty")
    assert result.returncode == 2
    assert "--gpu-memory is 'plenty'; expected a size such as 24GiB or 80GB" in result.stderr
    assert "Traceback" not in result.stderr


def test_headers_that_contradict_the_config_are_an_error(tiny_model: Path, tmp_path: Path) -> None:
    values = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"intermediate_size": 96}))
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    with pytest.raises(ModelError, match=r"\(64, 32\) stored, config.json makes it \(96, 32\)"):
        skeleton(ModelConfig(name_or_path=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        skeleton(ModelConfig(name_or_path=str(tmp_path)))


def test_a_faulty_mask_is_reported_before_anything_is_rehearsed(tiny_model: Path) -> None:
    with pytest.raises(MaskError, match="a whole number from 1 to 6"):
        plan_command(invocation(*tiny_flags(tiny_model, Path("x"), "--mask.train", "last:7")), 1, None, False, None)


def test_a_run_saves_its_plan_and_names_it_beside_the_measured_peak(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from toolkit.train.run import run

    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 1)
    caplog.set_level("INFO", logger="frostline")
    assert run(invocation(*flags)) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert set(plan["memory"]["most"]) == set(KINDS)
    assert plan["micro_batch"]["source"] == "the longest of 20 training rows"
    assert f"(planned: {plan['memory']['peak'] / 2**30:.2f} GiB of tensors)" in caplog.text
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
    assert plan["disk"]["checkpoint"] == pytest.approx(written, rel=0.15)


def test_the_table_the_json_and_the_picture_say_the_same(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    given = invocation(*tiny_flags(tiny_model, tmp_path / "run"))
    plan_command(given, 2, 24 * 2**30, False, tmp_path / "plan.png")
    text = capsys.readouterr().out
    assert "frost line: block 2 of 6" in text
    assert "fits: 1.00 GiB of 24.00 GiB" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    plan_command(given, 2, 24 * 2**30, True, None)
    values = json.loads(capsys.readouterr().out)
    assert values["fit"]["fits"]
    assert values["engine"] == {"name": "local", "ranks": 2, "gradient_checkpointing": False}


def test_without_matplotlib_the_picture_names_the_line_that_installs_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = tiny_planner(tiny_model)
    plan = planner.plan(planner.variant(LOCAL, recompute=False))
    assert as_dict(plan)["engine"]["name"] == "local"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install -c constraints.txt matplotlib"):
        draw(plan, tmp_path / "plan.png")


@pytest.fixture(scope="module")
def on_two_ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What DeepSpeed holds on rank 0 of 2 after a step, under each stage, beside the plan."""
    output = tmp_path_factory.mktemp("stages") / "result.json"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = tiny_flags(tiny_model, output.parent / "run", "--model.dtype", "bfloat16")
    launcher = ("deepspeed", "--num_gpus", "2", "--master_port", port)
    result = run_script("tests/plan_worker.py", output, *flags, launcher=launcher)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return json.loads(output.read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_zero_holds_on_each_rank_what_was_planned(on_two_ranks: dict[str, Any], stage: str) -> None:
    found = on_two_ranks[stage]
    most = found["plan"]["memory"]["most"]
    assert found["plan"]["engine"] == {"name": f"zero-{stage}", "ranks": 2, "gradient_checkpointing": False}
    for kind, size in found["held"].items():
        assert most[kind] == pytest.approx(size, rel=0.1), kind
    # the optimizer sees float32 gradients of its part; in 16 bit they were there a moment before
    assert found["gradients"] <= most["gradients"] <= 2.5 * found["gradients"]
    assert found["plan"]["disk"]["checkpoint"] == pytest.approx(found["written"], rel=0.1)
