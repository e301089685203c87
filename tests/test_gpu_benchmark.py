"""benchmarks/gpu.py runs its whole path on a CPU, and says what it lacks where it cannot measure."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import ROOT, clean_environment

from benchmarks import gpu, gpu_large, gpu_parts, gpu_peers, gpu_runs
from benchmarks.gpu_table import TINY, Row

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a run's process would stay in this one."""
    monkeypatch.setattr(gpu, "set_up_memory", lambda: None)


def cells(printed: str) -> dict[str, list[str]]:
    """The cells of all tables by what they are of; seconds are left out."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    own = [line for line in lines if line[0] != "measured" and not line[0].startswith("-")]
    return {line[0]: line[1:] for line in own if not line[0].endswith(": seconds in all")}


def measured(monkeypatch: pytest.MonkeyPatch, capsys: Output, *flags: str) -> tuple[int, dict[str, list[str]], str]:
    """The exit code, the tables' cells by what they are of, and stderr."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    code = gpu.main()
    printed = capsys.readouterr()
    return code, cells(printed.out), printed.err


def test_operations_and_steps_are_measured_beside_a_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    flags = ("--device", "cpu", "--tiny", "--only", "steps", "ceilings", "loss", "update", "adapters")
    code, rows, _ = measured(monkeypatch, capsys, *flags)
    assert code == 0
    assert next(iter(rows)).startswith("copy on the device"), "in the order of the parts, not of the flags"
    held = [name for name, (_, _, holds) in rows.items() if holds == "ok"]
    assert len(held) == 6 + 4, "six losses, and two optimizers on two precisions"
    assert rows["update of float32 moments"][0].endswith("the device is no GPU")
    assert rows["the loss"][0].startswith("the last MLP, the final norm, head")
    for title in ("plain loop", "plain loop, fused AdamW", "step", "step, no Triton"):
        assert float(rows[f"{title}, B T S = (2, 32, 16): ms"][0]) > 0
    assert float(rows["3 epochs from an empty cache, times faster, B T S = (1, 32, 8)"][0]) > 0
    for who, where in itertools.product(("peft, plain loop", "frostline"), ("the last 3 blocks", "all blocks")):
        assert float(rows[f"{who}, LoRA in {where}, B T S = (1, 32, 8): ms"][0]) > 0


@pytest.mark.slow
def test_peers_and_a_model_larger_than_the_card_are_measured() -> None:
    """In a process of its own: the Trainer and DeepSpeed leave what they set up behind."""
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--only", "trainer", "zero", "large"]
    environment = {**clean_environment(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = cells(done.stdout)
    for case in ("(1, 32, 8)", "(2, 32, 16)"):
        assert float(rows[f"Trainer, B T S = {case}: ms"][0]) > 0
        assert float(rows[f"ZeRO-2 on one rank, times torch alone, B T S = {case}"][0]) > 0
    for place in ("disk", "the host"):
        assert float(rows[f"32B shape, first pass of 4 x 32 tokens from {place}: s a row"][0]) > 0
    assert float(rows["32B shape, step, B T S = (1, 32, 8): ms"][0]) > 0


def test_a_dry_run_prints_the_minutes_which_are_nine_at_most(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run"])
    assert gpu.main() == 0
    *parts, total = capsys.readouterr().out.splitlines()
    minutes = {line.split()[0]: float(line.split()[1]) for line in parts}
    assert list(minutes) == list(gpu.PARTS)
    assert float(re.findall(r"[\d.]+", total)[0]) == pytest.approx(sum(minutes.values()))
    assert sum(minutes.values()) <= 9


def test_deepspeed_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lacking("deepspeed"))
    (row,) = gpu_peers.zero(torch.device("cpu"), TINY)
    assert row.value == "left out: deepspeed is not installed; run `pip install -c constraints.txt deepspeed`"


@pytest.mark.slow
def test_short_runs_agree_with_the_plainest(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    code, rows, _ = measured(monkeypatch, capsys, "--device", "cpu", "--tiny", "--only", "runs")
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


def test_a_run_that_is_cut_off_has_shown_the_parts_before(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def cut_off(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_parts, "loss", cut_off)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--only", "ceilings", "loss"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert len(cells(capsys.readouterr().out)) == 4


@pytest.mark.parametrize(("visible", "seen"), [(None, "0"), ("3,1", "3"), ("GPU-a", "GPU-a")])
def test_of_several_cards_the_first_is_measured(monkeypatch: pytest.MonkeyPatch, visible: Any, seen: str) -> None:
    """The Trainer would put its rows on all of them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(visible))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_blocks_that_could_not_be_page_locked_are_not_timed_as_if_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: Any = SimpleNamespace(
        nbytes=lambda: {"disk": 6 * 2**30, "cpu": 2 * 2**30}, place_weights=lambda *_: None, is_streamed=True
    )
    top: Any = SimpleNamespace(prefix=Mock(model=None), batches={TINY.filled: None})
    monkeypatch.setattr(gpu_large, "_seconds", lambda *_: 4.0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**40))
    rows = {row.what: row.value for row in gpu_large._first_pass(top, frozen, TINY, torch.device("cpu"))}
    what = "32B shape, first pass of 4 x 32 tokens from"
    assert rows == {
        f"{what} disk: s a row": "1.000",
        f"{what} disk: GB/s of weights": "2.1",
        f"{what} the host: s a row": "left out: page-locked memory was refused beyond 2 of 8 GiB",
    }
