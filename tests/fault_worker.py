"""Runs on every rank under a launcher: launch/train.py with one fault on one rank. Not a test itself.

Arguments: FAULT, RANK, then the flags of launch/train.py.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def before(module: str, name: str, act: Any, call: int = 1) -> None:
    """Let ``act`` run before the given call of a function."""
    owner = __import__(module, fromlist=["*"])
    original, calls = getattr(owner, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def fail(text: str) -> Any:
    def act() -> None:
        raise ValueError(text)

    return act


def send(number: int, process: int | None = None) -> Any:
    return lambda: os.kill(process or os.getpid(), number)


def crash() -> None:
    ctypes.string_at(0)


def break_something(fault: str) -> None:
    if fault == "import":
        sys.modules["toolkit.data.prefetch"] = None  # type: ignore[assignment]
    elif fault == "forward":
        before("toolkit.training.trainer", "train_step", fail("the forward went wrong"), call=3)
    elif fault == "checkpoint":
        before("toolkit.checkpoint.saver", "_files_of_rank", fail("the checkpoint went wrong"))
    elif fault == "kill":
        before("toolkit.training.trainer", "train_step", send(signal.SIGKILL), call=3)
    elif fault == "crash":
        before("toolkit.training.trainer", "train_step", crash, call=3)
    elif fault == "signal in the set-up":
        before("toolkit.training.context", "load_for_training", send(signal.SIGUSR1))
    elif fault == "signal to the launcher":
        before("toolkit.training.trainer", "train_step", send(signal.SIGUSR1, os.getppid()), call=3)
    elif fault == "signal to the command":
        command = psutil.Process(os.getppid()).ppid()
        before("toolkit.training.trainer", "train_step", send(signal.SIGUSR1, command), call=3)
    else:
        raise AssertionError(fault)


if __name__ == "__main__":
    position = 2 if sys.argv[1].startswith("--local_rank") else 1
    fault, rank = sys.argv[position : position + 2]
    del sys.argv[position : position + 2]
    if os.environ["RANK"] == rank:
        break_something(fault)
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
