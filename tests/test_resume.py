"""Going on: exactly, on any layout, and never with something else than what was trained."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_parts import copy_of, edit_state, point_to, recut
from helpers import ENGLISH, make_tiny_model, make_tokenizer, masters_of, metrics, reseal, run_here, tiny_flags, train

from toolkit.checkpoint.state import read_state
from toolkit.inference.open_model import load_delta, open_model, read_trained
from toolkit.models.weight_fingerprint import fingerprint
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.file_lock import RunLock
from toolkit.training import validation
from toolkit.training.monitor import Monitor

SHORT = ("--train.max_steps", 6, "--output.save_every_steps", 2, "--output.keep", 9, "--mask.train", "last:2", "head")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps of four rows, with a checkpoint every two."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*flags(tiny_model, run)) == 0
    return run


def flags(model: Path, run: Path, *more: object) -> list[str]:
    return tiny_flags(model, run, *SHORT, "--train.gradient_accumulation_steps", 4, *more)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, as if it had been killed after four steps."""
    copy = copy_of(whole, tmp_path)
    point_to(copy, 4)
    return copy


def final(run: Path) -> dict[str, torch.Tensor]:
    return masters_of(run / "checkpoints" / "step-00000006")


def test_a_checkpoint_says_what_it_is(whole: Path) -> None:
    checkpoint = whole / "checkpoints" / "step-00000006"
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert names == {
        "MANIFEST.json", "state.json", "mask.json", "base.json", "rng-00000-of-00001.json",
        "optimizer/rank-00000-of-00001.safetensors", "optimizer/rank-00000-of-00001.json",
    }  # fmt: skip
    state = read_state(checkpoint)
    assert (state.step, state.total_steps, state.epoch, state.cursor, state.rows) == (6, 6, 1, 4, 20)
    assert (state.global_batch, state.phase, state.schedule_step, state.engine, state.ranks) == (4, 0, 6, "local", 1)
    assert set(state.fingerprints) == {"data", "tokenizer", "chat_template", "base", "schedule"}
    assert all(len(digest) == 64 for digest in (*state.fingerprints.values(), state.order))
    assert state.versions["torch"] == torch.__version__.split("+")[0] or state.versions["torch"] == torch.__version__
    assert state.totals["tokens"] == sum(metrics(whole, "tokens"))
    assert (state.totals["epoch_steps"], state.totals["epoch_loss"]) == (1, metrics(whole)[-1])
    assert state.recipe["train"]["learning_rate"] == 1e-3
    mask = json.loads((checkpoint / "mask.json").read_text())
    assert mask["trainable"][0] == {
        "name": "model.layers.4.self_attn.q_proj.weight", "shape": [32, 32], "dtype": "float32",
    }  # fmt: skip
    shard = checkpoint / "optimizer" / "rank-00000-of-00001.safetensors"
    elements = sum(torch.Size(tensor["shape"]).numel() for tensor in mask["trainable"])
    assert 12 * elements < shard.stat().st_size < 12 * elements + 20_000, "a master and two moments of each element"


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_state_that_any_number_of_ranks_wrote_goes_on_bit_for_bit(
    tiny_model: Path, run: Path, whole: Path, ranks: int
) -> None:
    recut(run / "checkpoints" / "step-00000004", ranks)
    assert train(*flags(tiny_model, run, "--output.resume", "must")) == 0
    assert metrics(run) == metrics(whole)
    expected = final(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final(run).items())


def test_twice_in_a_row_from_every_checkpoint_ends_the_same(tiny_model: Path, run: Path, whole: Path) -> None:
    for step in (4, 2, 4):
        point_to(run, step)
        assert train(*flags(tiny_model, run)) == 0
        assert metrics(run) == metrics(whole)
        assert metrics(run, "step") == [1, 2, 3, 4, 5, 6]


def test_the_rows_of_a_step_may_be_dealt_otherwise(tiny_model: Path, run: Path, whole: Path) -> None:
    dealt = ("--train.gradient_accumulation_steps", 2, "--train.micro_batch_size", 2)
    assert train(*flags(tiny_model, run, *dealt)) == 0
    assert metrics(run) == pytest.approx(metrics(whole), abs=1e-5)


