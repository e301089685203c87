"""The whole loop in one process: it learns what a plain loop learns, writes what it says, and resumes exactly."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import (
    ENGLISH,
    QUICKSTART,
    REFERENCE_MASK,
    invocation,
    make_tiny_model,
    masters_of,
    metrics,
    set_up,
    tiny_flags,
    train,
)
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from benchmarks.plain_loop import plain_loop
from benchmarks.record import SAME_LEARNING, rms
from benchmarks.workload import Workload
from toolkit.config.flags import create_parser, parse
from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.batches import epoch_order, step_batches
from toolkit.data.dataset import load_dataset
from toolkit.models.float32_gradients import bfloat16_is_emulated
from toolkit.models.load import load, load_tokenizer
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.split.prefix import Prefix
from toolkit.training import cut
from toolkit.training.monitor import Monitor
from toolkit.training.step import train_step


@contextmanager
def quick_products() -> Iterator[None]:
    """Where bfloat16 is emulated, compute a plain loop's products in float32 and round them once.

    The emulation does the same, but for the order of its sums, and takes 15 minutes for 60 steps.
    """
    linear = torch.nn.functional.linear

    def rounded(states: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        return linear(states.float(), weight.float(), None if bias is None else bias.float()).to(states.dtype)

    with pytest.MonkeyPatch.context() as patch:
        if bfloat16_is_emulated():
            patch.setattr(torch.nn.functional, "linear", rounded)
        yield


def plain(config: ModelConfig, lr: float, epochs: int) -> list[float]:
    """Step losses of the plain loop on the English sample, with a head of its own."""
    model = load(config).model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    examples = load_dataset(DataConfig(path=str(ENGLISH)), load_tokenizer(config), 42).train
    rows = [(list(example.token_ids), example.answer_start) for example in examples]
    orders = [epoch_order(len(rows), 42, epoch) for epoch in range(epochs)]
    workload = Workload(config.name_or_path, str(ENGLISH), rows, orders, 42, lr)
    return plain_loop(model, workload, fp32_masters=config.dtype == "bfloat16").losses


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> list[float]:
    """Step losses of the plain loop in float32 over three epochs."""
    return plain(ModelConfig(name_or_path=str(tiny_model), dtype="float32"), 1e-3, 3)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs that held a quarter of the rows out."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(*tiny_flags(tiny_model, run, "--data.validation", "0.25", "--output.keep", "2")) == 0
    return run


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_every_step_has_the_loss_of_a_plain_loop(
    tiny_model: Path, tmp_path: Path, reference: list[float], checkpointing: str
) -> None:
    run = tmp_path / "run"
    assert train(*tiny_flags(tiny_model, run, "--train.gradient_checkpointing", checkpointing)) == 0
    losses = metrics(run)
    assert len(losses) == len(reference) == 60
    assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) < 1e-5
    assert sum(losses[40:]) < sum(losses[:20])


@pytest.mark.slow
@pytest.mark.real_model
def test_bfloat16_with_masters_learns_what_the_plain_loop_with_masters_learns(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--data.path", str(ENGLISH), "--data.validation", "none", "--output.dir", str(run))
    assert train(*flags, *REFERENCE_MASK, "--train.learning_rate", "1e-5") == 0
    losses = metrics(run)
    with quick_products():
        expected = plain(ModelConfig(), 1e-5, 3)
    assert len(losses) == len(expected) == 60
    assert rms(losses, expected) < SAME_LEARNING
    assert sum(losses[40:]) < sum(losses[:20])


def test_a_global_batch_learns_the_same_however_it_is_dealt(tiny_model: Path, tmp_path: Path) -> None:
    losses = []
    for micro, accumulation in ((1, 4), (2, 2), (4, 1)):
        run = tmp_path / f"{micro}"
        flags = ("--train.micro_batch_size", micro, "--train.gradient_accumulation_steps", accumulation)
        assert train(*tiny_flags(tiny_model, run, *flags, "--train.epochs", 2, "--mask.train", "last:2")) == 0
        losses.append(metrics(run))
    assert len(losses[0]) == 10
    for other in losses[1:]:
        assert max(abs(a - b) for a, b in zip(losses[0], other, strict=True)) < 1e-5


def test_a_model_that_cannot_be_cut_trains_whole_and_the_same(
    tiny_model: Path, tmp_path: Path, reference: list[float], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(cut, "split_is_exact", lambda *_: False)
    run = tmp_path / "run"
    assert train(*tiny_flags(tiny_model, run, "--train.max_steps", 60, "--prefix.cache_dir", tmp_path / "cache")) == 0
    assert max(abs(a - b) for a, b in zip(metrics(run), reference, strict=True)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_tensors_stay_bit_identical_and_every_trained_master_moves(
    tiny_model: Path, tmp_path: Path, dtype: str
) -> None:
    flags = tiny_flags(tiny_model, tmp_path, "--model.dtype", dtype, "--prefix.cache", "off")
    trainer = set_up(invocation(*flags), World())
    before = trainer.state.engine.masters()
    assert before
    before = {name: tensor.clone() for name, tensor in before.items()}
    order = epoch_order(trainer.context.batch_plan.rows, 42, 0)
    for micro_batches in step_batches(
        trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id
    ):
        train_step(micro_batches, trainer.state.prefix, trainer.state.engine, World())
    after = trainer.state.engine.masters()
    assert set(after) == set(trainer.state.mask.names)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    original = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype)).named_parameters())
    assert isinstance(trainer.state.prefix, Prefix)
    parts = {
        **dict(trainer.state.prefix.model.named_parameters()),
        **dict(trainer.state.suffix.model.named_parameters()),
    }
    frozen = set(parts) - set(trainer.state.mask.names)
    assert len(frozen) == 20
    assert all(torch.equal(parts[name], original[name]) for name in frozen)
    for name in trainer.state.mask.names:
        assert torch.equal(parts[name], after[name].to(parts[name].dtype))


def test_the_run_directory_holds_what_the_design_names(finished: Path) -> None:
    present = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert present == {
        "config.yaml",
        "mask.json",
        "plan.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "data_files.json",
        "record.json",
    }
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names == {"latest", "best", "step-00000030", "step-00000045"}
    assert (finished / "checkpoints" / "latest").read_text() == "step-00000045"
    mask = json.loads((finished / "mask.json").read_text())
    assert (mask["boundary"], len(mask["trainable"])) == (2, 37)


def test_metrics_have_one_object_a_step_with_the_documented_keys(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 46))
    assert set(steps[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "supervised_tokens", "tokens", "seconds",
        "tokens_per_second", "trained_parameters", "peak_memory_gib", "skipped", "moved_share", "cache_hit_share",
    }  # fmt: skip
    assert [row["step"] for row in rows if "eval_loss" in row] == [15, 30, 45]
    assert all(set(row) == {"step", "epoch", "eval_loss", "eval_perplexity"} for row in rows if "loss" not in row)
    rates = [row["learning_rate"] for row in steps]
    assert rates[0] == 0
    assert max(rates) == rates[5] == 1e-3
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_tensorboard_tells_the_story_of_the_run(finished: Path) -> None:
    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    assert len(board.Scalars("train/loss")) == 45
    epochs = [event.value for event in board.Scalars("train/epoch_loss")]
    losses = metrics(finished)
    assert epochs == pytest.approx([sum(losses[e * 15 : e * 15 + 15]) / 15 for e in range(3)], abs=1e-6)
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert "| blocks 2–5 | 36 | 37,120 | trained |" in texts["mask/text_summary"]
    assert "learning_rate: 0.001" in texts["recipe/text_summary"]


def test_the_saved_recipe_continues_the_run(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert train("--config", str(finished / "config.yaml")) == 0
    assert (finished / "metrics.jsonl").read_bytes() == before


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGUSR1) -> None:
    original = Monitor.step

    def log_then_signal(self: Monitor, row: Any) -> None:
        original(self, row)
        if row.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Monitor, "step", log_then_signal)


@pytest.mark.parametrize(("step", "number"), [(7, signal.SIGUSR1), (15, signal.SIGTERM), (31, signal.SIGUSR1)])
def test_a_run_stopped_by_a_signal_goes_on_exactly_where_it_was(
    tiny_model: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int
) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--data.validation", "0.25")
    with monkeypatch.context() as patch:
        stop_at(step, patch, number)
        assert train(*flags) == 75
    assert len(metrics(tmp_path / "run")) == step
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    assert metrics(tmp_path / "run", "eval_loss") == metrics(finished, "eval_loss")
    tensors, expected = (masters_of(run / "checkpoints" / "step-00000045") for run in (tmp_path / "run", finished))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_killed_run_goes_on_from_its_last_checkpoint_without_double_rows(
    tiny_model: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--data.validation", "0.25", "--output.save_every_steps", 4)
    original = Monitor.step

    def fail(self: Monitor, row: Any) -> None:
        original(self, row)
        if row.step == 10:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", fail)
        with pytest.raises(RuntimeError, match="killed"):
            train(*flags)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000008"
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    assert metrics(tmp_path / "run", "step")[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_a_directory_with_another_recipe_is_refused_and_the_differences_listed(
    tiny_model: Path, finished: Path
) -> None:
    flags = tiny_flags(tiny_model, finished, "--data.validation", "0.25", "--train.seed", "7", "--train.epochs", "9")
    with pytest.raises(CheckpointError) as error:
        train(*flags)
    assert "train.seed was 42, is now 7" in str(error.value)
    assert "train.epochs was 3, is now 9" in str(error.value)
    assert "--output.dir" in str(error.value)


def test_resume_must_and_never_mean_it(tiny_model: Path, tmp_path: Path, finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"resume is must, but .* holds no checkpoint"):
        train(*tiny_flags(tiny_model, tmp_path / "new", "--output.resume", "must"))
    with pytest.raises(CheckpointError, match=r"resume is never, but .* holds step-00000045"):
        train(*tiny_flags(tiny_model, finished, "--data.validation", "0.25", "--output.resume", "never"))


def test_a_directory_in_use_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(CheckpointError, match="being written by another run"):
        train(*tiny_flags(tiny_model, tmp_path / "run"))


def test_without_a_directory_runs_are_numbered_and_an_interrupted_one_is_continued(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags(tiny_model, tmp_path, "--train.epochs", "1", "--output.dir", "none")
    assert train(*flags) == 0
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert train(*flags) == 75
    assert train(*flags) == 0
    other = parse(create_parser(""), QUICKSTART, [*flags, "--train.seed", "3"])
    from toolkit.training.run import run

    assert run(other) == 0
    assert {path.name: len(metrics(path)) for path in (tmp_path / "runs").iterdir()} == {
        "quickstart": 20,
        "quickstart-2": 20,
        "quickstart-3": 20,
    }


def test_changed_rows_and_changed_base_weights_are_refused(tmp_path: Path) -> None:
    model, data = make_tiny_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(rows), encoding="utf-8")
    flags = tiny_flags(model, tmp_path / "run", "--data.path", data, "--output.save_every_steps", 3, "--output.keep", 9)
    assert train(*flags, "--train.max_steps", "6") == 0
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-00000003")
    data.write_text("\n".join(reversed(rows)), encoding="utf-8")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        train(*flags, "--train.max_steps", "6")
    assert "the weights of the base model have changed since (SHA-256 " in str(error.value)
    assert "the rows, or the ids that this version makes of them, have changed since (SHA-256 " in str(error.value)
    assert "--model.delta" in str(error.value)


def test_resume_must_finds_the_interrupted_run_among_numbered_ones(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags(tiny_model, tmp_path, "--train.max_steps", "4", "--output.dir", "none")
    with pytest.raises(CheckpointError, match="no directory up to runs/quickstart holds an interrupted run"):
        train(*flags, "--output.resume", "must")
    assert train(*flags) == 0
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert train(*flags) == 75
    assert train(*flags, "--output.resume", "must") == 0
    assert len(metrics(tmp_path / "runs" / "quickstart-2")) == 4


def test_saving_and_evaluating_every_few_steps(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    every = ("--output.save_every_steps", 3, "--output.evaluate_every_steps", 4, "--output.keep", 9)
    assert train(*tiny_flags(tiny_model, run, *every, "--train.max_steps", 10, "--data.validation", "0.25")) == 0
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert saved == ["step-00000003", "step-00000006", "step-00000009", "step-00000010"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 10]
