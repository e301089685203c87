"""Limit how long and how often the model hub is asked, by whatever library asks, and explain its refusals.

transformers and datasets use ``huggingface_hub``, which retries for minutes when the network is down. Here a request
waits ``TIMEOUT_SECONDS`` for the next byte and is made ``ATTEMPTS`` times. A host that still does not answer is not
asked again in this process: the libraries go on as they do offline, with what the local cache holds.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from toolkit.runtime import signals
from toolkit.runtime.paths import is_directory, is_file
from toolkit.runtime.privacy import users_umask

log = logging.getLogger("frostline")

TIMEOUT_SECONDS = 4.0
"""Longest wait for a connection, and for each next byte, unless HF_HUB_DOWNLOAD_TIMEOUT says otherwise."""
ATTEMPTS = 2
"""How often a request is made in all."""
PAUSE_SECONDS = 1.0
"""Seconds between two attempts."""

_RETRIED_STATUSES = (500, 502, 503, 504)
"""HTTP statuses of a server error, after which a request is made again."""


@dataclass
class _Hosts:
    """The state of the hosts that this process has asked."""

    down: dict[str, str] = field(default_factory=dict)
    """Hosts that are no longer asked, and the fault of each as a sentence."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Last HTTP status of 400 or above, by host."""
    stalls: dict[str, int] = field(default_factory=dict)
    """Downloads in a row that broke off without a further byte, by host."""

    def note_failure(self, host: str, fault: str, attempt: int) -> None:
        """Log a failed attempt; after the last one mark the host as down."""
        if attempt < ATTEMPTS:
            log.warning("%s %s; trying once more", host, fault)
        elif host not in self.down:
            self.down[host] = f"{host} {fault}, {ATTEMPTS} times"
            log.warning("%s: going on with what the local cache holds", self.down[host])


_HOSTS = _Hosts()


def is_hub_id(name: str, may_be_bare: bool = False) -> bool:
    """Return True if ``name`` is to be looked up on the Hub: it has the form ``org/name`` and no local file matches.

    A name whose first part is a local directory counts as a path, mistyped if nothing exists there. A name without an
    organisation, such as ``gpt2``, is accepted if it ``may_be_bare``.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+" + ("|[A-Za-z0-9][\\w.-]*" if may_be_bare else ""), name, re.A):
        return False
    if is_file(name) or is_directory(name):
        return False
    return "/" not in name or not is_directory(Path(name).parent)


@cache
def set_limits() -> None:
    """Make ``huggingface_hub`` use this module's timeouts and retries; call it before the first request."""
    from huggingface_hub import set_client_factory

    set_client_factory(_client_with_limits)


@contextmanager
def downloads(source: str) -> Iterator[None]:
    """Say if the body waits long for ``source``, which it reads through transformers or ``huggingface_hub``.

    Files that it downloads get the user's umask, for a cache of models may be shared. Does nothing for a directory.
    """
    if is_directory(source):
        yield
        return
    with users_umask(), signals.waiting(f"{source}, from the Hub or another process that downloads it"):
        yield


def explain(error: BaseException, name: str, kind: str = "model") -> str | None:
    """Return a message that says what to do about an error of the Hub or the network; None for any other error.

    ``name`` is the requested Hub id, ``kind`` says whether of a ``model`` or ``data set``.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}"
    chain = list(_error_chain(error))
    statuses = {e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)}
    text = " ".join(str(e) for e in chain)
    if any(isinstance(e, errors.GatedRepoError) for e in chain) or "is a gated dataset" in text:
        return (
            f"the {kind} {name} is gated: accept its terms on {page}, then log in with `hf auth login` or set HF_TOKEN"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"the {kind} {name} has not the revision that is asked for; expected a branch, tag or commit of {page}"
    unreached = any(isinstance(e, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)) for e in chain)
    unreached = unreached or "Couldn't reach" in text or "LocalEntryNotFoundError" in text  # datasets drops the causes
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


def _error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all its causes and contexts."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [other for other in (current.__cause__, current.__context__) if other is not None]


def _client_with_limits() -> Any:
    """Return the default client of ``huggingface_hub`` with ``_send_with_limits`` as its ``send``."""
    from huggingface_hub.utils._http import default_client_factory

    client: Any = default_client_factory()
    client.send = partial(_send_with_limits, client.send, import_module(type(client).__module__.partition(".")[0]))
    return client


def _send_with_limits(send: Callable[..., Any], http: Any, request: Any, **options: Any) -> Any:
    """Send ``request`` by the client's original ``send``, with this module's timeouts and retries.

    ``http`` is the module that defines the client: httpx, or what replaces it in later versions.

    Raises:
        OfflineModeIsEnabled: the host is down; the libraries then use their cache, and do not retry.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    host = str(request.url.copy_with(path="/", query=None, fragment=None)).rstrip("/")
    if not any(name in os.environ for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")):
        limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        shorter = {key: min(value or TIMEOUT_SECONDS, TIMEOUT_SECONDS) for key, value in limits.items()}
        request.extensions = {**request.extensions, "timeout": shorter}
    # What is not a download and goes to another host is dispensable, such as a count of downloads: one attempt.
    attempts = ATTEMPTS if options.get("stream") or host == constants.ENDPOINT else 1
    for attempt in range(1, attempts + 1):
        if host in _HOSTS.down:
            raise OfflineModeIsEnabled(_HOSTS.down[host])
        try:
            response = send(request, **options)
        except (http.TimeoutException, http.NetworkError, http.RemoteProtocolError) as error:
            fault = f"does not answer ({type(error).__name__}: {str(error) or f'nothing in {TIMEOUT_SECONDS:g} s'})"
        else:
            if response.status_code >= 400:
                _HOSTS.refusals[host] = response.status_code
            if response.status_code == 429:
                log.warning("%s answers 429, too many requests; it is asked again when it allows that", host)
            if response.status_code not in _RETRIED_STATUSES:
                if options.get("stream"):
                    response.iter_bytes = partial(_read_with_limits, response.iter_bytes, http, host)
                return response
            response.close()
            fault = f"answers {response.status_code}"
        if attempts == 1:
            raise OfflineModeIsEnabled(f"{host} {fault}")
        _HOSTS.note_failure(host, fault, attempt)
        if attempt < attempts:
            time.sleep(PAUSE_SECONDS)
    raise OfflineModeIsEnabled(_HOSTS.down[host])


def _read_with_limits(
    read: Callable[..., Iterator[bytes]], http: Any, host: str, *args: Any, **options: Any
) -> Iterator[bytes]:
    """Yield the bytes of a download; after two stalls without a byte in between its host is marked as down.

    Raises:
        OfflineModeIsEnabled: the host is down.
        ReadTimeout: the download stalled; ``huggingface_hub`` then resumes it.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        for chunk in read(*args, **options):
            _HOSTS.stalls.pop(host, None)
            yield chunk
    except (http.TimeoutException, http.NetworkError, http.RemoteProtocolError) as error:
        _HOSTS.stalls[host] = _HOSTS.stalls.get(host, 0) + 1
        _HOSTS.note_failure(host, f"stopped in the middle of a file ({type(error).__name__})", _HOSTS.stalls[host])
        if host in _HOSTS.down:
            raise OfflineModeIsEnabled(_HOSTS.down[host]) from None
        raise http.ReadTimeout(str(error)) from None  # huggingface_hub resumes after this error
