"""Limit how long and how often the model hub is asked, by whatever library asks, and explain its refusals.

transformers and datasets ask through ``huggingface_hub``, whose patience with a dead network is minutes. Here a request
waits ``SECONDS`` for the next byte, is made ``ATTEMPTS`` times, and a host that then still gives nothing is not asked
again in this process: the libraries go on as they do offline, with what the local cache holds.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from toolkit.runtime.paths import is_directory, is_file

log = logging.getLogger("frostline")

SECONDS = 4.0
"""Longest wait for a connection, and for each next byte, unless HF_HUB_DOWNLOAD_TIMEOUT says otherwise."""
ATTEMPTS = 2
PAUSE = 1.0
"""Seconds between two attempts."""

_BROKEN = (500, 502, 503, 504)


@dataclass
class _Hosts:
    """The hosts that this process has asked, and how they answered."""

    down: dict[str, str] = field(default_factory=dict)
    """Those that are not asked any more, and what they did."""
    refusals: dict[str, int] = field(default_factory=dict)
    """The last status from 400 on that a host answered with."""
    stalls: dict[str, int] = field(default_factory=dict)
    """Downloads that stopped in the middle, since the last byte."""

    def note(self, host: str, found: str, attempt: int) -> None:
        """Say that an attempt failed, and give the host up after the last."""
        if attempt < ATTEMPTS:
            log.warning("%s %s; trying once more", host, found)
        elif host not in self.down:
            self.down[host] = f"{host} {found}, {ATTEMPTS} times"
            log.warning("%s: going on with what the local cache holds", self.down[host])


_HOSTS = _Hosts()


def is_hub_id(name: str, may_be_bare: bool = False) -> bool:
    """Return True if ``name`` is to be looked up on the Hub: it has the form ``org/name``, and nothing here goes by it.

    A name whose first part is a directory here is a path, mistyped if there is nothing at its end.

    Args:
        name: as a recipe or flag has it.
        may_be_bare: a name without its organisation will do, as of old models.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+" + ("|[A-Za-z0-9][\\w.-]*" if may_be_bare else ""), name, re.A):
        return False
    if is_file(name) or is_directory(name):
        return False
    return "/" not in name or not is_directory(Path(name).parent)


@cache
def set_limits() -> None:
    """Give ``huggingface_hub`` this module's patience; to be called before anything asks the Hub."""
    from huggingface_hub import set_client_factory

    set_client_factory(_client)


def forget_hosts() -> None:
    """Ask hosts again that did not answer."""
    _HOSTS.down.clear()
    _HOSTS.refusals.clear()
    _HOSTS.stalls.clear()


def explain(error: BaseException, name: str, kind: str = "model") -> str | None:
    """Return what the user can do about ``error`` where it is the Hub's or the network's; else None.

    Args:
        error: what a library raised.
        name: the Hub id that was asked for.
        kind: ``model`` or ``data set``.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}"
    chain = list(_chain(error))
    statuses = {e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)}
    text = " ".join(str(e) for e in chain)
    if any(isinstance(e, errors.GatedRepoError) for e in chain) or "is a gated dataset" in text:
        return (
            f"the {kind} {name} is gated: accept its terms on {page}, then log in with `hf auth login` or set HF_TOKEN"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"the {kind} {name} has not the revision that is asked for; expected a branch, tag or commit of {page}"
    unreached = any(isinstance(e, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)) for e in chain)
    unreached = unreached or "Couldn't reach" in text or "LocalEntryNotFoundError" in text  # datasets keeps no chain
    status = _HOSTS.refusals.get(constants.ENDPOINT) if unreached and not _HOSTS.down else None
    unknown = any(isinstance(e, errors.RepositoryNotFoundError) for e in chain) or "doesn't exist on the Hub" in text
    if unknown or status == 404:
        return (
            f"there is no {kind} {name} here, nor one on {constants.ENDPOINT} that you may read; check the name, and "
            "if it is private log in with `hf auth login` or set HF_TOKEN"
        )
    if refused := statuses & {401, 403}:
        return (
            f"{constants.ENDPOINT} refuses the {kind} {name} ({min(refused)}); accept its terms on {page} if it has "
            "some, and log in with `hf auth login` or set HF_TOKEN"
        )
    why = "; ".join(_HOSTS.down.values()) or ("HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "")
    why = why or (f"{constants.ENDPOINT} answers {status}" if status else "")
    if unreached and why:
        return (
            f"there is no {kind} {name} here or in the local cache, and {why}; check the network and HF_ENDPOINT, or "
            f"download the {kind} elsewhere and name its place"
        )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that led to it."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [other for other in (current.__cause__, current.__context__) if other is not None]


def _client() -> Any:
    """Return ``huggingface_hub``'s own client, whose requests go through ``_send``."""
    from huggingface_hub.utils._http import default_client_factory

    client: Any = default_client_factory()
    client.send = partial(_send, client.send, import_module(type(client).__module__.partition(".")[0]))
    return client


