"""Byte streams of strangers against the ranks' channel, and two ranks that must meet and hear one another all the same.

Not a test itself: ``fuzz.py`` and ``test_rank_channel.py`` use it.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT, clean_environment

_SEEDS = (
    b'{"rank":1,"host":"x","token":"%s"}\n' % (b"0" * 32), b'{"stop":"me"}\n', b'{"failure":[1,"x",0]}\n',
    b'{"done":1}\n', b"[" * 60000 + b"\n", b'{"a":' * 500 + b"1" + b"}" * 500 + b"\n", b"null\n", b"1" * 5000 + b"\n",
    b"\xff\xfe{\n", b"\0\0\0{\n", b'{"token":NaN}\n', b"\n" * 1000, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01", b"\0\0\0\1" + b"n" * 32 + b"m" * 32, b"\0\0\0\1" + b"n" * 32 + b"m" * 32 + b"p" * 32,
    b"\xff" * 68, b"", b"\0",
)  # fmt: skip
"""Messages of this version and of those before it, other protocols, and hellos that nobody signed."""


def streams(count: int, seed: int) -> Iterator[bytes]:
    """Yield what strangers send: the seeds first, then changed ones."""
    source = random.Random(seed)
    for index in range(count):
        content = bytearray(_SEEDS[index] if index < len(_SEEDS) else source.choice(_SEEDS))
        if content and index >= len(_SEEDS):
            for _ in range(source.randrange(6)):
                content[source.randrange(len(content))] = source.randrange(256)
            del content[source.choice((len(content), source.randrange(len(content)))) :]
        yield bytes(content)


def send(address: tuple[str, int], content: bytes, abort: bool = False) -> bytes:
    """Send as a stranger, and return what was said to it by the time its end was closed."""
    heard = b""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as stranger:
        if abort:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.sendall(content)
        if not abort:
            stranger.shutdown(socket.SHUT_WR)
            heard = stranger.recv(4096)
    return heard


class Ranks:
    """Processes of ``peer_worker.py`` that have not all been started yet."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.processes = folder, size, []

    def start(self, rank: int, deed: str, limit: int | None = None) -> None:
        command = [sys.executable, str(ROOT / "tests" / "peer_worker.py"), str(rank), str(self.size), str(self.folder)]
        limited = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "_"] if limit else []
        self.processes.append(
            subprocess.Popen(
                [*limited, *command, deed],
                env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip

    def address(self) -> tuple[str, int]:
        """Return where rank 0 listens, once it does."""
        end = time.monotonic() + 60
        while not (self.folder / "address").exists():
            assert time.monotonic() < end, "rank 0 does not listen"
            time.sleep(0.01)
        return "127.0.0.1", int((self.folder / "address").read_text().split()[0])

    def ends(self) -> list[tuple[int, str, str]]:
        """Return exit code, output and errors of each rank."""
        try:
            told = [process.communicate(timeout=60) for process in self.processes]
        finally:
            self.kill()
        return [(process.returncode, *both) for process, both in zip(self.processes, told, strict=True)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


def besiege(folder: Path, count: int, seed: int) -> int:
    """Send ``count`` streams while rank 1 of 2 is missing; then it joins, and its signal is heard.

    Raises:
        AssertionError: a stranger was answered, or the ranks did not hear one another.
    """
    ranks = Ranks(folder, 2)
    try:
        ranks.start(0, "until asked")
        address = ranks.address()
        heard = [send(address, content, abort=index % 3 == 2) for index, content in enumerate(streams(count, seed))]
        assert not any(heard), f"strangers heard {next(filter(None, heard))!r}"
        ranks.start(1, "signal")
        told = ranks.ends()
    finally:
        ranks.kill()
    assert [code for code, _, _ in told] == [0, 0], told
    assert [output for _, output, _ in told] == ["SIGUSR1 (rank 1)\n", "SIGUSR1\n"], json.dumps(told)
    assert not told[0][2], told[0][2]
    return count
