"""The ranks' channel: who has not the key hears nothing, costs a bounded amount, and cannot end what listens."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fuzz_channel import Ranks, besiege, send

from toolkit.runtime import rank_channel, rank_entrance
from toolkit.runtime.rank_entrance import MOST_UNPROVED, Entrance

KEY = b"k" * 32


@pytest.fixture
def entrance() -> Iterator[Entrance]:
    with selectors.DefaultSelector() as selector:
        opened = Entrance(rank_channel.listen("127.0.0.1"), KEY, selector, size=3)
        yield opened
        if opened.server.fileno() >= 0:
            opened.close()


def address_of(entrance: Entrance) -> tuple[str, int]:
    host, port = entrance.server.getsockname()
    return str(host), int(port)


def serve(entrance: Entrance, seconds: float = 0.3) -> list[int]:
    """Serve until nothing has happened for a while; the ranks that were let in."""
    joined = []
    while ready := entrance.selector.select(seconds):
        for key, _ in ready:
            if key.fileobj is entrance.server:
                entrance.accept()
            elif entrance.holds(key.fileobj):
                assert isinstance(key.fileobj, socket.socket)
                if proved := entrance.receive(key.fileobj):
                    joined.append(proved[0])
                    key.fileobj.close()
    return joined


def join(entrance: Entrance, key: bytes, rank: int) -> tuple[list[int], socket.socket | OSError]:
    """Let a rank connect; the ranks that were let in, and its connection or its error."""
    outcome: list[socket.socket | OSError] = []

    def connect() -> None:
        try:
            outcome.append(rank_channel.connect(*address_of(entrance), key, rank, seconds=1))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    joined = serve(entrance)
    thread.join()
    return joined, outcome[0]


def test_a_rank_with_the_key_is_let_in_once(entrance: Entrance) -> None:
    joined, connection = join(entrance, KEY, 1)
    assert joined == [1]
    assert isinstance(connection, socket.socket)
    again, error = join(entrance, KEY, 1)
    assert again == []
    assert isinstance(error, OSError)
    connection.close()


@pytest.mark.parametrize(("key", "rank"), [(b"x" * 32, 1), (KEY, 0), (KEY, 3)])
def test_a_wrong_key_or_rank_is_not_let_in(entrance: Entrance, key: bytes, rank: int) -> None:
    joined, error = join(entrance, key, rank)
    assert joined == []
    assert isinstance(error, OSError)


def test_the_key_is_not_sent_and_a_recording_proves_nothing(entrance: Entrance) -> None:
    hello = rank_channel.hello_of(KEY, 1, b"n" * 32)
    sent = []
    for _ in range(2):
        with socket.create_connection(address_of(entrance)) as connection:
            connection.sendall(hello)
            serve(entrance)
            sent.append(connection.recv(100))
            connection.sendall(rank_channel.mac_of(KEY, b"proof", 1, b"n" * 32, b"m" * 32))
            assert serve(entrance) == []
            assert connection.recv(100) == b""
    assert sent[0] != sent[1]
    assert KEY not in hello + sent[0] + sent[1]


def test_a_rank_refuses_a_stranger_at_rank_0s_port() -> None:
    with rank_channel.listen("127.0.0.1") as server:

        def pretend() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(68, socket.MSG_WAITALL)
                connection.sendall(b"m" * 64)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(OSError, match="not this run's rank 0"):
            rank_channel.connect("127.0.0.1", server.getsockname()[1], KEY, 1, seconds=5)
        thread.join()


def test_connections_that_say_nothing_are_bounded_and_dropped(
    entrance: Entrance, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = [socket.create_connection(address_of(entrance)) for _ in range(MOST_UNPROVED + 20)]
    serve(entrance)
    assert len(entrance._unproved) == MOST_UNPROVED
    joined, connection = join(entrance, KEY, 2)
    assert joined == [2], "a rank is let in although the place is crowded"
    assert len(entrance._unproved) < MOST_UNPROVED
    now = time.monotonic() + rank_entrance._PROOF_SECONDS + 1
    monkeypatch.setattr(rank_entrance.time, "monotonic", lambda: now)
    entrance.tick()
    assert not entrance._unproved
    for opened in (*strangers, connection):
        opened.close()


def test_no_more_is_read_of_a_stranger_than_a_hello_takes(entrance: Entrance) -> None:
    with socket.create_connection(address_of(entrance)) as stranger:
        stranger.sendall(b"x" * 67)
        serve(entrance)
        (held,) = entrance._unproved.values()
        assert len(held.received) == 67
        stranger.sendall(b"x" * 65536)
        serve(entrance)
        assert not entrance._unproved


def test_ranks_of_one_node_meet_on_loopback_and_others_at_the_address_that_they_use() -> None:
    here, there = ("a", "127.0.1.1"), ("b", "10.0.0.1")
    assert [rank_channel.choose_address([here, here], rank) for rank in (0, 1)] == ["127.0.0.1"] * 2
    assert [rank_channel.choose_address([here, here, there], rank) for rank in range(3)] == ["10.0.0.1"] * 3
    nat = ("c", "10.9.9.9")
    assert [rank_channel.choose_address([here, there, nat], rank) for rank in range(3)] == ["", "10.0.0.1", "10.9.9.9"]
    assert rank_channel.node_identity() == rank_channel.node_identity()


def test_strangers_neither_hear_nor_end_ranks_that_meet_afterwards(tmp_path: Path) -> None:
    assert besiege(tmp_path, 200, 0) == 200


def test_rank_0_listens_on_loopback_and_only_until_all_ranks_are_in(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    try:
        ranks.start(0, "wait")
        host, port = ranks.address()
        process = psutil.Process(ranks.processes[0].pid)
        assert {one.laddr.ip for one in process.net_connections("inet") if one.status == "LISTEN"} == {"127.0.0.1"}
        with socket.create_connection((host, port)) as early:
            ranks.start(1, "fail")
            told = ranks.ends()
            assert early.recv(100) == b"", "a stranger heard of the failure"
    finally:
        ranks.kill()
    assert [code for code, _, _ in told] == [1, 1]
    assert told[0][2] == "[rank 0] stopped, because rank 1 failed: ValueError: the true error\n"
    assert send((host, port), b"x") == b""


def test_rank_0_survives_that_descriptors_run_out_and_says_so(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    try:
        ranks.start(0, "until asked", limit=40)
        address = ranks.address()
        strangers = [socket.create_connection(address) for _ in range(60)]
        ranks.start(1, "signal")
        told = ranks.ends()
        for stranger in strangers:
            stranger.close()
    finally:
        ranks.kill()
    assert [code for code, _, _ in told] == [0, 0]
    assert told[0][1] == "SIGUSR1 (rank 1)\n"
    assert told[0][2].count("cannot accept the other ranks' connections (Too many open files)") == 1
