"""A checkpoint goes on under any engine, ZeRO stage and number of ranks, and never under another mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import point_to
from helpers import masters_of, metrics, run_ranks, tiny_flags, train
from reshard_worker import CHANGES
from test_zero import succeed

pytestmark = pytest.mark.distributed

RUN = ("--train.max_steps", 6, "--output.save_every_steps", 2, "--output.keep", 9, "--mask.train", "last:2", "head")


@pytest.fixture(scope="module")
def resharded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs, and what the worker saw on two ranks."""
    folder = tmp_path_factory.mktemp("reshard")
    one = ("--train.gradient_accumulation_steps", 4)
    assert train(*tiny_flags(tiny_model, folder / "local", *RUN, *one)) == 0
    flags = tiny_flags(tiny_model, folder, *RUN, "--train.micro_batch_size", 2, "--prefix.cache", "off")
    succeed(run_ranks("tests/reshard_worker.py", folder, *flags))
    return folder, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", CHANGES)
def test_the_curve_goes_on_as_if_nothing_had_changed(resharded: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, seen = resharded
    assert seen[name] == 0
    expected = metrics(folder / "local")
    assert len(expected) == 6
    kept = folder / f"{name}-kept"
    assert metrics(kept if kept.exists() else folder / name) == pytest.approx(expected, abs=1e-5)
    found, right = (masters_of(folder / run / "checkpoints" / "step-00000006") for run in (name, "local"))
    assert all((found[tensor] - right[tensor]).abs().max() < 2e-5 for tensor in right)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_one_process_goes_on_with_what_two_ranks_wrote(
    tiny_model: Path, resharded: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, _ = resharded
    run = folder / f"{name}-kept"
    point_to(run, 4)
    assert len(list((run / "checkpoints" / "step-00000004" / "optimizer").glob("*.safetensors"))) == 2
    assert train(*tiny_flags(tiny_model, run, *RUN, "--train.gradient_accumulation_steps", 4)) == 0
    assert metrics(run) == pytest.approx(metrics(folder / "local"), abs=1e-5)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_mask_of_the_same_size_is_refused_at_every_stage(resharded: tuple[Path, dict[str, Any]], name: str) -> None:
    _, seen = resharded
    assert "it was trained with another mask: 18 tensors only there" in seen[f"{name} with another mask"]
