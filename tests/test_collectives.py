"""The collectives of a step on two ranks, counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import ROOT, metrics, run_ranks, tiny_flags, train

FLAGS = ("--train.max_steps", 8, "--prefix.cache", "off", "--output.async_save", "true", "--output.save_every_steps", 3)


@pytest.mark.distributed
def test_a_step_has_one_collective_beside_the_gradients(tiny_model: Path, tmp_path: Path) -> None:
    """Losses, norm, sample of the update, memory, signals and background saves go together; tokens are known."""
    alone, both, output = tmp_path / "alone", tmp_path / "both", tmp_path / "steps.json"
    assert train(*tiny_flags(tiny_model, alone, *FLAGS, "--train.gradient_accumulation_steps", 2)) == 0
    result = run_ranks("tests/collective_worker.py", output, *tiny_flags(tiny_model, both, *FLAGS))
    assert result.returncode == 0, result.stderr[-3000:]
    steps = json.loads(output.read_text())
    of_gradients = "c10d::allreduce_ torch.float32"
    assert all(step.pop(of_gradients) for step in steps)
    plain = [step for number, step in enumerate(steps, start=1) if number % 3]  # the others begin a checkpoint
    assert len(plain) == 5
    published = [step for step in plain if step != {"c10d::allreduce_ torch.float64": 1}]
    assert len(published) <= 2, published
    for key in ("supervised_tokens", "tokens", "moved_share"):
        assert metrics(both, key) == metrics(alone, key)
    assert max(abs(a - b) for a, b in zip(metrics(both), metrics(alone), strict=True)) < 1e-5


@pytest.mark.distributed
def test_deepspeed_sums_in_the_precision_that_the_recipe_asks_for(tiny_model: Path, tmp_path: Path) -> None:
    """The model's, bfloat16, is DeepSpeed's own choice."""
    asked = ("--model.dtype", "bfloat16", "--train.reduce_dtype", "float32", "--ds", ROOT / "ds_configs" / "zero2.json")
    output = tmp_path / "steps.json"
    flags = tiny_flags(tiny_model, tmp_path / "run", *FLAGS, *asked)
    result = run_ranks("tests/collective_worker.py", output, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    for step in json.loads(output.read_text()):
        assert "c10d::allreduce_ torch.float32" in step
        assert "c10d::allreduce_ torch.bfloat16" not in step