def _send(send: Callable[..., Any], http: Any, request: Any, **options: Any) -> Any:
    """Send ``request``, with the limits of this module.

    Args:
        send: of the client.
        http: the module that the client is of, httpx or a later one.
        request: its host is what is given up on.
        options: for ``send``.

    Raises:
        OfflineModeIsEnabled: the host gives nothing; libraries then look into their cache, and do not try again.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    host = str(request.url.copy_with(path="/", query=None, fragment=None)).rstrip("/")
    if not any(name in os.environ for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")):
        limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        shorter = {key: min(value or SECONDS, SECONDS) for key, value in limits.items()}
        request.extensions = {**request.extensions, "timeout": shorter}
    # Other hosts that are not downloaded from serve what the libraries do without, such as a count of downloads.
    attempts = ATTEMPTS if options.get("stream") or host == constants.ENDPOINT else 1
    for attempt in range(1, attempts + 1):
        if host in _HOSTS.down:
            raise OfflineModeIsEnabled(_HOSTS.down[host])
        try:
            response = send(request, **options)
        except (http.TimeoutException, http.NetworkError, http.RemoteProtocolError) as error:
            found = f"does not answer ({type(error).__name__}: {str(error) or f'nothing in {SECONDS:g} s'})"
        else:
            if response.status_code >= 400:
                _HOSTS.refusals[host] = response.status_code
            if response.status_code == 429:
                log.warning("%s answers 429, too many requests; it is asked again when it allows that", host)
            if response.status_code not in _BROKEN:
                if options.get("stream"):
                    response.iter_bytes = partial(_watch, response.iter_bytes, http, host)
                return response
            response.close()
            found = f"answers {response.status_code}"
        if attempts == 1:
            raise OfflineModeIsEnabled(f"{host} {found}")
        _HOSTS.note(host, found, attempt)
        if attempt < attempts:
            time.sleep(PAUSE)
    raise OfflineModeIsEnabled(_HOSTS.down[host])


def _watch(read: Callable[..., Iterator[bytes]], http: Any, host: str, *args: Any, **options: Any) -> Iterator[bytes]:
    """Yield the bytes of a download; one that stalls twice without a byte in between is given up."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        for chunk in read(*args, **options):
            _HOSTS.stalls.pop(host, None)
            yield chunk
    except (http.TimeoutException, http.NetworkError, http.RemoteProtocolError) as error:
        _HOSTS.stalls[host] = _HOSTS.stalls.get(host, 0) + 1
        _HOSTS.note(host, f"stopped in the middle of a file ({type(error).__name__})", _HOSTS.stalls[host])
        if host in _HOSTS.down:
            raise OfflineModeIsEnabled(_HOSTS.down[host]) from None
        raise http.ReadTimeout(str(error)) from None  # which ``huggingface_hub`` goes on from where it stopped
