"""Two ranks without DeepSpeed, which sum gradients in buckets while backward runs, learn what one process learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_runs import assert_learned_alike
from bucket_worker import CASES, case_flags
from closeness import assert_rounded_alike
from helpers import ENGLISH, make_tiny_model, run_ranks, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all cases on two ranks, with 21 rows, so that the last step of an epoch is short."""
    folder = tmp_path_factory.mktemp("sums")
    make_tiny_model(folder / "model")
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()
    (folder / "odd.jsonl").write_text("\n".join([*rows, rows[0]]), encoding="utf-8")
    result = run_ranks("tests/bucket_worker.py", folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def sums(folder: Path) -> dict[str, Any]:
    """How gradients were summed in each case, by rank."""
    found: dict[str, Any] = json.loads((folder / "sums.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_learns(folder: Path, name: str) -> None:
    assert train(*case_flags(folder, name, 1)) == 0
    alike = assert_rounded_alike if "bfloat16" in name else assert_learned_alike
    alike(folder / f"{name} 2", folder / f"{name} 1")


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_one_collective_a_bucket_in_the_precision_asked_for(sums: dict[str, Any], name: str) -> None:
    summed_in = "bfloat16" if "--train.reduce_dtype" in CASES[name] else "float32"
    for steps, buckets in zip(sums[name]["steps"], sums[name]["buckets"], strict=True):
        for step, number in zip(steps, buckets, strict=False):
            of_gradients = {kind: count for kind, count in step.items() if not kind.endswith("float64")}
            assert of_gradients[f"c10d::allreduce_ torch.{summed_in}"] == number > 1, step
            assert "c10d::allreduce_ torch.float32" not in step or summed_in == "float32"


@pytest.mark.parametrize("name", CASES)
def test_buckets_are_summed_while_backward_runs(sums: dict[str, Any], name: str) -> None:
    for early, buckets in zip(sums[name]["early"], sums[name]["buckets"], strict=True):
        assert early == buckets, "every tensor got a gradient, so nothing was left to the end"


def test_a_rank_may_have_fewer_passes_that_reach_less(sums: dict[str, Any]) -> None:
    assert sums["uneven"] == [True, True]
