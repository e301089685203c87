"""Broadcast failures: every rank hears at once when another one fails, is killed, or was asked to stop.

A rank that waits for another one in a collective does not learn that it has gone: NCCL waits for half an hour, gloo
reports a closed connection and hides the true error under its own. So each rank keeps one TCP connection to rank 0.
A rank that fails says its last error there before it leaves; the kernel closes the connection of one that is killed.
Rank 0 passes the news on, and all others leave with the same exit code and one line in the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from toolkit.runtime import signals

_CONNECT_SECONDS = 20.0
_NEWS_SECONDS = 5.0
"""How long a rank whose collective failed waits to hear of another rank's end."""
_ATTRIBUTE = "frostline_failure_broadcast"
"""Of an error that ended a run."""


@dataclass(frozen=True)
class News:
    """The end of a rank before its work was done."""

    rank: int
    last: str
    """Its last error in one line."""
    code: int
    """Its exit code, which all take over; 1 for one that was killed."""

    def __str__(self) -> str:
        """Return one line for the log."""
        return f"rank {self.rank} {self.last}"


class FailureBroadcast:
    """Hold the connections of this rank, and the thread that listens to them."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._token = ""
        self._open: dict[socket.socket, tuple[int, str]] = {}
        """To each rank, and where it runs."""
        self._unread: dict[socket.socket, bytes] = {}
        self._done: set[int] = set()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._failing = self._over = False
        self._news: News | None = None
        self._heard = threading.Event()

    def listen(self) -> tuple[int, str]:
        """Open a port, on rank 0.

        Returns:
            The port, and a password, so that nobody else can end the run.
        """
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", 0), backlog=1024, **family)  # type: ignore[arg-type]
        self._token = secrets.token_hex(16)
        self._selector.register(server, selectors.EVENT_READ)
        self._start()
        return int(server.getsockname()[1]), self._token

    def connect(self, address: str, port: int, token: str) -> None:
        """Connect to rank 0, from any other rank.

        Raises:
            OSError: it cannot be reached.
        """
        connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        connection.settimeout(None)
        self._add(connection, 0, address)
        self._send(connection, {"rank": self._rank, "where": socket.gethostname(), "token": token})
        self._start()

    def tell(self, message: dict[str, Any], but: socket.socket | None = None) -> None:
        """Send ``message`` to every rank that this one is connected to, except ``but``."""
        with self._lock:
            for connection in list(self._open):
                if connection is not but:
                    self._send(connection, message)

    def stop(self, why: str) -> None:
        """Tell the others that this rank was asked to stop."""
        self.tell({"stop": f"{why} (rank {self._rank})"})

    def leave(self) -> None:
        """Tell the others that this rank is done, so that its end is no failure."""
        with self._lock:
            self._over = True
            self.tell({"done": self._rank})

    def attach(self, error: BaseException) -> None:
        """Note these connections on an error that ends the run, for whoever reports it (``broadcast_of``)."""
        setattr(error, _ATTRIBUTE, self)

    def news(self, seconds: float) -> News | None:
        """Return the end of another rank, if it is heard of within ``seconds``."""
        self._heard.wait(seconds)
        return self._news

    def cause(self, error: BaseException) -> News | None:
        """Return the end of another rank that made a collective fail with ``error``; None if the error is our own.

        From now on nothing else ends this rank: it is about to report an error.
        """
        with self._lock:
            self._failing = True
        return self.news(_NEWS_SECONDS) if _is_communication(error) else None

    def report(self, last: str, code: int) -> None:
        """Tell the others the last error of this rank, which is in its log by now."""
        self.tell({"failed": self._rank, "last": f"failed: {last}", "code": code})

    def _start(self) -> None:
        threading.Thread(target=self._listen, name="frostline-failures", daemon=True).start()

    def _add(self, connection: socket.socket, rank: int, where: str) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a node that lost its power closes nothing
        for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with self._lock:
            self._open[connection] = rank, where
        self._unread[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _listen(self) -> None:
        while True:
            for key, _ in self._selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection in self._open:
                    self._receive(connection)
                else:
                    accepted, (where, *_) = connection.accept()
                    self._add(accepted, -1, str(where))

    def _receive(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(65536)
        except OSError:
            received = b""
        *lines, rest = (self._unread[connection] + received).split(b"\n")
        self._unread[connection] = rest
        for line in lines:
            try:
                message = json.loads(line)
                self._take(connection, dict(message))
            except (ValueError, TypeError):  # no rank of this run
                received = b""
        if not received:
            self._selector.unregister(connection)
            with self._lock:
                rank, where = self._open.pop(connection)
            connection.close()
            if rank >= 0 and rank not in self._done:
                self._lost(News(rank, f"({where}) ended without a last word: it was killed or crashed", 1), connection)

    def _take(self, connection: socket.socket, message: dict[str, Any]) -> None:
        rank, _ = self._open[connection]
        if rank < 0:
            if message.get("token") != self._token:
                raise ValueError("not one of this run's ranks")
            with self._lock:
                self._open[connection] = int(message["rank"]), str(message["where"])
        elif "stop" in message:
            signals.request_stop(str(message["stop"]), tell=False)
            self._pass_on(message, connection)
        elif "done" in message:
            self._done.add(rank)
        elif "failed" in message:
            self._done.add(rank)
            self._lost(News(int(message["failed"]), str(message["last"]), int(message["code"])), connection)

    def _pass_on(self, message: dict[str, Any], source: socket.socket) -> None:
        if self._rank == 0:
            self.tell(message, but=source)

    def _lost(self, news: News, source: socket.socket) -> None:
        """Leave with the rank that has gone, unless this one is about to say why it goes itself."""
        self._pass_on({"failed": news.rank, "last": news.last, "code": news.code}, source)
        with self._lock:
            if self._news is None:
                self._news = news
            self._heard.set()
            if not self._failing and not self._over:
                say(self._rank, news)
                sys.stdout.flush()
                os._exit(news.code)

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has gone, which the listening thread sees
            connection.sendall(json.dumps(message).encode() + b"\n")


def connect_ranks(
    rank: int, size: int, address: str, share: Callable[[Any], Any]
) -> tuple[FailureBroadcast | None, str | None]:
    """Connect all ranks; every rank calls it.

    Args:
        rank: this one.
        size: how many there are.
        address: under which all reach rank 0's node.
        share: gives every rank what rank 0 passes it.

    Returns:
        The connections, None for a single rank; and why this rank is not connected, if so: whether others have gone,
        it then learns from its launcher only.
    """
    if size == 1:
        signals.ranks_connected()
        return None, None
    failures, trouble = FailureBroadcast(rank), None
    port, token = share(failures.listen() if rank == 0 else None)
    if rank:
        try:
            failures.connect(address, port, token)
        except OSError as error:
            trouble = f"rank {rank} cannot reach rank 0 at {address}, port {port} ({error})"
    signals.ranks_connected(failures.stop)
    return failures, trouble


def broadcast_of(error: BaseException) -> FailureBroadcast | None:
    """Return the connections of the ranks that ``error`` ended, as ``FailureBroadcast.attach`` noted them on it."""
    failures = getattr(error, _ATTRIBUTE, None)
    return failures if isinstance(failures, FailureBroadcast) else None


def say(rank: int, heard: News) -> None:
    """Print the one line of a rank that ends because another one has gone."""
    print(f"[rank {rank}] stopped, because {heard}", file=sys.stderr, flush=True)


def _is_communication(error: BaseException | None) -> bool:
    """Return True if a collective raised it, or what it was raised from."""
    while error is not None:
        trace: TracebackType | None = error.__traceback__
        while trace is not None:
            if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(("torch.distributed", "deepspeed.comm")):
                return True
            trace = trace.tb_next
        if any(word in str(error) for word in ("gloo", "NCCL")):
            return True
        error = error.__cause__ or error.__context__
    return False
