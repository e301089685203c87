"""Masks that change during a run under DeepSpeed, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from closeness import assert_rounded_alike
from helpers import metrics, run_ranks, tiny_flags, train
from schedule_worker import RESTARTS, RUNS
from test_zero import succeed

pytestmark = pytest.mark.distributed

SCHEDULE = [{"train": ["last:2"], "until_step": 2}, {"train": ["last:3", "head"], "until_step": 4}]
MASK = ("--mask.schedule", json.dumps(SCHEDULE), "--mask.train", "last:2", "norm", "--train.max_steps", 8)


@pytest.fixture(scope="module")
def under_zero(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs, and what the worker saw."""
    folder = tmp_path_factory.mktemp("zero")
    given = tiny_flags(tiny_model, folder, *MASK)
    succeed(run_ranks("tests/schedule_worker.py", folder, ",".join(RUNS), *given))
    return folder, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_each_stage_learns_what_one_process_learns(
    tiny_model: Path, tmp_path: Path, under_zero: tuple[Path, dict[str, Any]], name: str
) -> None:
    _, dtype, accumulation = RUNS[name]
    same = ("--model.dtype", dtype, "--train.gradient_accumulation_steps", 2 * accumulation)
    assert train(*tiny_flags(tiny_model, tmp_path / "alone", *MASK, *same)) == 0
    folder, seen = under_zero
    assert set(seen[name]["codes"]) == {0}
    run, alone = folder / f"{name}-whole", tmp_path / "alone"
    assert len(metrics(run)) == 8
    if dtype == "bfloat16":
        assert_rounded_alike(run, alone)
    else:
        assert metrics(run) == pytest.approx(metrics(alone), abs=1e-5)
        assert metrics(run, "grad_norm") == pytest.approx(metrics(alone, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", RESTARTS)
def test_each_stage_goes_on_exactly_from_a_border_and_from_within_a_phase(
    under_zero: tuple[Path, dict[str, Any]], name: str, step: int
) -> None:
    folder, _ = under_zero
    again = [json.loads(line) for line in (folder / f"{name}-from-{step}.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in again if "loss" in row] == metrics(folder / f"{name}-whole")
    assert [row["grad_norm"] for row in again if "loss" in row] == metrics(folder / f"{name}-whole", "grad_norm")


@pytest.mark.parametrize("name", RUNS)
def test_nothing_that_deepspeed_held_for_a_phase_outlives_it(
    under_zero: tuple[Path, dict[str, Any]], name: str
) -> None:
    _, seen = under_zero
    assert len(seen[name]["held"]) == 2
    assert all(count >= 8 for count in seen[name]["held"]), "two groups at least, each with master, moments and step"
    assert seen[name]["alive"] == [0, 0]
