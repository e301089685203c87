"""Activation stores under rough treatment, each in a forked child: killed, many at once, starved of disk.

Run as a script, so that torch is loaded once for all of them: ``store_worker.py DIRECTORY`` prints what came of each.
What the other tests of the store share is in ``store_samples``.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from store_samples import WIDTH, key, leftovers, open_store, same, samples, size_of, value

from toolkit.activation_cache.eviction import locked


def start(work: Callable[[], object]) -> int:
    """Do ``work`` in a forked process; its exit code is 0, 1 after an exception, or its own."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def answer(work: Callable[[], object]) -> dict[str, object]:
    """The exit code of ``work`` in a forked process, and what it returned; only the code where it failed."""
    sender, receiver = os.pipe()
    child = start(lambda: os.write(receiver, json.dumps(work()).encode()))
    os.close(receiver)
    with os.fdopen(sender) as file:
        text = file.read()
    code = exit_code(child)
    return {"code": code, "result": json.loads(text)} if code == 0 else {"code": code}


CALLS = ("open", "write", "utime", "fsync", "close", "replace", "unlink")
KILLED = 9


def die_at(point: int) -> list[str]:
    """Let the process end at its ``point``-th call that touches the disk; a write is left half done.

    Returns:
        The calls so far, which grows.
    """
    made: list[str] = []

    def patched(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            made.append(name)
            if len(made) > point:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os._exit(KILLED)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, patched(name, getattr(os, name)))
    return made


def kill_everywhere(directory: Path, before: tuple[int, ...]) -> dict[str, object]:
    """A run that stores samples 3 and 4, killed at each of its calls in turn.

    Args:
        directory: for the stores.
        before: samples that an earlier run has stored; none starts from nothing.

    Returns:
        The calls, and for each a list of what was wrong afterwards.
    """
    calls_file = directory / "calls.json"

    def run(root: Path, point: int) -> None:
        made = die_at(point)
        with open_store(root) as store:
            store.write(samples([3, 4]))
        calls_file.write_text(json.dumps(made))

    def prepared(name: str) -> Path:
        if before:
            with open_store(directory / name) as store:
                store.write(samples(before))
        return directory / name

    counted = prepared("counted")
    assert exit_code(start(lambda: run(counted, 10**9))) == 0
    calls = json.loads(calls_file.read_text())
    faults = []
    for point in range(len(calls)):
        root = prepared(f"point-{point}")
        code = exit_code(start(lambda root=root, point=point: run(root, point)))
        faults.append([] if code == KILLED else [f"exit code {code}"])
        faults[-1] += look_after(root, before)
    return {"calls": calls, "faults": faults}


def look_after(root: Path, before: tuple[int, ...]) -> list[str]:
    """What is wrong with a store that a killed run left behind."""
    faults = []
    with open_store(root) as store:
        if len(leftovers(root)) != 1:
            faults.append(f"left: {leftovers(root)}")
        faults += [f"lost {number}" for number in before if not same(store.read(key(number)), value(number))]
        for number in (3, 4):
            found = store.read(key(number))
            if found is not None and not same(found, value(number)):
                faults.append(f"wrong {number}")
        store.write(samples([3, 4]))
        faults += [
            f"not stored again: {number}" for number in (3, 4) if not same(store.read(key(number)), value(number))
        ]
        if store.statistics.damaged or store.statistics.failed:
            faults.append(store.summary())
    return faults