def test_other_rows_a_step_are_refused_and_overridden_go_on_with_the_next_row(tiny_model: Path, run: Path) -> None:
    more = ("--train.gradient_accumulation_steps", 6, "--train.max_steps", "none", "--train.epochs", 2)
    with pytest.raises(CheckpointError, match=r"a step took 4 rows, takes 6 now .* would be others"):
        train(*flags(tiny_model, run, *more))
    assert train(*flags(tiny_model, run, *more, "--resume-override")) == 0
    state = read_state(run / "checkpoints" / (run / "checkpoints" / "latest").read_text())
    assert (state.step, state.epoch, state.cursor) == (9, 2, 0), "4 rows and 20 are left after step 4: 1 step and 4"
    tokens = metrics(run, "tokens")
    assert sum(tokens[:5]) == sum(tokens[5:]), "each row once in each epoch"


HARMLESS: dict[str, object] = {
    "train.learning_rate": 5e-4, "train.weight_decay": 0.5, "train.warmup_ratio": 0.5, "train.scheduler": "cosine",
    "train.max_grad_norm": 0.5, "train.gradient_checkpointing": "on", "data.packing": "off", "optim.eps": 1e-7,
    "train.reduce_dtype": "bfloat16",
}  # fmt: skip


def test_harmless_changes_are_refused_together_and_said_when_overridden(tiny_model: Path, run: Path) -> None:
    changed = [word for key, value in HARMLESS.items() for word in (f"--{key}", value)]
    with pytest.raises(CheckpointError) as error:
        train(*flags(tiny_model, run, *changed))
    for key in HARMLESS:
        assert f"{key} was " in str(error.value)
    assert "go on with these with --resume-override" in str(error.value)
    result = run_here("launch/train.py", *flags(tiny_model, run, *changed, "--resume-override"))
    assert result.returncode == 0, result.stderr
    for key in HARMLESS:
        assert f"overridden: {key} was " in result.stderr
    assert metrics(run, "learning_rate")[4] == pytest.approx(5e-4 * 0.5 * (1 + np.cos(np.pi * 1 / 3)), rel=1e-6)
    assert train(*flags(tiny_model, run, *changed)) == 0, "the new checkpoint has the new recipe"


def test_a_finished_run_may_train_for_longer(tiny_model: Path, run: Path) -> None:
    point_to(run, 6)
    assert train(*flags(tiny_model, run, "--train.max_steps", 8, "--resume-override")) == 0
    assert len(metrics(run)) == 8
    with pytest.raises(CheckpointError, match="goes on with a run that you name"):
        train(*flags(tiny_model, run, "--output.dir", "none", "--resume-override"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.seed", 7), ("mask.train", "last:3"), ("mask.tied", "both"), ("data.max_length", 99)],
)
def test_no_override_goes_on_with_another_run(tiny_model: Path, run: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"{key} was .*\nChoose another --output\.dir"):
        train(*flags(tiny_model, run, f"--{key}", value, "--resume-override"))


def test_where_output_goes_and_how_often_is_nobodys_business(tiny_model: Path, run: Path, whole: Path) -> None:
    assert train(*flags(tiny_model, run, "--output.save_every_steps", 5, "--output.keep", 1)) == 0
    assert metrics(run) == metrics(whole)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000006"]


def test_each_identity_that_changed_is_refused_in_its_own_words(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    run = tmp_path / "run"
    assert train(*flags(model, run)) == 0
    checkpoint = point_to(run, 4)
    tokenizer = make_tokenizer(template="{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    tokenizer.save_pretrained(model)
    with pytest.raises(CheckpointError) as error:
        train(*flags(model, run))
    assert "the rows, or the ids that this version makes of them, have changed since" in str(error.value)
    assert "the chat template has changed since" in str(error.value)
    assert "the tokenizer has changed since" not in str(error.value)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["never seen"])
    tokenizer.save_pretrained(model)
    with pytest.raises(CheckpointError) as error:
        train(*flags(model, run))
    assert "the tokenizer has changed since" in str(error.value)
    assert "the rows, or" not in str(error.value)
    make_tokenizer().save_pretrained(model)
    edit_state(checkpoint, order="0" * 64)
    with pytest.raises(CheckpointError, match="gives epoch 1 another order of rows"):
        train(*flags(model, run))


def test_a_mask_of_the_same_size_is_another_mask(tiny_model: Path, run: Path) -> None:
    """What DeepSpeed loads into the wrong layers without a word (docs/checkpoint.md)."""
    checkpoint = run / "checkpoints" / "step-00000004"
    recipe = read_state(checkpoint).recipe
    recipe["mask"]["train"] = ["blocks:2-3", "head"]
    edit_state(checkpoint, recipe=recipe)
    with pytest.raises(CheckpointError, match="it was trained with another mask: 18 tensors only there"):
        train(*flags(tiny_model, run, "--mask.train", "blocks:2-3", "head"))
    mask = checkpoint / "mask.json"
    mask.write_text(mask.read_text().replace("layers.4.", "layers.2.").replace("layers.5.", "layers.3."))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="is not in the mask"):
        train(*flags(tiny_model, run, "--mask.train", "blocks:2-3", "head"))


def test_the_generators_of_every_library_go_on_where_they_were(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, ...]] = []
    original = Monitor.step

    def draw(self: Monitor, row: Any) -> None:
        original(self, row)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    monkeypatch.setattr(Monitor, "step", draw)
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run)) == 0
    point_to(run, 4)
    random.seed(1)
    np.random.seed(1)
    assert train(*flags(tiny_model, run)) == 0
    assert drawn[6:] == drawn[4:6]


