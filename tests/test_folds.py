"""Folds: every row gets a loss from a run that did not see it; stopped folds go on; the folds share one cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENGLISH, run_here, tiny_flags, train

from toolkit.checkpoint.run_directory import OUT_OF_FOLD_FILE
from toolkit.inference.open_model import open_model
from toolkit.runtime import signals
from toolkit.runtime.errors import CheckpointError
from toolkit.training import folds
from toolkit.training.between_steps import BetweenSteps
from toolkit.training.phases import PhaseState

START_UP_ROWS = 3 + 3 + 1
"""Rows that the start-up checks run through the prefix (tests/test_cache.py)."""
SHORT = ("--data.folds", "3", "--train.epochs", "1", "--mask.train", "last:2")


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / OUT_OF_FOLD_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folds, trained."""
    run = tmp_path_factory.mktemp("folds") / "run"
    assert train(*tiny_flags(tiny_model, run, *SHORT)) == 0
    return run


def test_every_row_has_one_loss_from_a_run_that_did_not_see_it(run: Path) -> None:
    rows = rows_of(run)
    assert sorted(row["row"] for row in rows) == sorted(f"{ENGLISH} line {number}" for number in range(1, 21))
    assert Counter(row["fold"] for row in rows) == {0: 7, 1: 7, 2: 6}
    for fold in range(3):
        assert rows_of(run / f"fold-{fold}") == [row for row in rows if row["fold"] == fold]


def test_evaluate_agrees_with_the_losses_of_a_fold(run: Path) -> None:
    found = json.loads(run_here("launch/evaluate.py", run / "fold-1", "--part", "test").stdout.splitlines()[-1])
    rows = rows_of(run / "fold-1")
    tokens = sum(row["tokens"] for row in rows)
    assert found["supervised_tokens"] == tokens
    assert found["loss"] == pytest.approx(sum(row["loss"] * row["tokens"] for row in rows) / tokens, abs=1e-5)
    assert "(fold 1 of 3)" in found["data"]


def test_the_directory_of_the_folds_is_refused_with_the_runs_in_it(run: Path) -> None:
    result = run_here("launch/generate.py", run, "--question", "why?")
    assert result.returncode == 2
    assert f"{run} holds the runs of data.folds; expected one of them: {run}/fold-0, {run}/fold-1, " in result.stderr
    assert f"from a run that did not see it, is in {run / OUT_OF_FOLD_FILE}" in result.stderr
    with pytest.raises(CheckpointError, match=r"holds the runs of data\.folds"):
        open_model(str(run))


def test_finished_folds_are_not_trained_again_and_the_table_is_shown(
    run: Path, tiny_model: Path, said: list[str]
) -> None:
    before = (run / OUT_OF_FOLD_FILE).read_bytes()
    (run / OUT_OF_FOLD_FILE).unlink()
    assert train(*tiny_flags(tiny_model, run, *SHORT)) == 0
    assert (run / OUT_OF_FOLD_FILE).read_bytes() == before
    assert not any("not of one recipe" in line for line in said)
    assert sum("finished, nothing to train" in line for line in said) == 3
    (last,) = [line for line in said if line.lstrip().startswith("all ")]
    losses = [row["loss"] * row["tokens"] for row in rows_of(run)]
    assert f"{sum(losses) / sum(row['tokens'] for row in rows_of(run)):.4f}, out of fold; folds from" in last


@pytest.mark.slow
def test_one_fold_alone_gives_what_all_together_give(
    run: Path, tiny_model: Path, tmp_path: Path, said: list[str]
) -> None:
    other = tmp_path / "other"
    assert train(*tiny_flags(tiny_model, other, *SHORT, "--data.fold", "1")) == 0
    assert rows_of(other / "fold-1") == rows_of(run / "fold-1")
    assert "the table over all folds comes with the last of them; missing: 0, 2" in said[-1]
    assert train("--config", str(other / "fold-1" / "config.yaml")) == 0  # the same directory again
    assert [path.name for path in other.iterdir()] == ["fold-1"]


