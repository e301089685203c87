"""Masks that follow one another: the learning is that of a plain loop, in any direction, resumed anywhere."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from closeness import BFLOAT16_LOSS, rms
from helpers import ENGLISH, invocation, masters_of, metrics, reseal, set_up, tiny_flags, train
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.batches import epoch_order, step_batches
from toolkit.data.dataset import load_dataset
from toolkit.exporting.run_export import export_model
from toolkit.models.load import load
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.split.prefix import Prefix
from toolkit.training.step import train_step
from toolkit.training.trainer import Trainer

LR, STEPS = 1e-3, 30
BFLOAT16_EPSILON = 1e-3
"""AdamW's in bfloat16: a quarter of the gradients' root mean square.

With the usual 1e-8 a gradient near zero, whose sign bfloat16 decides, makes a full step: of 54,000 elements the one
farthest from a plain loop was 1.4 steps off, the next 0.9, and with this one 0.09.
"""

Phases = Sequence[tuple[int, Sequence[str]]]
"""For each phase the step it ends with, and its selectors."""

UNFREEZING: Phases = ((8, ["head"]), (20, ["last:2", "head"]), (STEPS, ["last:4", "head"]))
FREEZING: Phases = ((7, ["last:4", "head"]), (20, ["last:2", "head"]), (STEPS, ["head"]))
BACK_AGAIN: Phases = ((8, ["last:2"]), (17, ["blocks:1", "head"]), (STEPS, ["last:2", "norm", "head"]))

SELECTED: dict[str, Callable[[str], bool]] = {
    **{f"block {i}": lambda name, i=i: name.startswith(f"model.layers.{i}.") for i in range(6)},  # type: ignore[misc]
    "embeddings": lambda name: name == "model.embed_tokens.weight",
    "head": lambda name: name == "lm_head.weight",
    "norm": lambda name: name == "model.norm.weight",
    "blocks:1": lambda name: name.startswith("model.layers.1."),
    "last:2": lambda name: name.startswith(("model.layers.4.", "model.layers.5.")),
    "last:4": lambda name: name.startswith(tuple(f"model.layers.{i}." for i in (2, 3, 4, 5))),
}


def flags(model: Path, run: Path, phases: Phases, *more: object) -> list[str]:
    schedule = [{"train": list(selectors), "until_step": end} for end, selectors in phases[:-1]]
    masks = ("--mask.train", *phases[-1][1], "--mask.schedule", json.dumps(schedule), "--train.max_steps", STEPS)
    return tiny_flags(model, run, *masks, *more)


def plain(
    model_path: Path, dtype: str, phases: Phases, eps: float = 1e-8, anew: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop on one AdamW: a tensor joins it when it first trains, has no gradient while it rests, and begins
    anew after a rest, or with every phase (``anew``). Step losses and masters."""
    loaded = load(ModelConfig(name_or_path=str(model_path), dtype=dtype))
    model = loaded.model.train()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    weights = dict(model.named_parameters())
    masters = {name: w if dtype == "float32" else w.detach().float() for name, w in weights.items()}
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1, requires_grad=True)]}], lr=LR, eps=eps)
    examples = load_dataset(DataConfig(path=str(ENGLISH)), loaded.tokenizer, 42).train
    losses: list[float] = []
    before: set[str] = set()
    joined: set[str] = set()
    for end, selectors in phases:
        now = {name for name in weights if any(SELECTED[selector](name) for selector in selectors)}
        for name in sorted(now if anew else now - before):
            if name in joined:
                del optimizer.state[masters[name]]
            else:
                decay = 0.01 if weights[name].ndim > 1 else 0.0
                optimizer.add_param_group({"params": [masters[name]], "weight_decay": decay})
        joined, before = joined | now, now
        for name, weight in weights.items():
            weight.requires_grad_(name in now)
        while len(losses) < end:
            step = len(losses)
            example = examples[epoch_order(20, 42, step // 20)[step % 20]]
            ids = torch.tensor([example.token_ids])
            logits = model(input_ids=ids).logits[0, example.answer_start - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, example.answer_start :])
            loss.backward()
            for name in now:
                masters[name].grad = weights[name].grad.float()
            torch.nn.utils.clip_grad_norm_([masters[name] for name in now], 1.0)
            factor = step / 3 if step < 3 else (STEPS - step) / (STEPS - 3)
            for group in optimizer.param_groups:
                group["lr"] = LR * factor
            optimizer.step()
            for name in now:
                weights[name].data.copy_(masters[name])
                weights[name].grad = masters[name].grad = None
            losses.append(loss.item())
    return losses, {name: masters[name].detach() for name in joined}


def delta_of(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return masters_of(run / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module", autouse=True)
def products_that_round_as_a_plain_loops() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.training.gradient_choice.float32_is_faster", lambda: False)
        patch.setattr("toolkit.training.gradient_choice.blocks_are_faster", lambda *_: False)
        yield


@pytest.fixture(scope="module")
def unfrozen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradual unfreezing in bfloat16, with a checkpoint every four steps, so that two of them are at borders."""
    run = tmp_path_factory.mktemp("unfrozen") / "run"
    every = ("--output.save_every_steps", 4, "--output.keep", 99)
    bfloat16 = ("--model.dtype", "bfloat16", "--optim.eps", BFLOAT16_EPSILON)
    assert train(*flags(tiny_model, run, UNFREEZING, *bfloat16, *every)) == 0
    return run


@pytest.fixture(scope="module")
def frozen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Progressive freezing in float32."""
    run = tmp_path_factory.mktemp("frozen") / "run"
    every = ("--output.save_every_steps", 7, "--output.keep", 99)
    assert train(*flags(tiny_model, run, FREEZING, *every)) == 0
    return run


@pytest.mark.parametrize("phases", [UNFREEZING, BACK_AGAIN], ids=["unfreezing", "back again"])
def test_every_step_is_that_of_a_plain_loop_with_the_same_phases(
    tiny_model: Path, tmp_path: Path, phases: Phases
) -> None:
    expected, masters = plain(tiny_model, "float32", phases)
    assert train(*flags(tiny_model, tmp_path / "run", phases)) == 0
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "run"), expected, strict=True)) < 1e-5
    trained = delta_of(tmp_path / "run")
    assert set(trained) == set(masters)
    assert all(torch.allclose(trained[name], masters[name], atol=2e-5) for name in masters)


