"""The lock of a run directory where the file system has no flock; with flock, see test_resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from toolkit.runtime.file_lock import RunLock


def test_without_flock_a_holder_that_may_run_keeps_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    first = RunLock.take(tmp_path)
    assert isinstance(first, RunLock)
    held = RunLock.take(tmp_path)
    assert isinstance(held, str)
    assert f"process {os.getpid()}" in held
    assert "remove" in held
    for text, is_free in (
        ({"pid": 2**22 + 1}, True), ({"started": 5.0}, True), ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "job": "5"}, True), ("nonsense", True),
    ):  # fmt: skip
        first.release()
        first = RunLock.take(tmp_path)
        assert isinstance(first, RunLock)
        holder = (tmp_path / ".lock").read_text()
        (tmp_path / ".lock").write_text(text if isinstance(text, str) else json.dumps({**json.loads(holder), **text}))
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_JOB_ID", "5")  # the same job, started again on another node
            again = RunLock.take(tmp_path)
        assert isinstance(again, RunLock) is is_free, text
        if isinstance(again, RunLock):
            again.release()
