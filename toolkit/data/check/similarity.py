"""Find texts that are nearly the same: MinHash over character shingles (Broder 1997), candidates compared exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

NEAR = 0.6
"""Jaccard similarity of shingles from which two texts are nearly the same; the two most
alike of PubMedQA's questions have 0.24."""

_SHINGLE = 4
"""Characters of a shingle."""
_BANDS, _BAND_ROWS = 32, 4
"""Two texts of similarity 0.6 share a band with probability 1 - (1 - 0.6⁴)³² = 0.99; of 0.8, 0.99999; of 0.1, 0.003."""
_MOST_COMPARED = 20
"""Most earlier texts of a bucket that a text is compared with, so that a thousand copies are no million pairs."""

_random = np.random.default_rng(1997)
_FACTORS = _random.integers(1, 2**63, _BANDS * _BAND_ROWS, dtype=np.uint64) | np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, _BANDS * _BAND_ROWS, dtype=np.uint64)
_POWERS = _random.integers(1, 2**63, _SHINGLE, dtype=np.uint64) | np.uint64(1)


def near_pairs(texts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Yield pairs (earlier, later) of texts whose similarity is at least ``NEAR``, with it.

    ``texts`` are normalised (``samples.normalise``); those shorter than a shingle have no pairs. Of many texts that are
    all alike, not every pair is compared, but each text with some of them.
    """
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    for later, text in enumerate(texts):
        if len(text) < _SHINGLE:
            continue
        shingles = _shingles(text)
        signature = ((shingles[:, None] * _FACTORS + _OFFSETS) >> np.uint64(32)).min(axis=0)
        candidates: set[int] = set()
        for band, values in enumerate(signature.reshape(_BANDS, _BAND_ROWS)):
            bucket = buckets[band, values.tobytes()]
            candidates.update(bucket[:_MOST_COMPARED])
            bucket.append(later)
        for earlier in sorted(candidates):
            if (similarity := _jaccard(_shingles(texts[earlier]), shingles)) >= NEAR:
                yield earlier, later, similarity


def _shingles(text: str) -> NDArray[np.uint64]:
    """Return the distinct hashes of a text's shingles, in ascending order."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    hashes = (np.lib.stride_tricks.sliding_window_view(codes, _SHINGLE) * _POWERS).sum(axis=1, dtype=np.uint64)
    distinct: NDArray[np.uint64] = np.unique(hashes)
    return distinct


def _jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """Return the size of the intersection over that of the union."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
