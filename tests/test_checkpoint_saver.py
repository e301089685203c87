"""Saving: full disks keep what is there, the background does not stall the step, kills leave the run exact."""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, metrics, run_script, tiny_flags, train

from toolkit.checkpoint import saver
from toolkit.checkpoint.manifest import verify
from toolkit.runtime.errors import DiskError
from toolkit.training.monitor import Monitor

SHORT = ("--train.max_steps", 6, "--output.save_every_steps", 2, "--mask.train", "norm", "head")
MODES = pytest.mark.parametrize("background", ["false", "true"])


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*tiny_flags(tiny_model, run, *SHORT)) == 0
    return run


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@MODES
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_does_not_write_keeps_the_checkpoint_before(
    tiny_model: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, background: str, code: int
) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", *SHORT, "--output.async_save", background)
    write = os.write

    def refuse(descriptor: int, part: Any) -> int:
        if ".step-00000004" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(code, os.strerror(code))
        return write(descriptor, part)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        expected = (
            rf"step-00000004.* could not be written \({os.strerror(code)}\)\. The checkpoints before it are intact"
        )
        with pytest.raises(DiskError, match=expected):
            train(*flags)
    assert left(tmp_path / "run") == ["latest", "step-00000002"]
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_disk_without_room_is_found_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: usage(10, 9, 2**20))
    with pytest.raises(DiskError, match=r"a checkpoint needs 1 MiB, .*checkpoints has 1 MiB free"):
        train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT))
    assert left(tmp_path / "run") == []


def test_the_step_does_not_wait_for_a_save_in_the_background(
    tiny_model: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save is held up until the third step is done; if that waited for it, the gate would never open."""
    gate, seen = threading.Event(), []
    write, step = saver.write_tensors, Monitor.step

    def held(path: Path, *given: Any) -> Any:
        assert gate.wait(60)
        return write(path, *given)

    def done(self: Monitor, row: Any) -> None:
        step(self, row)
        seen.append((row.step, left(tmp_path / "run") if (tmp_path / "run" / "checkpoints").exists() else []))
        if row.step == 3:
            gate.set()

    monkeypatch.setattr(saver, "write_tensors", held)
    monkeypatch.setattr(Monitor, "step", done)
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *SHORT, "--output.async_save", "true")) == 0
    assert dict(seen)[3] == [".step-00000002.staging"], "in flight while step 3 ran"
    assert metrics(tmp_path / "run") == metrics(whole)
    assert left(tmp_path / "run") == left(whole)
    verify(tmp_path / "run" / "checkpoints" / "step-00000006")
    shard = "checkpoints/step-00000006/optimizer/rank-00000-of-00001.safetensors"
    assert (tmp_path / "run" / shard).read_bytes() == (whole / shard).read_bytes()


def test_a_save_over_a_committed_step_replaces_it_only_when_it_is_whole(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    flags = tiny_flags(tiny_model, run, *SHORT, "--output.keep", 9)
    assert train(*flags) == 0
    (run / "checkpoints" / "latest").write_text("step-00000002")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_json", fail)
        with pytest.raises(DiskError):
            train(*flags)
    verify(run / "checkpoints" / "step-00000004")
    assert train(*flags) == 0
    assert left(run) == ["latest", "step-00000002", "step-00000004", "step-00000006"]


@pytest.mark.slow
def test_a_part_of_the_kill_matrix_is_survived() -> None:
    """SIGKILL on one rank and on both, at writes of checkpoint and cache and at random; all of it by hand."""
    result = run_script("tests/kill_matrix.py", "--every", 45, "--moments", 20, launcher=(sys.executable,), cwd=ROOT)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    survived, fought = map(int, re.findall(r"^(\d+) of (\d+) kills survived", result.stdout, flags=re.M)[0])
    assert survived == fought >= 6