@pytest.mark.slow
def test_a_stopped_fold_goes_on_where_it_stopped(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step, steps = BetweenSteps.after_step, Counter[int]()

    def stopped_in_the_second(self: BetweenSteps, state: PhaseState, is_stopping: bool) -> bool:
        steps.update([0])
        if steps[0] == 20:
            signals.request_stop("a test", broadcast=False)
        return after_step(self, state, is_stopping)

    other = tmp_path / "other"
    monkeypatch.setattr(BetweenSteps, "after_step", stopped_in_the_second)
    assert train(*tiny_flags(tiny_model, other, *SHORT)) == 75
    assert not (other / "fold-2").exists()
    assert train(*tiny_flags(tiny_model, other, *SHORT)) == 0
    assert steps[0] == 13 + 13 + 14
    assert rows_of(other) == rows_of(run)


@pytest.mark.slow
def test_losses_that_a_kill_left_missing_are_computed_by_the_next_start(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, flags = tmp_path / "other", (*SHORT, "--data.fold", "0")

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("toolkit.training.run.save_out_of_fold", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(*tiny_flags(tiny_model, other, *flags))
    assert not (other / "fold-0" / OUT_OF_FOLD_FILE).exists()
    assert train(*tiny_flags(tiny_model, other, *flags)) == 0
    assert rows_of(other / "fold-0") == rows_of(run / "fold-0")


def test_losses_of_a_shorter_run_do_not_outlive_it(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, flags = tmp_path / "other", (*SHORT, "--data.fold", "0")
    assert train(*tiny_flags(tiny_model, other, *flags)) == 0
    longer = (*flags, "--train.epochs", "2", "--resume-override")

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("toolkit.training.run.save_out_of_fold", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(*tiny_flags(tiny_model, other, *longer))
    assert train(*tiny_flags(tiny_model, other, *longer)) == 0
    before, after = rows_of(run / "fold-0"), rows_of(other / "fold-0")
    assert [row["row"] for row in after] == [row["row"] for row in before]
    assert all(new["loss"] != old["loss"] for new, old in zip(after, before, strict=True))


def test_held_out_rows_that_changed_are_neither_evaluated_nor_gone_on_with(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(ENGLISH.read_text(encoding="utf-8"), encoding="utf-8")
    flags = tiny_flags(tiny_model, tmp_path / "run", *SHORT, "--data.fold", "0", "--data.path", data)
    assert train(*flags) == 0
    changed = rows_of(tmp_path / "run" / "fold-0")[2]["row"]
    lines = data.read_text(encoding="utf-8").splitlines()
    number = int(changed.split()[-1]) - 1
    lines[number] = json.dumps({**json.loads(lines[number]), "LONG_ANSWER": "Another answer."})
    data.write_text("\n".join(lines), encoding="utf-8")
    said = run_here("launch/evaluate.py", tmp_path / "run" / "fold-0", "--part", "test")
    assert (said.returncode, "have changed since it was trained" in said.stderr) == (2, True)
    (tmp_path / "run" / "fold-0" / OUT_OF_FOLD_FILE).unlink()
    with pytest.raises(CheckpointError, match="the test rows, or those that the fold holds out, have changed since"):
        train(*flags)


@pytest.mark.slow
def test_a_signal_while_held_out_rows_are_read_leaves_a_run_that_goes_on(
    run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    other, flags = tmp_path / "other", (*SHORT, "--data.fold", "0")

    def stopped(*_: Any) -> None:
        raise signals.StopRequested

    with monkeypatch.context() as patch:
        patch.setattr("toolkit.training.folds.row_losses", stopped)
        assert train(*tiny_flags(tiny_model, other, *flags)) == 75
    assert "before the held-out rows were read; start the same command again" in said[-1]
    assert train(*tiny_flags(tiny_model, other, *flags)) == 0
    assert rows_of(other / "fold-0") == rows_of(run / "fold-0")


@contextmanager
def counted_rows() -> Iterator[Counter[int]]:
    """Count the rows that each block sees, but for the plan's rehearsal without data."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original, rows = LlamaDecoderLayer.forward, Counter[int]()

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hidden_states.is_meta:
            rows[self.self_attn.layer_idx] += hidden_states.shape[0]
        return original(self, hidden_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", counted)
        yield rows


def test_no_block_of_the_prefix_is_computed_twice_for_a_row(tiny_model: Path, tmp_path: Path) -> None:
    cache = ("--prefix.cache", "on", "--prefix.cache_dir", tmp_path / "cache", "--data.validation", "0.2")
    with counted_rows() as first:
        assert train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT, *cache, "--data.fold", "0")) == 0
    with counted_rows() as others:
        assert train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT, *cache)) == 0
    assert first[1] == first[3] == 20 + START_UP_ROWS
    assert set(others) == {4, 5}
    assert len(rows_of(tmp_path / "run")) == 20


def test_a_table_of_folds_of_several_recipes_says_so(tiny_model: Path, tmp_path: Path, said: list[str]) -> None:
    flags = ("--data.folds", "2", "--train.max_steps", "1")
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *flags, "--data.fold", "0")) == 0
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *flags, "--data.fold", "1", "--train.max_steps", "2")) == 0
    warnings = [line for line in said if line.startswith("the folds are not of one recipe")]
    assert len(warnings) == 1
    assert warnings[0].endswith("train.max_steps is 1 in fold-0, 2 in fold-1")


def test_a_directory_with_a_run_without_folds_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    assert train(*tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", "1")) == 0
    with pytest.raises(CheckpointError, match=r"holds a run without folds; choose another --output.dir for data.folds"):
        train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT))


def test_the_table_weighs_folds_by_their_tokens() -> None:
    found = [folds.OutOfFoldLoss(0, "a", 1.0, 30), folds.OutOfFoldLoss(1, "b", 2.0, 10)]
    *_, last = folds.table(found)
    assert "2        40   1.2500, out of fold; folds from 1.0000 to 2.0000" in last
