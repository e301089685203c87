"""Nothing waits in silence: what it waits for is said, it ends at a limit, and a signal ends it meanwhile."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from store_samples import key, open_store, samples, value

from toolkit.activation_cache import eviction
from toolkit.data import token_cache
from toolkit.engine.deepspeed import machine
from toolkit.runtime import file_lock, signals
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import UsageError
from toolkit.runtime.file_lock import FileLock

LIMIT = 60
"""Seconds after which a process counts as hanging."""


def start(*words: str, **options: object) -> subprocess.Popen[str]:
    """Start a process that records signals, and return once it does."""
    command = [sys.executable, str(ROOT / "tests" / "wait_worker.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process: subprocess.Popen[str] = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    if process.stdout is not None:
        assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A file whose lock another process holds, as one does that has opened it for reading alone."""
    path = tmp_path / "held"
    path.touch()
    hold = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, 1); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield path
        holder.kill()


def test_a_lock_that_is_held_is_said_and_given_up_at_the_limit(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(file_lock.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(file_lock, "_SAY_SECONDS", 0.1)
    lock = FileLock(held)
    with pytest.raises(TimeoutError, match=r"process \d+ \(python.*has held its lock"):
        lock.wait(0.3)
    (message,) = said
    assert f"waiting for the lock {held}, which process " in message
    with signals.record_signals({}):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(InterruptedError):
            lock.wait(600)
    lock.release()


def test_a_cache_whose_lock_is_held_is_not_waited_for_at_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "_MOST_SECONDS", 0.2)
    with open_store(tmp_path, limit=1 << 20) as store:
        store.write(samples([1]))
        reader = os.open(tmp_path / ".lock", os.O_RDONLY)
        fcntl.flock(reader, fcntl.LOCK_SH)
        store.write(samples([2]))
        assert store.available_bytes() == 0
        os.close(reader)
        store.write(samples([3]))
        assert (store.statistics.stored, store.statistics.failed) == (1, 2)
        found = store.read(key(1))
        assert found is not None
        assert found.equal(value(1))


def test_a_token_store_that_another_process_never_finishes_is_made_alone(
    held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_MOST_SECONDS", 0.2)
    with pytest.raises(TimeoutError), token_cache._lock(held):
        pass


@pytest.mark.parametrize("age", [3600, 0])
def test_a_build_lock_that_nobody_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int) -> None:
    monkeypatch.setattr(machine, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(machine, "_STALE_SECONDS", 0.5 if age == 0 else 60)
    (tmp_path / "lock").touch()
    for path in (tmp_path / "lock", tmp_path):
        os.utime(path, (time.time() - age,) * 2)
    with pytest.raises(UsageError, match=r"lock was left by a build .* was killed.*remove it: rm "):
        machine._wait_for_build(tmp_path / "lock")


def test_a_build_that_is_under_way_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(machine, "_STALE_SECONDS", 0.0)
    lock = tmp_path / "lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    assert str(os.getpid()) in str(machine._builder(lock))
    timer = threading.Timer(0.3, lock.unlink)
    timer.start()
    machine._wait_for_build(lock)
    assert not lock.exists()
    os.close(descriptor)
    timer.join()


def test_every_operator_of_deepspeed_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    machine.check_machine(World())
    (tmp_path / "deepspeed_shm_comm").mkdir()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (0, 0))
    with pytest.raises(UsageError, match=str(lock)):
        machine.check_machine(World())


def test_a_small_dev_shm_is_seen_before_deepspeed_crashes_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    small = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))  # 64 MiB
    monkeypatch.setattr(machine.os, "statvfs", lambda path: small)
    with pytest.raises(UsageError, match=r"/dev/shm has 64 MiB free; DeepSpeed on CPUs needs 132 MiB .* 2 rank"):
        machine._check_shared_memory(World(0, 0, 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="needs 264 MiB"):
        machine._check_shared_memory(World(0, 0, 8))


def test_what_a_rank_waits_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = threading.Event()
    monkeypatch.setattr(signals, "_SAY_SECONDS", 0.01)
    monkeypatch.setattr(signals.log, "warning", lambda text, *values: "the tide" in text % values and said.set())
    with signals.waiting("the tide"):
        assert said.wait(LIMIT)


@pytest.mark.parametrize("words", [("wait",), ("build", "FOLDER")], ids=["wait", "build"])
def test_a_signal_ends_a_wait_for_something_else(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "lock").touch()
    process = start(*(str(tmp_path) if word == "FOLDER" else word for word in words))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == signals.STOPPED
    assert "stopped by SIGTERM while waiting for " in errors


def test_the_first_ctrl_c_stops_as_any_signal() -> None:
    process = start("stop")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == signals.STOPPED
    assert "Ctrl-C again leaves at once" in errors
    assert "stopped by SIGINT\n" in errors  # before or after it: another thread prints that


def test_the_second_ctrl_c_leaves_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now, codes = [100.0], list[int]()
    monkeypatch.setattr(signals, "_state", signals._State())
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    signals._note_interrupt({"RANK": "0"})
    signals._note_interrupt({"RANK": "0"})  # the same one, as a launcher passes it on
    assert not codes
    now[0] += 2
    signals._note_interrupt({"RANK": "0"})
    assert codes == [130]
    assert capsys.readouterr().err.count("leaves at once") == 1


def test_a_run_whose_terminal_is_closed_stops_as_by_any_signal() -> None:
    master, slave = pty.openpty()
    process = start("stop", stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    assert os.read(master, 100).startswith(b"ready")
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=LIMIT) == signals.STOPPED
