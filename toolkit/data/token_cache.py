"""Find the token store of a source by what it was made from, or make it: once on a node, by whichever process is first.

    ROOT/<key>.tokens          see ``toolkit.data.token_file``; ROOT is $FROSTLINE_CACHE/tokens, readable by its owner
    ROOT/<key>.fingerprints    SHA-256 of the rows of a run, by how they are split
    ROOT/<key>.lock            held while the store is made

Every file may be removed at any time: what is gone is made again. A store that nobody opened for 30 days is removed
when another one is made.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from toolkit.data.sources import Row
from toolkit.data.token_file import DamagedStoreError, StoreWriter
from toolkit.data.token_store import TokenStore, map_store
from toolkit.data.tokenising import Encoding, encode_all, source_columns
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.errors import DiskError
from toolkit.runtime.file_lock import FileLock
from toolkit.runtime.paths import replace_text, sync_directory
from toolkit.runtime.progress_bar import ProgressBar

log = logging.getLogger("frostline")

KEPT_DAYS = 30
"""Days after its last use after which a store is removed."""
_MOST_SECONDS = 1800.0
"""Longest wait for another process that makes the same store; after it each makes its own."""
_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MODE = 0o600
_OWN_NAME = re.compile(r"[0-9a-f]{64}\.tokens|\.[0-9a-f]{64}-\w+\.partial")
"""What may be removed from the directory."""
"""Of every file: tokens are as private as the rows."""
_MOST_FINGERPRINTS = 256


def find_store(key: str | None, read: Callable[[], Iterable[Row]], encoding: Encoding) -> TokenStore:
    """Return the token store with this key, which is made of the rows that ``read`` gives if there is none.

    Processes of a node that ask for one key wait for the first of them. Without a key, or where the cache cannot be
    written, the store is a temporary file of this process. A full disk is an error: each process would need the room
    again elsewhere, and the time.

    Raises:
        DataError: a row cannot be read.
        DiskError: the disk is full, or a quota is used up.
        StopRequested: a signal came meanwhile.
    """
    if key is not None:
        path = root() / f"{key}.tokens"
        try:
            if (store := _open(path)) is not None:
                return store
            with _lock(path.with_suffix(".lock")) as is_alone:
                if (store := _open(path)) is None:  # nobody made it while this process waited
                    _remove_unused(path.parent)
                    if is_alone:
                        _remove_partial(path)
                    _build(path, read(), encoding)
                    store = _open(path)
                if store is not None:
                    return store
        except OSError as error:
            if error.errno in _IS_FULL:
                raise _no_room(path.parent, "FROSTLINE_CACHE") from None
            log.warning("%s cannot be used (%s): the rows are tokenised for this process alone", path.parent, error)
    try:
        with tempfile.TemporaryFile(prefix="frostline-tokens-") as file:
            with StoreWriter(file) as writer:
                _fill(writer, read(), encoding)
            return map_store(file)
    except OSError as error:
        if error.errno not in _IS_FULL:
            raise
        raise _no_room(Path(tempfile.gettempdir()), "TMPDIR") from None


def root() -> Path:
    """Return the directory of all token stores."""
    return cache_root() / "tokens"


def remember_fingerprint(store: TokenStore, name: str, compute: Callable[[], str]) -> str:
    """Return a value that is kept beside a store under ``name``; the first process to ask for it computes it."""
    if store.path is None:
        return compute()
    path = store.path.with_suffix(".fingerprints")
    if found := _read_fingerprints(path).get(name):
        return found
    try:
        with _lock(path.with_suffix(".lock")):
            known = _read_fingerprints(path)
            if name not in known:
                kept = dict(list(known.items())[-_MOST_FINGERPRINTS:])
                known = {**kept, name: compute()}
                replace_text(path, json.dumps(known), _MODE)
            return known[name]
    except OSError:  # what cannot be kept is computed again the next time
        return compute()


def _no_room(folder: Path, variable: str) -> DiskError:
    free = ""
    with suppress(OSError):
        free = f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    return DiskError(
        f"{folder}{free} has no room for the tokens of the rows: 4 bytes each, and about 110 a row. Free some, or set "
        f"{variable} to a directory on another disk"
    )


def _read_fingerprints(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): value for name, value in content.items() if re.fullmatch("[0-9a-f]{64}", value)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _open(path: Path) -> TokenStore | None:
    """Map a store and mark it as used; None if there is none, or it was damaged and is removed now."""
    try:
        with path.open("rb") as file:
            store = map_store(file, path)
            with suppress(OSError):
                os.utime(path)
            return store
    except FileNotFoundError:
        return None
    except DamagedStoreError as error:
        log.warning("token store %s is not used: %s; the rows are tokenised again", path, error)
        path.unlink(missing_ok=True)
        return None


def _build(path: Path, rows: Iterable[Row], encoding: Encoding) -> None:
    """Tokenise rows into a file that appears under its name when it is complete and on the disk."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".partial")  # with mode 0600
    staging = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file, StoreWriter(file, path.parent) as writer:
            _fill(writer, rows, encoding)
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _fill(writer: StoreWriter, rows: Iterable[Row], encoding: Encoding) -> None:
    """Tokenise all rows into a writer, and finish it."""
    total = len(rows) if isinstance(rows, Sized) else None
    columns, remaining = source_columns(iter(rows))
    writer.columns = list(columns)
    with ProgressBar("tokenising", total, "row", brief=True) as bar:
        for encoded in encode_all(remaining, replace(encoding, columns=columns)):
            writer.append(encoded)
            bar.advance(encoded.read)
    writer.finish()


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock of a store, alone on this node or, where the file system has locks, among all nodes.

    Gives the body False if the file system has no locks: others may do the same now.

    Raises:
        StopRequested: a signal came while another process held it.
        OSError: the directory cannot be written, or (TimeoutError) another process makes the store for too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(path, mode=_MODE)
    try:
        yield lock.wait_or_do_without(_MOST_SECONDS)  # without locks each process makes a file, and the last one stays
    finally:
        lock.release()


def _remove_partial(path: Path) -> None:
    """Remove what processes left that were killed while they made this store; the caller has its lock."""
    for left in path.parent.glob(f".{path.stem}-*.partial"):
        with suppress(OSError):
            left.unlink()


def _remove_unused(folder: Path) -> None:
    """Remove stores that were not opened for ``KEPT_DAYS``, and what killed processes left."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for path in folder.iterdir():
        with suppress(OSError):
            if path.lstat().st_mtime < oldest and _OWN_NAME.fullmatch(path.name):
                path.unlink()
                for suffix in (".fingerprints", ".lock"):
                    path.with_suffix(suffix).unlink(missing_ok=True)
