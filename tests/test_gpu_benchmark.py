"""benchmarks/gpu.py runs its whole path on a CPU, and says what it lacks where it cannot measure."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts, gpu_runs
from benchmarks.gpu_parts import Row

Output = pytest.CaptureFixture[str]


def measured(monkeypatch: pytest.MonkeyPatch, capsys: Output, *flags: str) -> tuple[int, dict[str, list[str]], str]:
    """The exit code, the table's cells by what they are of, and stderr."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    code = gpu.main()
    printed = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if "|" in line]
    return code, {line[0]: line[1:] for line in lines[2:]}, printed.err


def test_operations_and_steps_are_measured_beside_a_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    flags = ("--device", "cpu", "--only", "steps", "ceilings", "loss", "update")
    code, rows, _ = measured(monkeypatch, capsys, *flags)
    assert code == 0
    assert next(iter(rows)).startswith("copy on the device"), "in the order of the parts, not of the flags"
    held = [name for name, (_, _, holds) in rows.items() if holds == "ok"]
    assert len(held) == 6 + 6, "six losses, and three optimizers on two precisions"
    assert rows["short cuts"][0].startswith("the last MLP, the final norm, head")
    for title in ("plain loop", "plain loop, fused AdamW", "step as it is", "step and the update in whole launches"):
        assert float(rows[f"{title}, B T S = (2, 32, 16), ms"][0]) > 0


@pytest.mark.slow
def test_short_runs_agree_with_the_plainest(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    code, rows, _ = measured(monkeypatch, capsys, "--device", "cpu", "--only", "runs")
    assert code == 0
    assert len(rows) == 1 + len(gpu_runs.RUNS)
    assert all(holds == "ok" for _, _, holds in rows.values())
    assert rows["run, warm cache: largest difference of a step's loss"][0] == "0.0000"


def test_without_a_card_it_ends_with_2_and_one_message(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, rows, error = measured(monkeypatch, capsys)
    assert (code, rows) == (2, {})
    assert error.startswith(
        f"error: torch {torch.__version__} sees no CUDA card; run this where `nvidia-smi` lists one"
    )
    assert len(error.splitlines()) == 1


def lacking(*packages: str) -> Any:
    find = importlib.util.find_spec
    return lambda name, *more: None if name in packages else find(name, *more)


def test_packages_that_are_missing_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lacking("pydantic", "xxhash", "deepspeed", "datasets"))
    code, _, error = measured(monkeypatch, capsys, "--device", "cpu")
    assert code == 2
    assert "lacks pydantic, xxhash; run `pip install -c constraints.txt pydantic xxhash`" in error
    assert "`pip download --dest wheels -c constraints.txt pydantic xxhash`" in error


def test_what_needs_bitsandbytes_is_left_out_without_it(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lacking("bitsandbytes"))
    code, rows, _ = measured(monkeypatch, capsys, "--device", "cpu", "--only", "update")
    assert code == 0
    assert rows["adamw_8bit"][0] == "left out: bitsandbytes is not installed"


def test_a_missed_bound_and_a_part_that_raises_exit_with_1(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def broken(*_: object) -> Any:
        yield Row("made up", "2", "1", holds=False)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_parts, "ceilings", broken)
    code, rows, error = measured(monkeypatch, capsys, "--device", "cpu", "--only", "ceilings")
    assert code == 1
    assert rows == {"made up": ["2", "1", "MISS"], "ceilings to its end": ["RuntimeError", "no error", "MISS"]}
    assert "out of luck" in error
