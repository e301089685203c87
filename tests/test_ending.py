"""What a run says of its length, its losses and its memory."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from helpers import tiny_flags, train

from toolkit.data.batches import BatchPlan
from toolkit.training.monitor import Monitor, StepMetrics
from toolkit.training.summary import MemoryUse, grown_by, highest, resident_bytes


def test_a_run_that_max_steps_cuts_short_says_how_much_of_its_epochs_it_does() -> None:
    plan = BatchPlan(rows=58, micro_batch_size=1)
    inner = "(micro batch 1 x accumulation 1 x ranks 1)"
    assert plan.text(2, 3) == f"2 steps (train.max_steps) of 1 row(s), 0.034 of 3 epoch(s) {inner}"
    assert plan.text(87, 3) == f"87 steps (train.max_steps) of 1 row(s), 1.5 of 3 epoch(s) {inner}"
    assert plan.text(174, 3) == f"174 steps of 1 row(s), 3 epoch(s) {inner}"
    assert BatchPlan(58, 2, 2, ranks=2).text(1, 1).startswith("1 steps (train.max_steps) of 8 row(s), 0.14 of 1 epoch")


def test_the_peak_of_memory_is_told_by_what_it_holds() -> None:
    cpu = MemoryUse(peak=2.10, libraries=0.45)
    assert (
        cpu.text(0.87) == "peak memory 2.10 GiB (0.45 Python and libraries before the model, 0.87 tensors as planned, "
        "0.78 other)"
    )
    assert cpu.text(1.75).endswith(
        "(0.45 Python and libraries before the model, 1.65 since, where 1.75 of tensors were planned)"
    )
    assert cpu.text(None).endswith("(0.45 Python and libraries before the model, 1.65 since)")
    gpu = MemoryUse(peak=9.7, libraries=None)
    assert gpu.text(9.5) == "peak GPU memory 9.70 GiB (9.50 tensors as planned, 0.20 other)"
    assert gpu.text(None) == "peak GPU memory 9.70 GiB (as torch allocated it; it could not be planned)"
    assert highest([cpu, gpu]) is gpu


def test_memory_is_measured() -> None:
    now = MemoryUse.now(torch.device("cpu"), resident_bytes())
    assert now.libraries is not None
    assert 0.05 < now.libraries < 1.1 * now.peak  # the kernel counts both in batches of pages
    assert grown_by("toolkit.training.summary") < 2**20  # it is imported already


def test_a_resume_keeps_the_losses_of_earlier_epochs(tmp_path: Path) -> None:
    def log(first_step: int, *losses: float) -> list[float]:
        with Monitor(tmp_path, is_main=True, total_steps=5, first_step=first_step) as monitor:
            for step, loss in enumerate(losses, start=first_step + 1):
                monitor.step(StepMetrics(step, step / 2, loss, 1e-5, 1.0, 10, 20, 0.1, 200.0, 100, 1.0))
            return monitor.epoch_losses()

    assert log(0, 4.0, 2.0, 1.0) == [3.0, 1.0]
    assert log(3, 2.0, 0.5) == [3.0, 1.5, 0.5]


def test_a_run_says_its_length_and_what_its_memory_held(tiny_model: Path, tmp_path: Path, said: list[str]) -> None:
    assert train(*tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 3)) == 0
    assert any("3 steps (train.max_steps) of 1 row(s), 0.15 of 3 epoch(s)" in line for line in said)
    assert f"loading {tiny_model}" in said
    assert re.search(r"done: 3 steps, peak memory .* GiB \(.* Python and libraries before the model, ", said[-1])