def test_a_finished_run_says_so_before_anything_is_loaded(
    tmp_path: Path, whole: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.training.run.prepare", lambda *_: pytest.fail("it was loaded"))
    assert train(*flags(tiny_model, whole)) == 0


def test_a_finished_run_removes_what_a_kill_before_its_pruning_has_left(tiny_model: Path, run: Path) -> None:
    point_to(run, 6)
    (run / "checkpoints" / ".step-00000002.removed").mkdir()
    assert train(*flags(tiny_model, run, "--output.keep", 1)) == 0
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step-00000006"}


def test_a_run_that_could_not_begin_leaves_no_directory(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"nothing\.jsonl"):
        train(*flags(tiny_model, tmp_path / "new" / "run", "--data.path", tmp_path / "nothing.jsonl"))
    assert not (tmp_path / "new").exists()


def test_the_best_checkpoint_stays_beside_the_newest(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    losses = iter((3.0, 2.0, 2.5))
    evaluate = validation.evaluate_rows
    monkeypatch.setattr(validation, "evaluate_rows", lambda *given: replace(evaluate(*given), loss=next(losses)))
    often = ("--data.validation", 0.25, "--output.evaluate_every_steps", 2, "--output.keep", 1)
    assert train(*flags(tiny_model, run, *often)) == 0
    assert (run / "checkpoints" / "best").read_text() == "step-00000004"
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"latest", "best", "step-00000004", "step-00000006"}


def test_who_holds_a_directory_is_named_and_whoever_has_ended_holds_nothing(
    tiny_model: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock = RunLock.take(run)
    assert isinstance(lock, RunLock)
    monkeypatch.delenv("SLURM_JOB_ID")
    expected = rf"is being written by another run: process {os.getpid()} on .* \(SLURM job 77\), which began 2"
    with pytest.raises(CheckpointError, match=expected):
        train(*flags(tiny_model, run))
    lock.release()
    lock.release()
    (run / ".lock").write_text('{"host": "elsewhere", "pid": 1, "started": 0, "job": null}')
    assert train(*flags(tiny_model, run)) == 0


def test_weights_alone_start_a_new_run_under_another_mask(tiny_model: Path, run: Path, tmp_path: Path) -> None:
    """And what that run gives goes back to the original model and the first delta."""
    new = tmp_path / "new"
    given = ("--model.delta", run, "--mask.train", "blocks:3", "--mask.tied", "error", "--train.max_steps", 2)
    assert train(*flags(tiny_model, new, *given)) == 0
    first, second = read_trained(run), read_trained(new)
    assert first.base.sha256 != second.base.sha256
    parameters = dict(open_model(str(new)).loaded.model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in {**first.tensors, **second.tensors}.items())
    assert fingerprint(load_delta(second).model) == fingerprint(
        open_model(str(new / "checkpoints" / "step-00000002")).loaded.model
    )
    third = tmp_path / "third"
    assert train(*flags(tiny_model, third, "--model.delta", new, "--train.max_steps", 1)) == 0, "a chain of two"
    with pytest.raises(CheckpointError, match="is not a run directory, a checkpoint or a delta"):
        train(*flags(tiny_model, tmp_path / "fourth", "--model.delta", ENGLISH))
    with pytest.raises(CheckpointError, match="were trained on other weights"):
        train(*flags(tiny_model, tmp_path / "fourth", "--model.delta", run, "--model.dtype", "bfloat16"))
