"""Which checkpoint of a run is used after training, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import ENGLISH, masters_of, metrics, run_script, tiny_flags, train

import toolkit
from toolkit.checkpoint.choice import choose_checkpoint
from toolkit.exporting.run_export import export_delta, export_model
from toolkit.inference.open_model import open_model, read_trained
from toolkit.runtime.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of one step each, at a rate at which the loss grows again: the second is the best."""
    run = tmp_path_factory.mktemp("best") / "run"
    rate = ("--train.learning_rate", 0.5, "--train.scheduler", "constant_with_warmup", "--train.warmup_ratio", 0)
    flags = ("--train.micro_batch_size", 18, "--output.keep", 9, "--data.validation", "0.1", *rate)
    assert train(*tiny_flags(tiny_model, run, *flags)) == 0
    first, second, third = metrics(run, "eval_loss")
    assert second < min(first, third)
    return run


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def same(found: dict[str, torch.Tensor], step: int, run: Path) -> bool:
    return all(torch.equal(found[name], master) for name, master in masters_of(checkpoint(run, step)).items())


@pytest.mark.parametrize(("asked", "taken"), [(None, 3), ("latest", 3), ("best", 2), (1, 1)])
def test_every_command_takes_the_checkpoint_that_is_asked_for(
    run: Path, tmp_path: Path, asked: int | str | None, taken: int
) -> None:
    opened = open_model(str(run), asked)  # type: ignore[arg-type]
    assert opened.choice is not None
    assert opened.choice.step == taken
    assert opened.delta is not None
    assert same(opened.delta.tensors, taken, run)
    export_delta(run, tmp_path / "delta", step=asked)  # type: ignore[arg-type]
    assert same(read_trained(tmp_path / "delta").tensors, taken, run)
    outcome = toolkit.evaluate(run, step=asked)  # type: ignore[arg-type]
    assert outcome.step == taken
    assert outcome.loss == pytest.approx(metrics(run, "eval_loss")[taken - 1], rel=1e-5)


def test_what_is_used_is_said_with_the_better_ones_name(run: Path, said: list[str]) -> None:
    first, second, third = (f"{loss:.4f}" for loss in metrics(run, "eval_loss"))
    for step in (None, 1, "best"):
        open_model(str(run), step)  # type: ignore[arg-type]
    better = f"; best is step 2 ({second}): --step best"
    assert [line for line in said if "using" in line] == [
        f"{run}: using step 3 (latest; validation loss {third}){better}",
        f"{run}: using step 1 (validation loss {first}){better}",
        f"{run}: using step 2 (best; validation loss {second})",
    ]
    said.clear()
    read_trained(run)  # as model.delta does
    assert said[0].endswith(f": model.delta {checkpoint(run, 2)}")


def test_the_model_card_says_which_checkpoint_it_is(run: Path, tmp_path: Path) -> None:
    _, second, third = (f"{loss:.4f}" for loss in metrics(run, "eval_loss"))
    for step in ("latest", "best"):
        export_model(run, tmp_path / step, step=step)  # type: ignore[arg-type]
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    assert f"The weights are those of step 2 (best; validation loss {second})." in card
    card = (tmp_path / "latest" / "README.md").read_text(encoding="utf-8")
    assert f"step 3 (latest; validation loss {third}); best is step 2 ({second}): which was not exported." in card


def test_without_validation_there_is_no_best(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*tiny_flags(tiny_model, run, "--train.max_steps", 1)) == 0
    assert choose_checkpoint(run).advice("x") == "step 1 (latest; no validation loss)"
    with pytest.raises(CheckpointError, match=r"none is known to be the best; present: step-00000001\. Take one"):
        choose_checkpoint(run, "best")


def test_a_step_of_what_is_not_a_run_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"--step best names a checkpoint of a run directory, and .* is none"):
        open_model(str(tiny_model), "best")


def test_a_moved_base_of_a_whole_model_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"--base names the base model of a run, delta or adapter, and .* is none"):
        open_model(str(tiny_model), base=str(tiny_model))


def test_evaluate_says_its_rows_and_whether_they_were_held_out(run: Path, tmp_path: Path, said: list[str]) -> None:
    def rows(source: Path, path: Path | None) -> tuple[str, bool | None]:
        outcome = toolkit.evaluate(source, path, batch_size=4)
        assert f"evaluating on {outcome.data}" in said
        return outcome.data, outcome.held_out

    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(ENGLISH.read_text(encoding="utf-8").splitlines()[:3]), encoding="utf-8")
    held = f"2 rows that {run} held out of {ENGLISH} (data.validation 0.1)"
    assert rows(run, None) == (held, True)
    assert rows(run, ENGLISH) == (f"all 20 rows of {ENGLISH}: {run} trained on rows of it", False)
    unknown = f"all 3 rows of {other}; whether {run} trained on some of them is not known"
    assert rows(run, other) == (unknown, None)


@pytest.mark.slow
def test_the_commands_take_best_and_print_it(run: Path) -> None:
    result = run_script("launch/evaluate.py", run, "--step", "best")
    assert result.returncode == 0
    assert "using step 2 (best; validation loss" in result.stderr
    assert "supervised tokens of 2 rows" in result.stdout
    printed = json.loads(result.stdout.splitlines()[-1])
    assert (printed["step"], printed["rows"], printed["held_out"]) == (2, 2, True)
    result = run_script("launch/generate.py", run, "--step", "newest", "--question", "Why?")
    assert result.returncode == 2
    assert "'newest' is not a whole number from 1, latest or best" in result.stderr


@pytest.mark.parametrize("name", ["best", "latest", "step-00000009"])
def test_what_a_run_keeps_beside_its_checkpoints_is_none_and_the_run_is_named(run: Path, name: str) -> None:
    for opening in (lambda path: open_model(str(path)), read_trained):
        with pytest.raises(CheckpointError, match=r"is no checkpoint; present: step-00000001, .* choose with --step N"):
            opening(run / "checkpoints" / name)
