"""A run on a mixture with a limit and oversampling: it resumes in the same order and evaluates the rows it held out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from data_files import ROWS, as_csv, as_jsonl
from helpers import make_tiny_model, metrics, tiny_flags, train
from test_sources import put

import toolkit
from toolkit.runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    make_tiny_model(folder / "model")
    rows = [{**ROWS[n % 6], "QUESTION": f"질문 {n}", "label": "yes" if n % 3 else "no"} for n in range(18)]
    put(folder / "a.jsonl", as_jsonl(rows[:9]))
    put(folder / "b" / "rows.csv", as_csv(rows=rows[9:]))
    assert train(*flags(folder, folder / "run")) == 0
    return folder


def flags(folder: Path, run: Path, *more: object) -> list[str]:
    return tiny_flags(
        folder / "model", run, "--data.path", f"{{path: {folder / 'a.jsonl'}, weight: 0.5}}", folder / "b",
        "--data.validation", 0.25, "--data.limit", 12, "--data.oversample", "label", "--train.epochs", 2,
        "--train.gradient_accumulation_steps", 4, "--output.save_every_steps", 1, "--output.keep", 9,
        "--mask.train", "last:2", *more,
    )  # fmt: skip


def test_it_goes_on_with_the_same_rows_in_the_same_order(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    for late in checkpoints[2:]:
        shutil.rmtree(late)
    (tmp_path / "run" / "checkpoints" / "latest").write_text(checkpoints[1].name)
    (tmp_path / "run" / "checkpoints" / "best").unlink(missing_ok=True)
    assert train(*flags(whole, tmp_path / "run")) == 0
    assert metrics(tmp_path / "run") == metrics(whole / "run")
    assert len(metrics(whole / "run")) == len(checkpoints) > 3


def test_another_weight_is_another_run(whole: Path) -> None:
    run = whole / "run"
    (source, *_) = yaml.safe_load((run / "config.yaml").read_text())["data"]["path"]
    assert source["weight"] == 0.5
    other = ["--data.path", f"{{path: {whole / 'a.jsonl'}, weight: 2}}", whole / "b", "--train.epochs", 3]
    with pytest.raises(CheckpointError, match="the rows, or the ids that this version makes of them, have changed"):
        train(*flags(whole, run, *other, "--resume-override"))


def test_what_it_held_out_is_evaluated_again(whole: Path) -> None:
    found = toolkit.evaluate(whole / "run")
    assert found.loss == pytest.approx(metrics(whole / "run", "eval_loss")[-1], abs=1e-5)
    assert found.rows == 4
    assert f"held out of {whole / 'a.jsonl'}, {whole / 'b'}" in found.data
    trained_on = toolkit.evaluate(whole / "run", whole / "b")
    assert trained_on.held_out is False
