"""Never a worse checkpoint over a better one, a reader during rotation gets a whole one, and JSON is valid JSON."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENGLISH, make_tokenizer, metrics, tiny_flags, tiny_llama, train
from test_trouble import fail_at, masters

from toolkit.checkpoint import catalog, choice
from toolkit.checkpoint.choice import choose_checkpoint, find_checkpoint
from toolkit.checkpoint.manifest import verify
from toolkit.checkpoint.validation_score import read_validation_score
from toolkit.inference.open_model import read_trained
from toolkit.runtime.errors import CheckpointError, TrainingStoppedError
from toolkit.runtime.json_text import to_json

OFTEN = ("--output.save_every_steps", 1, "--output.keep", 1, "--mask.train", "norm", "head")


def latest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text()


def test_a_skipped_step_at_the_end_takes_no_checkpoints_place(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    run = tmp_path / "run"
    fail_at(monkeypatch, 4)
    assert train(*tiny_flags(tiny_model, run, *OFTEN, "--train.max_steps", 4, "--data.validation", "0.25")) == 0
    assert latest(run) == "step-00000003"
    assert [path.name for path in catalog.checkpoints_of(run)] == ["step-00000003"]
    score = read_validation_score(run / "checkpoints" / "step-00000003")
    assert score is not None
    assert [score.loss] == metrics(run, "eval_loss"), "it has the weights that were validated"
    assert [line for line in said if "step 4: no checkpoint is written" in line]


def test_a_run_whose_steps_were_all_skipped_fails(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fail_at(monkeypatch, 1, 2)
    with pytest.raises(TrainingStoppedError, match=r"all 2 steps were skipped: nothing was learned.*line \d+"):
        train(*tiny_flags(tiny_model, run, *OFTEN, "--train.max_steps", 2))
    assert catalog.checkpoints_of(run) == []


@pytest.mark.parametrize("every", [1, 4])
def test_weights_that_know_nothing_any_more_are_not_saved(trained_model: Path, tmp_path: Path, every: int) -> None:
    """Finite loss, finite weights: what a rate a million times too high leaves."""
    run = tmp_path / "run"
    flags = tiny_flags(trained_model, run, *OFTEN, "--train.max_steps", 4, "--train.warmup_ratio", "0")
    assert train(*flags) == 0
    before = masters(run)
    more = ("--train.max_steps", 8, "--train.learning_rate", "1e3", "--train.max_grad_norm", "1e9")
    with pytest.raises(TrainingStoppedError, match=r"step-00000004, is kept") as stopped:
        train(*flags, *map(str, more), "--output.save_every_steps", str(every), "--resume-override")
    assert "have lost what they knew" in str(stopped.value) or "no finite loss" in str(stopped.value)
    assert latest(run) == "step-00000004"
    assert all(torch.equal(before[name], tensor) for name, tensor in masters(run).items())


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the rows: its loss is far below that of a uniform distribution."""
    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = tiny_llama(tied=False), make_tokenizer()
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    text = tokenizer(" ".join(row["LONG_ANSWER"] for row in rows), return_tensors="pt").input_ids
    counts = torch.bincount(text.flatten(), minlength=512).float() + 0.05
    with torch.no_grad():  # answers by the frequency of tokens alone: a direction that every state has
        model.lm_head.weight.mul_(0.01)
        model.lm_head.weight[:, 0] = counts.log() - counts.log().mean()
        model.model.embed_tokens.weight[:, 0] = 60.0
        model.model.norm.weight[0] = 1 / math.sqrt(32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_weight_that_is_not_finite_is_never_saved(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows in no loss: no row has that token."""
    from toolkit.training import trainer

    run, step = tmp_path / "run", trainer.train_step

    def spoils(batches: Any, prefix: Any, engine: Any, *more: Any) -> Any:
        result = step(batches, prefix, engine, *more)
        fragment = next(part for part in engine.fragments() if part.name.endswith("norm.weight"))
        values = fragment.state.read()["master"].clone()
        values[0] = math.inf
        if len(catalog.checkpoints_of(run)) == 1:
            fragment.state.write({"master": values}, fragment.state.updates)
        return result

    monkeypatch.setattr(trainer, "train_step", spoils)
    with pytest.raises(TrainingStoppedError, match=r"after step 2 hold NaN or infinity in model\.norm\.weight"):
        train(*tiny_flags(tiny_model, run, *OFTEN, "--train.max_steps", 4))
    assert latest(run) == "step-00000001"


def test_a_validation_that_is_not_finite_names_its_rows(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from toolkit.inference import evaluation

    loss, seen = evaluation.supervised_loss, list[str]()

    def faulty(forward: Any, hidden: Any, batch: Any, tokens: int) -> torch.Tensor:
        seen.extend(row.origin for row in batch.examples)
        return loss(forward, hidden, batch, tokens) * (math.nan if len(seen) == 3 else 1.0)

    monkeypatch.setattr(evaluation, "supervised_loss", faulty)
    run = tmp_path / "run"
    flags = tiny_flags(tiny_model, run, *OFTEN, "--train.max_steps", 1, "--data.validation", "0.25")
    assert train(*flags) == 0
    assert [line for line in said if line.endswith(f"the micro batches of: {seen[2]}")]
    assert metrics(run, "eval_loss") == [None]
    for path in (*run.rglob("*.json"), *run.rglob("*.jsonl")):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=pytest.fail)


def test_json_has_null_for_what_is_not_finite() -> None:
    value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}, "d": "NaN"}
    assert to_json(value) == '{"a": [null, [null, 1.5]], "b": {"c": null}, "d": "NaN"}'
    assert to_json([1, "ü"], ensure_ascii=False, indent=1) == json.dumps([1, "ü"], ensure_ascii=False, indent=1)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("rotation") / "run"
    assert train(*tiny_flags(tiny_model, run, "--mask.train", "norm", "--train.max_steps", 3,
                             "--output.save_every_steps", 1, "--output.keep", 3)) == 0  # fmt: skip
    return run


@pytest.mark.parametrize("moment", ["verify", "latest", "scores"])
def test_a_reader_during_rotation_gets_a_whole_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Steps 1 and 2 are removed, one after the other, at the worst moments."""
    own = Path(shutil.copytree(run, tmp_path / "run"))
    folder = own / "checkpoints"
    (folder / "latest").write_text("step-00000001")
    steps = iter([2, 3])

    def rotate() -> None:
        if step := next(steps, None):
            (folder / "latest").write_text(f"step-{step:08d}")
            catalog.remove(folder / f"step-{step - 1:08d}")

    places = {"verify": "verify", "latest": "latest_checkpoint", "scores": "validation_scores"}
    original = getattr(choice, places[moment])

    def late(*given: Any) -> Any:
        if moment == "latest":
            found = original(*given)
            rotate()
            return found
        rotate()
        return original(*given)

    monkeypatch.setattr(choice, places[moment], late)
    assert read_trained(own).tensors
    assert find_checkpoint(own).is_latest
    assert verify(choose_checkpoint(own).checkpoint) is None


def test_what_is_damaged_or_missing_for_good_is_said_at_once(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    (own / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_trained(own)
    with pytest.raises(CheckpointError, match="no checkpoint of step 9"):
        choose_checkpoint(own, 9)
