"""What a run says of its length, its losses and its memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
import torch
from helpers import metrics, reseal, tiny_flags, train

from toolkit.data.batches import BatchPlan
from toolkit.training.run_record import MemoryUse


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


def test_memory_is_measured() -> None:
    now = MemoryUse.measure(torch.device("cpu"), psutil.Process().memory_info().rss)
    assert now.libraries is not None
    assert 0.05 < now.libraries < 1.1 * now.peak  # the kernel counts both in batches of pages


def epochs_of(said: list[str]) -> str:
    """The losses by epoch that the last run logged."""
    return [line for line in said if line.startswith("mean loss by epoch: ")][-1].removeprefix("mean loss by epoch: ")


@pytest.mark.parametrize("every", [None, 12])
def test_a_resumed_run_knows_the_losses_of_all_its_epochs(
    tiny_model: Path, tmp_path: Path, said: list[str], every: int | None
) -> None:
    """They are in the checkpoint, also of an epoch that was cut in two: nothing is read back from metrics.jsonl."""
    run = tmp_path / "run"
    flags = tiny_flags(tiny_model, run, "--output.keep", 99, "--output.save_every_steps", every or "none")
    assert train(*flags) == 0
    losses = metrics(run)
    whole = ", ".join(f"{sum(losses[start : start + 20]) / 20:.4f}" for start in (0, 20, 40))
    assert epochs_of(said) == whole
    (run / "checkpoints" / "latest").write_text(f"step-{3 * (every or 0) or 20:08d}")
    (run / "metrics.jsonl").unlink()
    assert train(*flags) == 0
    assert metrics(run) == losses[-24 if every else -40 :]
    assert epochs_of(said) == whole


def test_what_a_checkpoint_of_an_earlier_version_does_not_know_is_unknown(
    tiny_model: Path, tmp_path: Path, said: list[str]
) -> None:
    run = tmp_path / "run"
    flags = tiny_flags(tiny_model, run, "--output.keep", 99, "--output.save_every_steps", 30)
    assert train(*flags) == 0
    losses, checkpoint = metrics(run), run / "checkpoints" / "step-00000030"
    state = json.loads((checkpoint / "state.json").read_text())
    known = ("tokens", "supervised_tokens", "seconds", "epoch_steps", "epoch_loss")
    state["totals"] = {name: state["totals"][name] for name in known}
    (checkpoint / "state.json").write_text(json.dumps(state))
    reseal(checkpoint)
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    assert train(*flags) == 0
    assert f"epoch 2: mean loss {sum(losses[30:40]) / 10:.4f} over 10 steps" in said
    assert epochs_of(said).startswith("unknown, ")


def test_a_run_says_its_length_and_what_its_memory_held(tiny_model: Path, tmp_path: Path, said: list[str]) -> None:
    assert train(*tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 3)) == 0
    assert any("3 steps (train.max_steps) of 1 row(s), 0.15 of 3 epoch(s)" in line for line in said)
    assert f"loading {tiny_model}" in said
    assert re.search(r"done: 3 steps, peak memory .* GiB \(.* Python and libraries before the model, ", said[-1])
