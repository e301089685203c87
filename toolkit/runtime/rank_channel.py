"""Open TCP connections between the ranks of a run, and prove at both ends that the other one belongs to it.

Rank 0 makes a random key, which the others get through the process group; it is never sent over these connections. A
rank that connects speaks first, so that a stranger hears nothing. Each line below is one message; the MACs are
HMAC-SHA256 with the key (RFC 2104), over a word, the rank and both nonces:

    rank r to rank 0:   r, nonce, MAC("hello")
    rank 0 to rank r:   nonce, MAC("challenge")        only if the MAC above is right
    rank r to rank 0:   MAC("proof")                   of rank 0's fresh nonce, so that a recording proves nothing
    rank 0 to rank r:   one byte, READY

Messages are not encrypted, and those after the proof carry no MAC: this keeps out whoever can connect, not whoever can
change what passes between the nodes. Such a one controls torch's own process group too.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import time
from pathlib import Path

log = logging.getLogger("frostline")

READY = b"\x06"
RANK_BYTES, NONCE_BYTES, MAC_BYTES = 4, 32, 32
"""Bytes of each part of a message."""
_RETRY_SECONDS = 0.2


def new_key() -> bytes:
    """Return a random key for one run."""
    return secrets.token_bytes(32)


def node_identity() -> str:
    """Return what tells this node's network from all others: boot id and network namespace, else the host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def resolve(name: str) -> str:
    """Return the address of a host name as this node resolves it; the name itself if it does not."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return name


def choose_address(places: list[tuple[str, str]], rank: int) -> str:
    """Choose where rank 0 listens and where another rank connects: loopback if all ranks are on one node.

    Args:
        places: for each rank its ``node_identity``, and the address that it reaches rank 0's node at.
        rank: this rank.

    Returns:
        For rank 0 the address that ranks on other nodes use, or "" for all of its addresses if those differ.
    """
    node = places[0][0]
    used = {address for other, address in places if other != node}
    if not used:
        return "127.0.0.1"
    if places[rank][0] == node:  # here the name of this node may stand for loopback, as Debian has it
        return used.pop() if len(used) == 1 else ("" if rank == 0 else places[rank][1])
    return places[rank][1]


def listen(address: str) -> socket.socket:
    """Listen on a free port of ``address``; on all addresses, with a warning, if it is not one of this node."""
    if address:
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return socket.create_server((address, 0), family=family, backlog=1024)
        except OSError as error:
            log.warning("rank 0 cannot listen at %s (%s), and does so on all addresses of this node", address, error)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def connect(address: str, port: int, key: bytes, rank: int, seconds: float) -> socket.socket:
    """Connect to rank 0 and prove that this is ``rank``; try again while it is closed before it is proved.

    Raises:
        OSError: rank 0 cannot be reached within ``seconds``, or what answers there is not rank 0.
    """
    end = time.monotonic() + seconds
    while True:
        connection = None
        try:
            connection = socket.create_connection((address, port), timeout=max(end - time.monotonic(), 0.1))
            _prove(connection, key, rank, end)
            connection.settimeout(None)
        except (ConnectionError, EOFError) as error:  # strangers crowd rank 0, and it made room for others
            if connection is not None:
                connection.close()
            if time.monotonic() + _RETRY_SECONDS > end:
                raise OSError(str(error) or "closed before it was proved") from None
            time.sleep(_RETRY_SECONDS)
        except OSError:
            if connection is not None:
                connection.close()
            raise
        else:
            return connection


def _prove(connection: socket.socket, key: bytes, rank: int, end: float) -> None:
    """Exchange the messages of the module's docstring, as rank ``rank``."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(hello_of(key, rank, nonce))
    challenge = _receive_exactly(connection, NONCE_BYTES + MAC_BYTES, end)
    other, mac = challenge[:NONCE_BYTES], challenge[NONCE_BYTES:]
    if not hmac.compare_digest(mac, mac_of(key, b"challenge", rank, nonce, other)):
        raise OSError("what answers there is not this run's rank 0")
    connection.sendall(mac_of(key, b"proof", rank, nonce, other))
    _receive_exactly(connection, len(READY), end)


def _receive_exactly(connection: socket.socket, count: int, end: float) -> bytes:
    """Receive ``count`` bytes; EOFError if the connection is closed before, TimeoutError after ``end``."""
    received = b""
    while len(received) < count:
        connection.settimeout(max(end - time.monotonic(), 0.1))
        piece = connection.recv(count - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received


def hello_of(key: bytes, rank: int, nonce: bytes) -> bytes:
    """Return the first message of a rank, with its fresh nonce."""
    return rank.to_bytes(RANK_BYTES, "big") + nonce + mac_of(key, b"hello", rank, nonce)


def mac_of(key: bytes, word: bytes, rank: int, *nonces: bytes) -> bytes:
    """Return the MAC of a message that is named ``word``."""
    return hmac.digest(key, word + rank.to_bytes(RANK_BYTES, "big") + b"".join(nonces), "sha256")
