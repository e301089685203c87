"""On a GPU checkpoints are written in the background: from a copy that is taken at once, and nothing is lost."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_streams import FakeGpu
from helpers import invocation, metrics, tiny_flags, train

from toolkit.checkpoint import saver
from toolkit.checkpoint.host_copy import HostCopy
from toolkit.checkpoint.manifest import verify
from toolkit.config.policy import saves_in_background
from toolkit.runtime.errors import DiskError
from toolkit.training import between_steps, trainer
from toolkit.training.monitor import Monitor

SHORT = ("--train.max_steps", 6, "--output.save_every_steps", 2, "--mask.train", "norm", "head")
IN_BACKGROUND = ("--output.async_save", "true")
SHARD = "checkpoints/step-00000006/optimizer/rank-00000-of-00001.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints are written at once."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*tiny_flags(tiny_model, run, *SHORT)) == 0
    return run


def test_the_background_is_the_default_on_a_gpu_alone() -> None:
    assert saves_in_background(None, on_gpu=True)
    assert not saves_in_background(None, on_gpu=False)
    for said in (True, False):
        assert saves_in_background(said, on_gpu=True) is saves_in_background(said, on_gpu=False) is said
    assert invocation().config.output.async_save is None
    assert invocation("--output.async_save", "false").config.output.async_save is False


@pytest.mark.parametrize("refuses", [False, True])
def test_a_copy_in_page_locked_memory_is_of_the_moment_and_its_memory_is_used_again(
    tiny_model: Path, tmp_path: Path, whole: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """The first write is held up until the third step has changed the state."""
    gate, write, step = threading.Event(), saver.write_tensors, Monitor.step
    seen: list[int] = []

    def held(path: Path, *given: Any) -> Any:
        assert gate.wait(60)
        seen.append(len(gpu.pinned))
        return write(path, *given)

    def done(self: Monitor, row: Any) -> None:
        step(self, row)
        if row.step == 3:
            gate.set()

    gpu.refuses = refuses
    monkeypatch.setattr(saver, "HostCopy", lambda _, ranks: HostCopy(True, ranks))
    monkeypatch.setattr(saver, "write_tensors", held)
    monkeypatch.setattr(Monitor, "step", done)
    run = tmp_path / "run"
    assert train(*tiny_flags(tiny_model, run, *SHORT, *IN_BACKGROUND, "--output.keep", 9)) == 0
    assert metrics(run) == metrics(whole)
    assert (run / SHARD).read_bytes() == (whole / SHARD).read_bytes()
    for number in (2, 4, 6):
        verify(run / f"checkpoints/step-{number:08d}")
    assert len(seen) == 3
    assert len(set(seen)) == 1, "three copies in the memory of one"
    assert gpu.counts["host waits"] >= 3, "a thread waits for the copy before it writes"


def test_without_memory_for_a_copy_the_files_are_written_at_once(
    tiny_model: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    threads, write = set(), saver.write_tensors

    def watched(path: Path, *given: Any) -> Any:
        threads.add(threading.current_thread().name)
        return write(path, *given)

    monkeypatch.setattr(saver, "write_tensors", watched)
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT, *IN_BACKGROUND)) == 0
    assert threads == {"MainThread"}
    assert (tmp_path / "run" / SHARD).read_bytes() == (whole / SHARD).read_bytes()


def test_a_run_that_fails_while_a_checkpoint_is_written_keeps_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """The write of step 2 ends only after step 4 has failed."""
    gate, write, step = threading.Event(), saver.write_tensors, trainer.train_step
    steps: list[int] = []

    def held(path: Path, *given: Any) -> Any:
        assert gate.wait(60)
        return write(path, *given)

    def failing(*given: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            gate.set()
            raise RuntimeError("the card fell off the bus")
        return step(*given)

    flags = tiny_flags(tiny_model, tmp_path / "run", *SHORT, *IN_BACKGROUND)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_tensors", held)
        patch.setattr(trainer, "train_step", failing)
        with pytest.raises(RuntimeError, match="fell off the bus"):
            train(*flags)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000002"
    verify(tmp_path / "run/checkpoints/step-00000002")
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_write_that_fails_is_reported_by_the_next_step_or_beside_another_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fail(*_: Any) -> None:
        raise RuntimeError("another")

    monkeypatch.setattr(saver, "write_tensors", full)
    with pytest.raises(DiskError, match="could not be written"):
        train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT, *IN_BACKGROUND))
    assert not said or "could not be written" not in said[-1]
    monkeypatch.setattr(between_steps, "validate", fail)
    more = ("--data.validation", "0.25", "--output.evaluate_every_steps", 2)
    with pytest.raises(RuntimeError, match="another"):
        train(*tiny_flags(tiny_model, tmp_path / "other", *SHORT, *IN_BACKGROUND, *more))
    assert "could not be written (No space left on device)" in said[-1]


def test_a_validation_goes_on_beside_the_write_and_tells_its_loss_after_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of each checkpoint waits for its validation to begin: it would hang if that waited for the write."""
    gate, seen = threading.Event(), []
    write, validate, told = saver.write_tensors, between_steps.validate, Monitor.evaluation

    def held(path: Path, *given: Any) -> Any:
        assert gate.wait(60)
        gate.clear()
        return write(path, *given)

    def begun(*given: Any) -> Any:
        gate.set()
        return validate(*given)

    def tell(self: Monitor, step: int, *given: Any) -> None:
        seen.append((step, (tmp_path / "run/checkpoints/latest").read_text()))
        told(self, step, *given)

    monkeypatch.setattr(saver, "write_tensors", held)
    monkeypatch.setattr(between_steps, "validate", begun)
    monkeypatch.setattr(Monitor, "evaluation", tell)
    more = ("--data.validation", "0.25", "--output.evaluate_every_steps", 2)
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT, *IN_BACKGROUND, *more)) == 0
    assert seen == [(step, f"step-{step:08d}") for step in (2, 4, 6)]


def test_a_copy_that_fits_needs_no_memory_a_second_time(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, tensors = HostCopy(True, 1), {"a": torch.ones(5), "b": torch.arange(3, dtype=torch.uint8)}
    assert copy.fits(tensors)
    first, event = copy.take(tensors)
    assert event is not None
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    assert copy.fits(tensors)
    assert not copy.fits({**tensors, "c": torch.ones(2)})
    tensors["a"].add_(1)
    assert torch.equal(first["a"], torch.ones(5))
    second, _ = copy.take(tensors)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert torch.equal(second["a"], torch.full((5,), 2.0))
    assert len(gpu.pinned) == 1
