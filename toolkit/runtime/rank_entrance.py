"""Let the other ranks of a run in at rank 0, and keep everybody else out; see ``toolkit.runtime.rank_channel``."""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field

from toolkit.runtime.rank_channel import MAC_BYTES, NONCE_BYTES, RANK_BYTES, READY, hello_of, mac_of

log = logging.getLogger("frostline")

_PROOF_SECONDS = 10.0
"""How long a connection may take to prove itself."""
MOST_UNPROVED = 64
"""Most connections that have not; another one ends the oldest."""
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of ``accept`` when the process or the machine has no room for a connection."""
_PAUSE_SECONDS = 1.0
"""Pause after such an error, which would return at once otherwise."""


@dataclass
class _Unproved:
    """A connection that has not proved itself."""

    host: str
    end: float
    """When it is closed, on the monotonic clock."""
    received: bytes = b""
    """Of the message that is expected, whose length is the most that is ever read."""
    rank: int = 0
    """Rank that it says it is; 0 before the right hello."""
    proof: bytes = b""
    """The proof that is expected of it."""

    @property
    def lacking(self) -> int:
        """Bytes that the expected message still lacks."""
        return (MAC_BYTES if self.proof else RANK_BYTES + NONCE_BYTES + MAC_BYTES) - len(self.received)


@dataclass
class Entrance:
    """Rank 0's listening socket and the connections that have not proved themselves; closed once all ranks are in.

    Strangers cost at most ``MOST_UNPROVED`` descriptors and 68 bytes each, for ``_PROOF_SECONDS``.
    """

    server: socket.socket
    key: bytes
    selector: selectors.BaseSelector
    size: int
    """Number of ranks."""
    _unproved: dict[socket.socket, _Unproved] = field(default_factory=dict)
    _joined: set[int] = field(default_factory=set)
    _paused_until: float = 0.0
    _has_warned: bool = False

    def __post_init__(self) -> None:
        self.server.setblocking(False)
        self.selector.register(self.server, selectors.EVENT_READ)

    def holds(self, connection: object) -> bool:
        """Return True if ``connection`` has not proved itself."""
        return connection in self._unproved

    def accept(self) -> None:
        """Accept a connection; without a free descriptor say so, close the unproved ones and pause."""
        try:
            connection, (host, *_) = self.server.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._pause(error)
            return  # else it is gone already
        connection.setblocking(False)
        if len(self._unproved) >= MOST_UNPROVED:
            self._drop(min(self._unproved, key=lambda other: self._unproved[other].end))
        self._unproved[connection] = _Unproved(str(host), time.monotonic() + _PROOF_SECONDS)
        self.selector.register(connection, selectors.EVENT_READ)

    def receive(self, connection: socket.socket) -> tuple[int, str] | None:
        """Read what a connection lacks of the expected message; return its rank and host once it has proved itself.

        It is then no longer held here. One that sends anything else is closed without a word.
        """
        unproved = self._unproved[connection]
        try:
            unproved.received += (piece := connection.recv(unproved.lacking))
            if not piece:
                raise ConnectionResetError
            if not unproved.lacking:
                if self._check(unproved, connection):
                    self._forget(connection)
                    self._joined.add(unproved.rank)
                    return unproved.rank, unproved.host
                unproved.received = b""
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            self._drop(connection)
        return None

    def _check(self, unproved: _Unproved, connection: socket.socket) -> bool:
        """Check a whole message and answer it; return True if it was the proof.

        Raises:
            ValueError: it does not come from a rank of this run that is still missing.
        """
        if unproved.proof:
            if not hmac.compare_digest(unproved.received, unproved.proof) or unproved.rank in self._joined:
                raise ValueError("not the proof")
            connection.setblocking(True)
            connection.sendall(READY)
            return True
        rank = int.from_bytes(unproved.received[:RANK_BYTES], "big")
        nonce = unproved.received[RANK_BYTES : RANK_BYTES + NONCE_BYTES]
        known = hmac.compare_digest(unproved.received, hello_of(self.key, rank, nonce))
        if not known or not 0 < rank < self.size or rank in self._joined:
            raise ValueError("not a rank of this run")
        own = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(own + mac_of(self.key, b"challenge", rank, nonce, own))
        unproved.rank, unproved.proof = rank, mac_of(self.key, b"proof", rank, nonce, own)
        return False

    @property
    def is_complete(self) -> bool:
        """True once every other rank is connected."""
        return len(self._joined) == self.size - 1

    def tick(self) -> None:
        """Close what has taken too long, and listen again after a pause; call it every second."""
        now = time.monotonic()
        for connection in [other for other, unproved in self._unproved.items() if now > unproved.end]:
            self._drop(connection)
        if self._paused_until and now > self._paused_until:
            self._paused_until = 0.0
            self.selector.register(self.server, selectors.EVENT_READ)

    def close(self) -> None:
        """Close the listening socket and whatever has not proved itself."""
        for connection in list(self._unproved):
            self._drop(connection)
        if not self._paused_until:
            self.selector.unregister(self.server)
        self.server.close()

    def _pause(self, error: OSError) -> None:
        """Close the unproved connections and stop listening for ``_PAUSE_SECONDS``; say so the first time."""
        if not self._has_warned:
            log.error("rank 0 cannot accept the other ranks' connections (%s), and tries again every second; raise "
                      "the limit of open files (ulimit -n)", error.strerror)  # fmt: skip
        self._has_warned, self._paused_until = True, time.monotonic() + _PAUSE_SECONDS
        for connection in list(self._unproved):
            self._drop(connection)
        self.selector.unregister(self.server)

    def _forget(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        del self._unproved[connection]

    def _drop(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self._forget(connection)
        connection.close()
