"""Runs as one of several ranks without torch: join the others, then do what the test says. Not a test itself.

Arguments: RANK, SIZE, FOLDER for the address, and one of wait, fail, kill, usage, signal, until asked, done.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toolkit.commands.cli import run_command
from toolkit.runtime import signals
from toolkit.runtime.errors import DataError
from toolkit.runtime.failure_broadcast import connect_ranks

rank, size, folder, deed = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)


def share(value: object) -> tuple[int, bytes]:
    file = folder / "address"
    if isinstance(value, tuple):
        file.with_suffix(".new").write_text(f"{value[0]} {value[1].hex()}")
        file.with_suffix(".new").replace(file)
    while not file.exists():
        time.sleep(0.01)
    port, key = file.read_text().split()
    return int(port), bytes.fromhex(key)


def arrive() -> None:
    """Wait until all ranks are there."""
    (folder / f"here-{rank}").touch()
    while len(list(folder.glob("here-*"))) < size:
        time.sleep(0.01)


def act() -> None:
    """Do what the test says."""
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "fail":
        raise ValueError("the true error")
    if deed == "usage":
        raise DataError("row 7 is bad")
    if deed == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    if deed in ("signal", "until asked"):
        while not signals.stop_requested():
            time.sleep(0.01)
        print(signals.stop_reason())
    elif deed == "wait":
        threading.Event().wait(60)


def main() -> int:
    with signals.record_signals():
        with connect_ranks(rank, size, "127.0.0.1", share):
            arrive()
            act()
        (folder / f"parted-{rank}").touch()
        while len(list(folder.glob("parted-*"))) < size:
            time.sleep(0.01)
        return 0


if __name__ == "__main__":
    code = run_command(main)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)
