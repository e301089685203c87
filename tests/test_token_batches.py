"""Steps that are cut by tokens learn what steps cut by rows do, on any layout, and resume on another."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_parts import copy_of, point_to
from helpers import ROOT, metrics, run_ranks, tiny_flags, train

STEP = ("--train.micro_batch_size", 2, "--train.gradient_accumulation_steps", 4, "--train.epochs", 2)
TWO_RANKS = ("--train.micro_batch_size", 1, "--train.gradient_accumulation_steps", 4, "--train.epochs", 2)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_step_cut_by_tokens_has_the_loss_of_one_cut_by_rows(tmp_path: Path, tiny_model: Path, packing: str) -> None:
    by_rows, by_tokens = tmp_path / "rows", tmp_path / "tokens"
    more = (*STEP, "--data.packing", packing, "--data.validation", 0.2)
    assert train(*tiny_flags(tiny_model, by_rows, *more)) == 0
    assert train(*tiny_flags(tiny_model, by_tokens, *more, "--train.micro_batch_tokens", 700)) == 0
    for key in ("loss", "grad_norm", "eval_loss"):
        assert metrics(by_tokens, key) == pytest.approx(metrics(by_rows, key), rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3"])
def test_two_ranks_learn_from_a_step_cut_by_tokens_what_one_does(tmp_path: Path, tiny_model: Path, ds: str) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train(*tiny_flags(tiny_model, alone, *STEP)) == 0
    flags = tiny_flags(tiny_model, together, *TWO_RANKS, "--train.micro_batch_tokens", 700)
    more = ("--ds", str(ROOT / "ds_configs" / f"{ds}.json"))
    ended = run_ranks("launch/train.py", *flags, *more)
    assert ended.returncode == 0, ended.stderr
    assert metrics(together) == pytest.approx(metrics(alone), rel=1e-4)
    assert metrics(together, "supervised_tokens") == metrics(alone, "supervised_tokens")


@pytest.mark.slow
def test_a_run_resumes_with_micro_batches_cut_by_tokens(tmp_path: Path, tiny_model: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = (*STEP, "--output.save_every_steps", 2, "--output.keep", 9)
    assert train(*tiny_flags(tiny_model, whole, *more)) == 0
    resumed.mkdir()
    run = copy_of(whole, resumed)
    point_to(run, 4)
    assert train(*tiny_flags(tiny_model, run, *more, "--train.micro_batch_tokens", 700)) == 0
    assert metrics(run) == pytest.approx(metrics(whole), rel=1e-4)
