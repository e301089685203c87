"""Memory runs out: one error that names the phase, the micro batch and the first knob; wherever it happens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from helpers import tiny_flags, train

from toolkit.commands.cli import run_command
from toolkit.runtime.errors import OutOfMemoryError
from toolkit.runtime.out_of_memory import explain_out_of_memory, is_out_of_memory

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1 MiB is free. "
    "See documentation for Memory Management (https://pytorch.org/docs)"
)


def on_gpu() -> None:
    raise torch.OutOfMemoryError(CUDA)


def on_cpu() -> None:
    torch.empty(1 << 50)


PHASES: dict[str, tuple[str, str, str, str]] = {
    "loading": ("toolkit.training.context.load_for_training", "the set-up", "", "prefix.placement: disk"),
    "engine": ("toolkit.training.phases.LocalEngine", "the set-up", "", "prefix.placement: disk"),
    "first pass": (
        "toolkit.activation_cache.cached_prefix.unpad", "the first pass", "1 row x ", "prefix.precision: int8"
    ),
    "the prefix": ("toolkit.training.step.explain_out_of_memory", "the run", "", ""),
    "forward": ("toolkit.training.step.supervised_loss", "forward", "2 rows x ", "train.gradient_checkpointing: on"),
    "backward": (
        "toolkit.engine.local.LocalEngine.backward", "backward", "2 rows x ", "train.gradient_checkpointing: on"
    ),
    "update": ("toolkit.engine.local.LocalEngine.update", "the update", "", "prefix."),
    "evaluation": ("toolkit.inference.evaluation.supervised_loss", "the evaluation", "2 rows x ", ""),
    "checkpoint": ("toolkit.checkpoint.saver.Saver.save", "the checkpoint", "", ""),
}  # fmt: skip
"""What fails there, how the message calls it, the micro batch, and the first knob."""


@pytest.mark.parametrize(("phase", "allocate"), list(zip(PHASES, cycle([on_cpu, on_gpu]), strict=False)))
def test_each_phase_says_what_ran_out_and_what_to_change_first(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, allocate: Callable[[], None]
) -> None:
    target, name, shape, knob = PHASES[phase]
    flags = tiny_flags(
        tiny_model, tmp_path / "run", "--train.max_steps", 1, "--data.validation", "0.1", "--train.micro_batch_size", 2,
        "--prefix.cache_dir", tmp_path / "cache", "--prefix.cache", "on" if phase == "first pass" else "off",
        "--data.packing", "off",
    )  # fmt: skip
    monkeypatch.setattr(target, lambda *_, **__: allocate())
    with pytest.raises(OutOfMemoryError) as caught:
        train(*flags)
    message = str(caught.value)
    assert message.startswith(f"out of memory during {name}")
    assert shape in message
    assert f"Change first: {knob}" in message
    assert ("you tried to allocate" if allocate is on_cpu else "Tried to allocate 2.00 GiB") in message
    assert "documentation" not in message
    assert "\n" not in message


def test_the_advice_never_hides_the_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan may run out of memory itself; a rule of thumb then serves."""
    monkeypatch.setattr("toolkit.training.step.supervised_loss", lambda *_: on_gpu())
    monkeypatch.setattr("toolkit.training.out_of_memory_advice.first_change", lambda *_, **__: [][0])
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.gradient_checkpointing", "on")
    assert run_command(lambda: train(*flags)) == 1
    error = capsys.readouterr().err
    assert "Change first: data.max_length: less than 2048" in error
    assert "Traceback" not in error


def test_other_errors_pass_through_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), explain_out_of_memory("forward"):
        raise RuntimeError("shape mismatch")
    with pytest.raises(FileNotFoundError), explain_out_of_memory("forward"):
        open("/nowhere/x")  # noqa: PTH123, SIM115
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert is_out_of_memory(MemoryError())


def test_the_innermost_phase_has_the_word() -> None:
    caught = pytest.raises(OutOfMemoryError, match="during backward, on a micro batch of 1 row x 8 tokens")
    with caught, explain_out_of_memory("the run"), explain_out_of_memory("backward", "1 row x 8 tokens"):
        on_cpu()
