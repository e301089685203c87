"""The first command of the README, on the real model, cut short after a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import metrics, run_script


@pytest.mark.real_model
@pytest.mark.distributed
@pytest.mark.first_tier
def test_the_quickstart_trains_the_bundled_model_under_zero2(tmp_path: Path) -> None:
    flags = (
        "--ds", "ds_configs/zero2.json", "--train.max_steps", 2, "--output.dir", tmp_path / "run",
        "--output.report_answers", 0,
    )  # fmt: skip
    result = run_script("launch/train.py", *flags, launcher=("deepspeed",))
    assert result.returncode == 0, result.stderr[-4000:]
    assert "no --config given: using" in result.stderr
    assert "2,605,056 trained (1.9%)" in result.stderr
    assert "58 training rows" in result.stderr
    assert "2 steps (train.max_steps) of 1 row(s), 0.034 of 3 epoch(s)" in result.stderr
    assert "\r" not in result.stderr, "the log of a file holds no bars"
    assert "█" not in result.stderr
    assert len(metrics(tmp_path / "run")) == 2
    assert len(metrics(tmp_path / "run", "eval_loss")) == 1
    for name, words in (("report.html", "too few rows"), ("report.ko.html", "행이 너무 적음")):
        assert words in (tmp_path / "run" / name).read_text(encoding="utf-8")
