"""Find the texts that fit a query best, by BM25 over morphemes or words; built once and kept on disk.

    ROOT/<key>.bm25/    the index of some texts, as bm25s stores it; ROOT is $FROSTLINE_CACHE/retrieval

The key is a hash of the texts, of the code that divides them and of the versions of its libraries: other texts are
another index.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import toolkit
from toolkit.retrieval.terms import terms_of
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.errors import UsageError
from toolkit.runtime.file_lock import FileLock
from toolkit.runtime.paths import sources_hash
from toolkit.runtime.privacy import make_directory

log = logging.getLogger("frostline")

MISSING_BM25 = 'retrieval needs bm25s: pip install bm25s (pip install -e ".[retrieval]")'
_MOST_SECONDS = 1800.0
"""Longest wait for another process that builds the same index."""


class TextIndex:
    """BM25 (Lucene's form, k1 1.5, b 0.75, by bm25s, arXiv 2407.03618) over the terms of some texts.

    A text that shares no term with a query is not found by it.

    Args:
        texts: what is searched, in order.
        is_kept: whether the index is kept in the cache directory, where the next process finds it. It lets nobody but
            its user read it, and holds the terms of the texts.

    Raises:
        UsageError: bm25s, or for Korean texts kiwipiepy, is not installed; or there are no texts.
    """

    def __init__(self, texts: Sequence[str], is_kept: bool = True) -> None:
        if not texts:
            raise UsageError("there is no text to search; expected at least one")
        self.fingerprint = fingerprint_of(texts)
        """SHA-256 of all that the results depend on beside the query."""
        self._count = len(texts)
        self._bm25 = _find(self.fingerprint, texts) if is_kept else _build(texts)

    def __len__(self) -> int:
        """Return the number of texts."""
        return self._count

    def search(self, query: str, k: int = 10) -> list[tuple[int, float]]:
        """Return number and score of the ``k`` texts that fit best, the best first; of equal ones the earlier first.

        There are fewer where fewer share a term with the query.
        """
        known = self._bm25.vocab_dict
        terms = [term for term in terms_of([query])[0] if term in known]
        if not terms:
            return []
        return best(self._bm25.get_scores(terms), k)


def best(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    """Return number and score of the ``k`` highest of [texts] scores above 0, in order; of equal ones the earlier."""
    positive = np.flatnonzero(scores > 0)
    if len(positive) > k > 0:
        lowest = np.partition(scores[positive], -k)[-k]
        positive = positive[scores[positive] >= lowest]
    order = positive[np.argsort(-scores[positive], kind="stable")][: max(k, 0)]
    return [(int(number), float(scores[number])) for number in order]


def fingerprint_of(texts: Sequence[str]) -> str:
    """Return a SHA-256 of some texts, of the code that finds them and of its libraries' versions."""
    sha = hashlib.sha256(json.dumps([_version("bm25s"), _version("kiwipiepy")]).encode())
    sha.update(sources_hash(Path(toolkit.__file__).parent, "retrieval/index.py", "retrieval/terms.py").encode())
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        sha.update(len(content).to_bytes(8, "little") + content)
    return sha.hexdigest()


def root() -> Path:
    """Return the directory of all that retrieval keeps."""
    return cache_root() / "retrieval"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of what is kept at ``path``, whose directory is made; without locks there, go on.

    Raises:
        StopRequested: a signal came while another process held it.
        OSError: the directory cannot be written, or another process holds the lock for too long.
    """
    make_directory(path.parent)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.wait_or_do_without(_MOST_SECONDS)  # without locks each process makes its own, and the first one stays
        yield
    finally:
        lock.release()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _library() -> Any:
    try:
        import bm25s
    except ImportError:
        raise UsageError(MISSING_BM25) from None
    return bm25s


def _build(texts: Sequence[str]) -> Any:
    """Build the index; one without a term finds nothing."""
    index = _library().BM25()
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index.index([terms or [""] for terms in terms_of(texts)], show_progress=False)  # "": bm25s fails on no terms
    return index


def _find(key: str, texts: Sequence[str]) -> Any:
    """Return the index that an earlier process kept, or build it and keep it; where none can be kept, build it."""
    path = root() / f"{key}.bm25"
    _library()
    try:
        if (kept := _load(path)) is not None:
            return kept
        with alone(path):
            if (kept := _load(path)) is not None:  # another process built it meanwhile
                return kept
            index = _build(texts)
            _save(index, path)
            return index
    except OSError as error:
        log.warning("%s cannot be used (%s): the index is built for this process alone", path.parent, error)
        return _build(texts)


def _load(path: Path) -> Any:
    """Load an index and mark it as used; None if there is none. One that cannot be read is removed."""
    if not path.is_dir():
        return None
    try:
        index = _library().BM25.load(path, load_corpus=False)
        os.utime(path)
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is not used (%s): the index is built again", path, error)
        shutil.rmtree(path, ignore_errors=True)
        return None


def _save(index: Any, path: Path) -> None:
    """Write an index beside ``path``, then rename it, so that there is a whole one or none."""
    staging = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", suffix=".partial", dir=path.parent))  # mode 0700
    try:
        index.save(staging)
        for file in staging.iterdir():
            file.chmod(0o600)
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if path.is_dir():
            return
        raise
