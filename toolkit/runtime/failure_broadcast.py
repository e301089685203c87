"""Broadcast failures: every rank learns at once when another one fails, is killed, or is asked to stop.

A rank that waits in a collective does not notice that another rank has ended: NCCL waits for half an hour, and gloo
reports a closed connection, which hides the original error. So each rank keeps one TCP connection to rank 0. A rank
that fails sends its error there before it exits; the kernel closes the connection of one that is killed. Rank 0
forwards the failure, and all others exit with the same exit code and one line in the log. Who may connect, and how it
proves that, is ``toolkit.runtime.rank_channel``'s.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from toolkit.runtime import rank_channel, signals
from toolkit.runtime.rank_entrance import Entrance

log = logging.getLogger("frostline")

_CONNECT_SECONDS = 20.0
_TICK_SECONDS = 1.0
"""How often rank 0 closes unproved connections, while ranks are missing."""
_MOST_LINE_BYTES = 1 << 16
"""Longest message of a rank."""
_FAILURE_WAIT_SECONDS = 5.0
"""How long a rank whose collective failed waits for the message that another rank has ended."""
_ERROR_ATTRIBUTE = "frostline_failure_broadcast"
"""Attribute under which an exception carries its run's ``FailureBroadcast``."""


@dataclass(frozen=True)
class RankFailure:
    """A rank that ended before its work was done."""

    rank: int
    last_error: str
    """Its error in one line, or how it ended."""
    code: int
    """Its exit code, with which all other ranks exit too; 1 if it was killed."""

    def __str__(self) -> str:
        """Return one line for the log."""
        return f"rank {self.rank} {self.last_error}"


@dataclass
class _Peer:
    """The rank at the other end of a connection that has proved itself."""

    host: str
    rank: int
    partial_line: bytes = b""
    """What it sent after the last newline."""
    has_ended: bool = False
    """True once it has reported that it is done or failed, so that its closed connection is no failure."""


class FailureBroadcast:
    """Connections of this rank to the others, and the thread that listens on them.

    Rank 0 is connected to every rank and forwards messages; any other rank is connected to rank 0 alone.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._entrance: Entrance | None = None
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._is_ending = False
        """True once this rank is done or reports an error of its own, so that it ends by itself, whatever it hears."""
        self._failure: RankFailure | None = None
        self._failure_heard = threading.Event()

    def listen(self, address: str, size: int) -> tuple[int, bytes]:
        """Listen on a free port of ``address`` until ``size`` ranks are connected; called on rank 0.

        Returns:
            The port, and the key with which the other ranks prove themselves, so that no other process can end the run.
        """
        server, key = rank_channel.listen(address), rank_channel.new_key()
        port = int(server.getsockname()[1])
        self._entrance = Entrance(server, key, self._selector, size)
        self._start_listener()
        return port, key

    def connect(self, address: str, port: int, key: bytes) -> None:
        """Connect to rank 0; called on every other rank.

        Raises:
            OSError: rank 0 cannot be reached.
        """
        connection = rank_channel.connect(address, port, key, self._rank, _CONNECT_SECONDS)
        self._add_peer(connection, _Peer(address, 0))
        self.send_to_all({"host": socket.gethostname()})
        self._start_listener()

    def send_to_all(self, message: dict[str, Any], exclude: socket.socket | None = None) -> None:
        """Send ``message`` to every rank that this one is connected to, except through ``exclude``."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for connection in self._peers.keys() - {exclude}:
                with contextlib.suppress(OSError):  # closed at the other end, which the listening thread notices
                    connection.sendall(line)

    def report_stop(self, why: str) -> None:
        """Tell the other ranks that this one was asked to stop."""
        self.send_to_all({"stop": f"{why} (rank {self._rank})"})

    def report_done(self) -> None:
        """Tell the other ranks that this one is done, so that its closed connection does not count as a failure."""
        with self._lock:
            self._is_ending = True
            self.send_to_all({"done": self._rank})

    def wait_for_failure(self, seconds: float) -> RankFailure | None:
        """Wait up to ``seconds`` for the failure of another rank; None if there was none."""
        self._failure_heard.wait(seconds)
        return self._failure

    def find_cause(self, error: BaseException) -> RankFailure | None:
        """Return the failure of another rank that made a collective raise ``error``; None if this rank itself failed.

        From now on a message of another rank no longer ends this process, which is about to report its error.
        """
        with self._lock:
            self._is_ending = True
        return self.wait_for_failure(_FAILURE_WAIT_SECONDS) if _is_communication_error(error) else None

    def report_failure(self, last_error: str, code: int) -> None:
        """Send this rank's error and exit code to the other ranks, which then exit; the error is logged already."""
        self.send_to_all({"failure": astuple(RankFailure(self._rank, f"failed: {last_error}", code))})

    def _start_listener(self) -> None:
        """Start the daemon thread that runs ``_listen``."""
        threading.Thread(target=self._listen, name="frostline-failures", daemon=True).start()

    def _add_peer(self, connection: socket.socket, peer: _Peer) -> None:
        """Register a connection with the listener, with TCP keepalive.

        A node that loses power closes no connection, so only keepalive finds out, after about 50 s.
        """
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        with self._lock:
            self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)

    def _listen(self) -> None:
        """Accept connections and handle what arrives, for ever; the body of the daemon thread."""
        while True:
            try:
                for key, _ in self._selector.select(_TICK_SECONDS if self._entrance else None):
                    assert isinstance(key.fileobj, socket.socket)
                    self._serve(key.fileobj)
                if self._entrance is not None:
                    self._entrance.tick()
                    if self._entrance.is_complete:
                        self._entrance.close()
                        self._entrance = None
            except Exception:  # else a failure of another rank would go unheard from now on
                log.exception("rank %d: unforeseen error of the failure broadcast, which goes on", self._rank)
                time.sleep(_TICK_SECONDS)

    def _serve(self, connection: socket.socket) -> None:
        """Handle one connection that has something to read."""
        entrance = self._entrance
        if peer := self._peers.get(connection):
            self._receive(connection, peer)
        elif entrance is not None and connection is entrance.server:
            entrance.accept()
        elif entrance is not None and entrance.holds(connection) and (proved := entrance.receive(connection)):
            self._add_peer(connection, _Peer(proved[1], proved[0]))

    def _receive(self, connection: socket.socket, peer: _Peer) -> None:
        """Handle the complete lines that a rank has sent; drop its connection if it is closed or invalid."""
        try:
            received = connection.recv(_MOST_LINE_BYTES)
        except OSError:
            received = b""
        *lines, peer.partial_line = (peer.partial_line + received).split(b"\n")
        try:
            for line in lines:
                self._handle_message(dict(json.loads(line)), connection, peer)
            is_valid = len(peer.partial_line) < _MOST_LINE_BYTES
        except (ValueError, TypeError, RecursionError):
            is_valid = False
        if not received or not is_valid:
            self._selector.unregister(connection)
            with self._lock:
                del self._peers[connection]
            connection.close()
            if not peer.has_ended:
                end = f"({peer.host}) ended without a last word: it was killed or crashed"
                self._end_with_peer(RankFailure(peer.rank, end, 1), connection)

    def _handle_message(self, message: dict[str, Any], connection: socket.socket, peer: _Peer) -> None:
        """Handle one message: a rank's host name, a stop request, a rank that is done, or a failure."""
        if "host" in message:
            peer.host = str(message["host"])
        elif "stop" in message:
            signals.request_stop(str(message["stop"]), broadcast=False)
            self.send_to_all(message, exclude=connection)
        elif "done" in message:
            peer.has_ended = True
        elif "failure" in message:
            peer.has_ended = True
            rank, last_error, code = message["failure"]
            self._end_with_peer(RankFailure(int(rank), str(last_error), int(code)), connection)

    def _end_with_peer(self, failure: RankFailure, source: socket.socket) -> None:
        """Forward another rank's failure and exit because of it, unless this rank is ending by itself."""
        self.send_to_all({"failure": astuple(failure)}, exclude=source)
        with self._lock:
            if self._failure is None:
                self._failure = failure
            self._failure_heard.set()
            if not self._is_ending:
                print_failure(self._rank, failure)
                sys.stdout.flush()
                os._exit(failure.code)


