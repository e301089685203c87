"""Find the passages of a corpus that fit a query: BM25, or BM25 and dense vectors by reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from toolkit.config.retrieval_schema import RetrievalConfig
from toolkit.retrieval.corpus import Corpus
from toolkit.retrieval.dense import DenseIndex
from toolkit.retrieval.index import TextIndex
from toolkit.retrieval.passages import Passage

_FUSED, _RANK_CONSTANT = 100, 60
"""Of each ranking so many are fused, with 1 / (60 + rank) (Cormack, Clarke and Büttcher, SIGIR 2009)."""


class Retriever:
    """Searches the passages of a corpus; index and vectors are built when first needed.

    Raises:
        DataError, UsageError: as ``Corpus``.
    """

    def __init__(self, corpus: Corpus, is_dense: bool = False) -> None:
        self.fingerprint = corpus.fingerprint
        """SHA-256 of the corpus."""
        self.passages = corpus.passages()
        self._is_dense = is_dense

    @cached_property
    def _texts(self) -> list[str]:
        return [f"{passage.place}\n{passage.text}" for passage in self.passages]

    @cached_property
    def _index(self) -> TextIndex:
        return TextIndex(self._texts)

    @cached_property
    def _vectors(self) -> DenseIndex:
        return DenseIndex(self._texts)

    def search(self, query: str, k: int, day: str | None = None) -> list[Passage]:
        """Return the ``k`` passages that fit best, the best first; with a ``day`` (ISO) of those then in force."""
        most = len(self.passages) if day else max(k, _FUSED if self._is_dense else 0)
        found = [number for number, _ in self._index.search(query, most)]
        if self._is_dense:
            found = fuse([found[:_FUSED], [number for number, _ in self._vectors.search(query, _FUSED)]])
        passages = (self.passages[number] for number in found)
        return [passage for passage in passages if day is None or passage.in_force(day)][:k]


def fuse(rankings: Iterable[Sequence[int]]) -> list[int]:
    """Return the numbers of several rankings in one, by reciprocal rank fusion; of equal ones the lower number."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, number in enumerate(ranking, start=1):
            scores[number] = scores.get(number, 0.0) + 1 / (_RANK_CONSTANT + rank)
    return sorted(scores, key=lambda number: (-scores[number], number))


def open_retriever(config: RetrievalConfig) -> Retriever:
    """Return the retriever that a recipe names; a process makes one for each state of a corpus.

    Raises:
        DataError, UsageError: as ``Corpus``.
    """
    assert config.corpus is not None  # which RetrievalConfig has, or a dictionary
    corpus = Corpus.open(config.corpus)
    key = corpus.fingerprint, config.dense
    if key not in _opened:
        _opened[key] = Retriever(corpus, config.dense)
    return _opened[key]


_opened: dict[tuple[str, bool], Retriever] = {}