def test_progressive_freezing_is_that_of_a_plain_loop_too(tiny_model: Path, frozen: Path) -> None:
    expected, masters = plain(tiny_model, "float32", FREEZING)
    assert max(abs(a - b) for a, b in zip(metrics(frozen), expected, strict=True)) < 1e-5
    trained = delta_of(frozen)
    assert set(trained) == set(masters)
    assert all(torch.allclose(trained[name], masters[name], atol=2e-5) for name in masters)


def test_bfloat16_masters_go_from_phase_to_phase(tiny_model: Path, unfrozen: Path) -> None:
    expected, masters = plain(tiny_model, "bfloat16", UNFREEZING, BFLOAT16_EPSILON)
    assert rms(metrics(unfrozen), expected) < BFLOAT16_LOSS
    trained = delta_of(unfrozen)
    assert set(trained) == set(masters)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in trained.values()), "these are not rounded copies"
    moved = max(float((trained[name] - masters[name]).abs().max()) for name in masters)
    assert moved < LR / 4, "all phases together are apart by less than a quarter of a full step"


def test_what_stops_training_stays_as_it_is_and_stays_in_the_checkpoints(frozen: Path) -> None:
    first, second, last = (delta_of(frozen, step) for step in (7, 20, STEPS))
    assert set(first) == set(second) == set(last)
    stopped = [name for name in last if SELECTED["last:4"](name) and not SELECTED["last:2"](name)]
    assert stopped
    for name in stopped:
        assert torch.equal(first[name], last[name]), name
    for name in set(last) - set(stopped):
        assert not torch.equal(first[name], second[name]), name
        assert torch.equal(second[name], last[name]) != (name == "lm_head.weight"), name


@pytest.mark.parametrize("step", [4, 8, 12, 20, 24])
def test_a_run_goes_on_exactly_from_any_phase_and_border(unfrozen: Path, step: int) -> None:
    before = metrics(unfrozen)
    masters = delta_of(unfrozen)
    (unfrozen / "checkpoints" / "latest").write_text(f"step-{step:08d}")
    assert train("--config", str(unfrozen / "config.yaml")) == 0
    assert metrics(unfrozen) == before
    assert all(torch.equal(tensor, masters[name]) for name, tensor in delta_of(unfrozen).items())


def test_a_tensor_that_rested_goes_on_exactly_after_a_restart(tiny_model: Path, tmp_path: Path) -> None:
    """At step 12 the last blocks rest, and their masters are in the checkpoint alone."""
    run = tmp_path / "run"
    every = ("--output.save_every_steps", 12, "--output.keep", 99, "--model.dtype", "bfloat16")
    assert train(*flags(tiny_model, run, BACK_AGAIN, *every)) == 0
    before, masters = metrics(run), delta_of(run)
    (run / "checkpoints" / "latest").write_text("step-00000012")
    assert train(*flags(tiny_model, run, BACK_AGAIN, *every)) == 0
    assert metrics(run) == before
    assert all(torch.equal(tensor, masters[name]) for name, tensor in delta_of(run).items())


def test_each_phase_holds_what_it_trains_and_nothing_more(tiny_model: Path, tmp_path: Path) -> None:
    trainer = set_up(invocation(*flags(tiny_model, tmp_path, UNFREEZING, "--model.dtype", "bfloat16")), World())
    boundaries, sizes = [], []
    for phase in trainer.context.schedule.phases:
        assert trainer.state.phase is phase
        boundaries.append(trainer.state.mask.boundary)
        sizes.append(sum(p.numel() for p in trainer.state.suffix.parameters() if p.requires_grad))
        assert (
            sizes[-1]
            == trainer.state.mask.parameters
            == sum(t.numel() for t in trainer.state.engine.masters().values())
        )
        if phase is not trainer.context.schedule.phases[-1]:
            _one_update(trainer)
            ended = weakref.ref(trainer.state.engine)
            trainer.next_phase()
            assert ended() is None, "nothing keeps the optimizer of a phase that is over"
    assert boundaries == [6, 4, 2]
    assert sizes == [512 * 32, 512 * 32 + 2 * 9280, 512 * 32 + 4 * 9280]
    assert trainer._model._loaded is None, "nothing will need the whole model again"
    assert trainer.state.resting == {}