@contextlib.contextmanager
def connect_ranks(rank: int, size: int, address: str, broadcast_object: Callable[[Any], Any]) -> Iterator[None]:
    """Connect every rank to rank 0 for the body; a collective.

    An error of the body carries the connections (``get_broadcast``), so that ``run_command`` can send it to the others.
    ``address`` is where rank 0 listens and another rank finds it, see ``rank_channel.choose_address``;
    ``broadcast_object`` returns rank 0's argument on every rank.
    """
    if size == 1:
        signals.mark_ranks_connected()
        yield
        return
    failures = FailureBroadcast(rank)
    port, key = broadcast_object(failures.listen(address, size) if rank == 0 else None)
    if rank:
        try:
            failures.connect(address, port, key)
        except OSError as error:
            log.error("rank %d cannot reach rank 0 at %s, port %d (%s); if another rank fails, this one hears of it "
                      "from its launcher only", rank, address, port, error)  # fmt: skip
    signals.mark_ranks_connected(failures.report_stop, failures.report_failure)
    try:
        yield
    except Exception as error:
        setattr(error, _ERROR_ATTRIBUTE, failures)
        raise
    failures.report_done()


def get_broadcast(error: BaseException) -> FailureBroadcast | None:
    """Return the connections that ``connect_ranks`` put on ``error``; None if it carries none."""
    failures: FailureBroadcast | None = getattr(error, _ERROR_ATTRIBUTE, None)
    return failures


def print_failure(rank: int, failure: RankFailure) -> None:
    """Print the line with which a rank ends because another one has failed."""
    print(f"[rank {rank}] stopped, because {failure}", file=sys.stderr, flush=True)


def _is_communication_error(error: BaseException | None) -> bool:
    """Return True if a collective raised ``error`` or any error that it was raised from."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if str(frame.f_globals.get("__name__", "")).startswith(("torch.distributed", "deepspeed.comm")):
                return True
        if any(word in str(error) for word in ("gloo", "NCCL")):
            return True
        error = error.__cause__ or error.__context__
    return False
