"""The activation store among processes: killed ones, many at once, full and read-only disks."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from helpers import ROOT, clean_environment


@pytest.fixture(scope="module")
def store_worker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each mode of the worker, by its name."""
    directory = tmp_path_factory.mktemp("stores")
    command = [sys.executable, str(ROOT / "tests" / "store_worker.py"), str(directory)]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    print(result.stderr)  # pytest shows it where a test fails
    return {mode: answer.get("result", "failed") for mode, answer in json.loads(result.stdout).items()}


@pytest.mark.parametrize("mode", ["kill", "kill_first"])
def test_a_writer_killed_at_any_call_leaves_right_values_or_none(mode: str, store_worker: dict[str, Any]) -> None:
    calls = store_worker[mode]["calls"]
    assert calls.count("write") == calls.count("replace") == (1 if mode == "kill" else 2)
    assert calls.count("fsync") == 2 * calls.count("write"), "the file and its directory"
    assert dict(enumerate(store_worker[mode]["faults"])) == {point: [] for point in range(len(calls))}


def test_processes_that_fill_one_store_at_once_disturb_nobody(store_worker: dict[str, Any]) -> None:
    assert store_worker["crowd"] == {"codes": [0, 0, 0, 0], "found": 40, "missing": 0}


def test_processes_that_share_a_limit_keep_to_it_at_every_moment(store_worker: dict[str, Any]) -> None:
    result = store_worker["crowd_within_limit"]
    assert result["codes"] == [0, 0, 0, 0]
    assert 0 < result["found"] < 40
    assert result["found"] + result["missing"] == 40


def test_a_write_that_ends_half_way_is_counted_and_leaves_nothing(store_worker: dict[str, Any]) -> None:
    assert store_worker["short_files"] == {"stored": 20, "failed": 20, "right": 20, "none": 20, "left": []}


def test_a_full_disk_is_gone_on_with(store_worker: dict[str, Any]) -> None:
    result = store_worker["full_disk"]
    if result is None:
        pytest.skip("needs the right to mount a small file system")
    assert 15 < result["stored"] < 40
    assert result["stored"] == result["right"]
    assert result["failed"] == result["none"] == 40 - result["stored"]
    assert result["left"] == []


def test_a_read_only_directory_is_read(store_worker: dict[str, Any]) -> None:
    expected = {"found": [True, True, True], "failed": 1, "read": True, "room": 0}
    assert store_worker["read_only"] == {"code": 0, "result": expected}