def _one_update(trainer: Trainer) -> None:
    batches = next(
        iter(step_batches(trainer.context.dataset.train, range(20), trainer.context.batch_plan, trainer.context.pad_id))
    )
    train_step(batches, trainer.state.prefix, trainer.state.engine, trainer.context.world)


def test_the_run_tells_its_phases(unfrozen: Path) -> None:
    assert metrics(unfrozen, "trained_parameters") == [16384] * 8 + [34944] * 12 + [53504] * 10
    phases = json.loads((unfrozen / "schedule.json").read_text())
    assert [(p["first_step"], p["last_step"], p["boundary"]) for p in phases] == [(1, 8, 6), (9, 20, 4), (21, 30, 2)]
    mask = json.loads((unfrozen / "mask.json").read_text())
    assert (mask["boundary"], mask["tied"], len(mask["trainable"])) == (2, "untie", 37)
    plan = json.loads((unfrozen / "plan.json").read_text())
    assert [phase["end"] for phase in plan["schedule"]] == ["step 8", "step 20", "the end"]
    assert plan["memory"]["peak"] == max(phase["peak"] for phase in plan["schedule"])
    assert plan["mask"]["boundary"] == 2
    board = EventAccumulator(str(unfrozen / "tensorboard"))
    board.Reload()
    shown = {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors("mask/text_summary")}
    assert {0, 8, 20} <= set(shown)
    assert "| blocks 4–5 | 18 | 18,560 | trained |" in shown[8]


def test_the_head_is_untied_from_the_start_though_it_trains_later(tiny_model: Path, tmp_path: Path) -> None:
    trainer = set_up(invocation(*flags(tiny_model, tmp_path, BACK_AGAIN), "--prefix.cache", "off"), World())
    assert trainer.state.mask.tied == "untie"
    assert "lm_head.weight" not in trainer.state.mask.names
    assert isinstance(trainer.state.prefix, Prefix)
    shared = {p.untyped_storage().data_ptr() for p in trainer.state.prefix.parameters()}
    head = trainer.state.suffix.model.lm_head.weight
    assert head.untyped_storage().data_ptr() not in shared


@pytest.mark.parametrize("tied", ["both", "head_only"])
def test_the_other_policies_for_tied_heads_hold_in_the_phases_that_train_them(
    tiny_model: Path, tmp_path: Path, tied: str
) -> None:
    run = tmp_path / "run"
    given = flags(tiny_model, run, BACK_AGAIN, "--mask.tied", tied, "--output.save_every_steps", 5)
    assert train(*given, "--output.keep", "99") == 0
    boundaries = [phase["boundary"] for phase in json.loads((run / "schedule.json").read_text())]
    assert boundaries == ([4, 0, 0] if tied == "both" else [4, 1, 4])
    before = metrics(run)
    (run / "checkpoints" / "latest").write_text("step-00000020")
    assert train(*given, "--output.keep", "99") == 0
    assert metrics(run) == before
    export_model(run, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is True
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).named_parameters())
    assert torch.equal(exported["model.embed_tokens.weight"], delta_of(run)["model.embed_tokens.weight"])


def test_a_scheduled_run_is_evaluated_and_exported_with_all_that_ever_trained(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run, FREEZING, "--data.validation", "0.25")) == 0
    found = toolkit.evaluate(run)
    assert found.loss == pytest.approx(metrics(run, "eval_loss")[-1], abs=1e-6)
    export_model(run, tmp_path / "export")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    trained = delta_of(run)
    assert len(trained) == 37
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained.get(name, base.get(name))), name
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| blocks 2–5 | 36 | 37,120 | trained |" in card
    assert "until_step: 7" in card


def test_a_checkpoint_of_another_schedule_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    every = ("--output.save_every_steps", 4, "--output.keep", 99)
    assert train(*flags(tiny_model, run, UNFREEZING, *every)) == 0
    (run / "checkpoints" / "latest").write_text("step-00000012")
    later = ((8, ["head"]), (22, ["last:2", "head"]), UNFREEZING[2])
    with pytest.raises(CheckpointError, match=r"mask\.schedule was .*'until_step': 20.* is now .*'until_step': 22"):
        train(*flags(tiny_model, run, later, *every))
    state = run / "checkpoints" / "step-00000012" / "state.json"
    state.write_text(state.read_text().replace('"until_step": 20', '"until_step": 22'))
    reseal(state.parent)
    with pytest.raises(CheckpointError, match=r"it was trained under another mask\.schedule"):
        train(*flags(tiny_model, run, later, *every))
