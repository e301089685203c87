"""Metrics of texts beside a reference: chrF++, BLEU, ROUGE-L, token F1 and exact match."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from toolkit.metrics.metric import Metric, check_rows, mean_metric
from toolkit.runtime.errors import UsageError

Tokenise = Callable[[str], Sequence[str]]
"""Divides a text into tokens."""


def overlap_metrics(
    answers: Sequence[str], references: Sequence[str], tokenise: Tokenise | None, bleu_tokenizer: str = "13a"
) -> list[Metric]:
    """Return the metrics of answers with one reference each.

    ``chrf++`` (Popović 2017) and ``bleu`` (Papineni 2002) are sacrebleu's, from 0 to 100; ``rouge_l`` (Lin 2004) and
    ``token_f1`` (SQuAD, arXiv 1606.05250) are means over rows, from 0 to 1, on the tokens of ``tokenise``, and are left
    out if that is None; ``exact_match`` is the share of answers that are the reference but for case and blanks.
    ``bleu_tokenizer`` is sacrebleu's name of one: "13a" parts words at blanks and punctuation, "ko-mecab" Korean ones
    into morphemes.

    Raises:
        DataError: there are no rows, or other answers than references.
        UsageError: sacrebleu has no such tokenizer, or what that needs is not installed.
    """
    from sacrebleu.metrics.chrf import CHRF

    check_rows(answers=answers, references=references)
    found = [
        _of_sacrebleu("chrf++", CHRF(word_order=2), answers, references),
        _of_sacrebleu("bleu", _bleu(bleu_tokenizer), answers, references),
    ]
    if tokenise is not None:
        pairs = [(tokenise(one), tokenise(other)) for one, other in zip(answers, references, strict=True)]
        found += [
            mean_metric("rouge_l", np.array([rouge_l(*pair) for pair in pairs])),
            mean_metric("token_f1", np.array([token_f1(*pair) for pair in pairs])),
        ]
    return [*found, exact_match(answers, references)]


def exact_match(answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Return the share of answers that are the reference, in one Unicode form, without case and outer blanks."""
    same = [_folded(one) == _folded(other) for one, other in zip(answers, references, strict=True)]
    return mean_metric("exact_match", np.array(same, float))


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of two lists of tokens; 0 if one is empty."""
    return _f1(_common_subsequence(answer, reference), len(answer), len(reference))


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of the tokens that two lists share, however they are ordered; 0 if one is empty."""
    return _f1((Counter(answer) & Counter(reference)).total(), len(answer), len(reference))


def _bleu(tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    if tokenizer not in BLEU.TOKENIZERS:
        known = ", ".join(sorted(BLEU.TOKENIZERS))
        raise UsageError(f"the tokenizer of BLEU is {tokenizer!r}; expected one of sacrebleu's: {known}")
    try:
        return BLEU(force=True, tokenize=tokenizer)
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"sacrebleu cannot use the tokenizer {tokenizer!r}: {str(error).strip()}") from None


def _of_sacrebleu(name: str, metric: Any, answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Return a metric of sacrebleu's: its own statistics of each row, and its own score of their sums.

    Both are private to sacrebleu, which has no public way to them; tests hold them to its ``corpus_score``.
    """
    statistics = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), float)

    def score(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        values = [metric._compute_score_from_stats(row.tolist()).score for row in flat]
        return np.array(values, float).reshape(sums.shape[:-1])

    return Metric(name, statistics, score)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for token in one:
        before = 0
        for at, own in enumerate(other, start=1):
            kept, lengths[at] = lengths[at], before + 1 if token == own else max(lengths[at], lengths[at - 1])
            before = kept
    return lengths[-1]


def _f1(shared: int, answered: int, wanted: int) -> float:
    return 2 * shared / (answered + wanted) if shared else 0.0


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