def crowd(directory: Path, limit: int | None, writers: int = 4, count: int = 40) -> dict[str, object]:
    """Several processes fill one store with the same samples at once, each in another order, and read as they go."""
    gate, opener = os.pipe()

    def fill(writer: int) -> None:
        os.close(opener)
        os.read(gate, 1)  # until the parent closes its end
        order = [(number * (2 * writer + 3) + writer) % count for number in range(count)]
        with open_store(directory, limit=limit) as store:
            for number in order:
                found = store.read(key(number))
                assert found is None or same(found, value(number))
                store.write(samples([number, (number + 1) % count]))
                if limit:
                    with locked(directory):
                        assert size_of(directory) <= limit
            read = [store.read(key(number)) for number in order]
            assert all(found is None or same(found, value(number)) for found, number in zip(read, order, strict=True))
            assert limit or None not in read
            assert not store.statistics.damaged
            assert limit or not store.statistics.failed

    children = [start(lambda writer=writer: fill(writer)) for writer in range(writers)]
    os.close(opener)
    codes = [exit_code(child) for child in children]
    with open_store(directory) as store:
        found = [number for number in range(count) if same(store.read(key(number)), value(number))]
        return {"codes": codes, "found": len(found), "missing": len(store.missing(map(key, range(count))))}


def starve(directory: Path) -> dict[str, object]:
    """A store on a disk that takes only part of what it writes: it must go on, and give nothing wrong."""
    with open_store(directory) as store:
        for number in range(40):
            rows = 1000 if number % 2 else 4000  # 16 and 64 kB
            store.write({key(number): torch.full((rows, WIDTH), float(number)).bfloat16()})
        found = [store.read(key(number)) for number in range(40)]
        right = [number for number, tensor in enumerate(found) if tensor is not None and bool((tensor == number).all())]
        return {
            "stored": store.statistics.stored,
            "failed": store.statistics.failed,
            "right": len(right),
            "none": found.count(None),
            "left": [name for name in leftovers(directory) if name.endswith(".partial")],
        }


def short_files(directory: Path) -> dict[str, object]:
    """``starve`` where no file may be longer than 32 KiB, so that each write ends half way."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, resource.RLIM_INFINITY))
    return starve(directory)


def full_disk(directory: Path) -> dict[str, object] | None:
    """``starve`` on a file system of 1 MiB; none where the process may not mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_users, private = 0x20000, 0x10000000, (1 << 18) | (1 << 14)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts | new_users):
        return None
    try:
        for file, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{file}").write_text(line)
    except PermissionError:
        return None
    if libc.mount(None, b"/", None, private, None) or libc.mount(
        b"none", os.fsencode(directory), b"tmpfs", 0, b"size=1m"
    ):
        return None
    return starve(directory)


def read_only(_: Path) -> dict[str, object]:
    """A store in a directory that the process may read and not write."""
    with tempfile.TemporaryDirectory(prefix="frostline-store-") as public:  # pytest's own is closed to other users
        directory = Path(public)
        with open_store(directory) as store:
            store.write(samples(range(3)))
        for path in (directory, *directory.rglob("*")):  # its files are its user's alone at first
            path.chmod(0o555)
        result = answer(lambda: as_reader(directory))
        for path in (directory, *directory.rglob("*")):
            path.chmod(0o755)
        return result


def as_reader(directory: Path) -> dict[str, object]:
    """Give up the right to write, then use the store."""
    if os.geteuid() == 0:
        os.setuid(65534)
    with open_store(directory) as store:
        found = [same(store.read(key(number)), value(number)) for number in range(3)]
        store.write(samples([3]))
        room = store.available_bytes()
        return {"found": found, "failed": store.statistics.failed, "read": store.read(key(3)) is None, "room": room}


MODES: dict[str, Callable[[Path], object]] = {
    "kill": lambda directory: kill_everywhere(directory, (0, 1, 2)),
    "kill_first": lambda directory: kill_everywhere(directory, ()),
    "crowd": lambda directory: crowd(directory, None),
    "crowd_within_limit": lambda directory: crowd(directory, 6000),
    "short_files": short_files,
    "full_disk": full_disk,
    "read_only": read_only,
}


def main(directory: Path) -> None:
    """Print the answers of all modes."""
    answers = {}
    for mode, work in MODES.items():
        (directory / mode).mkdir()
        answers[mode] = answer(lambda work=work, mode=mode: work(directory / mode))
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
