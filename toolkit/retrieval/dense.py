"""Dense vectors of texts by WordLlama, whose weights (16 MB, MIT) come in its package, so that none are downloaded."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.retrieval.index import alone, best, fingerprint_of, root
from toolkit.runtime.errors import UsageError
from toolkit.runtime.paths import replace_bytes

log = logging.getLogger("frostline")

MISSING_WORDLLAMA = 'data.retrieval.dense needs wordllama: pip install wordllama (pip install -e ".[dense]")'


class DenseIndex:
    """Finds texts by the cosine of their vectors and the query's: [texts, 256] float32, kept as the index is.

    Raises:
        UsageError: wordllama is not installed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        path = root() / f"{fingerprint_of(texts)}.vectors.npy"
        try:
            if not path.is_file():
                with alone(path):
                    if not path.is_file():
                        content = io.BytesIO()
                        np.save(content, embed(texts), allow_pickle=False)
                        replace_bytes(path, content.getvalue(), 0o600)
            self._vectors: np.ndarray = np.load(path, allow_pickle=False)
        except OSError as error:
            log.warning("%s cannot be used (%s): vectors are computed for this process alone", path.parent, error)
            self._vectors = embed(texts)

    def search(self, query: str, k: int = 10) -> list[tuple[int, float]]:
        """Return number and cosine of the ``k`` texts that are nearest, of those with one above 0."""
        return best(self._vectors @ embed([query])[0], k)


def embed(texts: Sequence[str]) -> np.ndarray:
    """Return the vectors of texts, [texts, 256] float32 of length 1."""
    return np.asarray(_model().embed(list(texts), norm=True), np.float32)


@cache
def _model() -> Any:
    """Load the weights that the package brings; it looks for its tokenizer in a cache alone, so that is the package."""
    try:
        import wordllama
    except ImportError:
        raise UsageError(MISSING_WORDLLAMA) from None
    return wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
