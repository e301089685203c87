"""A slice of ``python tests/fuzz.py``: exit code 0 or 2 whatever the input, no traceback, nothing written elsewhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fuzz import check, main, run_target
from fuzz_targets import TARGETS

from toolkit.runtime.errors import FrostlineError, UsageError

SLOW = {"model_directory": 10}


@pytest.mark.parametrize("name", TARGETS)
def test_nonsense_is_refused_clearly(name: str) -> None:
    examples = SLOW.get(name, 25)
    assert run_target(name, examples, 0, derandomize=True) >= min(examples, 10)


def refuse() -> None:
    raise UsageError("no")


def fail() -> None:
    raise FrostlineError("not the user's fault")


def write_elsewhere() -> None:
    Path("/tmp/frostline-elsewhere").write_text("x")


def delete_elsewhere() -> None:
    with pytest.raises(FileNotFoundError):
        os.remove("/tmp/frostline-that-is-not-there")  # noqa: PTH107


def run_something() -> None:
    subprocess.run(["true"], check=True)


def test_the_promise_can_be_broken(tmp_path: Path) -> None:
    check(refuse, tmp_path)
    check(lambda: (tmp_path / "own").write_text("x"), tmp_path)
    for broken in (fail, lambda: 1 / 0, write_elsewhere, delete_elsewhere, run_something):
        with pytest.raises(AssertionError, match=r"exit code 1|not its own"):
            check(broken, tmp_path)
    Path("/tmp/frostline-elsewhere").unlink()


def test_the_command_prints_how_many_inputs_it_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--examples", "20", "--only", "deepspeed", "--seed", "1"])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "20 inputs, seed 1: promise kept"
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--streams", "40", "--only", "rank_channel", "--seed", "1"])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "40 inputs, seed 1: promise kept"
