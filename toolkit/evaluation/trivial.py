"""What trivial answers score: no model is worth anything that does not beat them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from toolkit.tasks.sample import Sample

_SENTENCE_END = re.compile(r"(?<=[.!?。])\s+|\n+")

LAST_SENTENCE = "context's last sentence"
NEAREST_TO_QUESTION = "sentence nearest the question"
ANOTHER_ANSWER = "another row's answer"
NEAREST_TO_REFERENCE = "oracle: sentence nearest the reference"
"""Names of trivial answers; the oracle reads the reference, and no method could be held to it."""


def trivial_answers(samples: Sequence[Sample], seed: int) -> dict[str, list[str]]:
    """Return the answers of each trivial method to all samples, by its name.

    A sentence is near a text if they share many pairs of letters (Dice's coefficient), which needs no words and so
    holds for Korean as for English. Methods that need contexts are left out where no row has any.
    """
    answers: dict[str, list[str]] = {}
    if any(sample.contexts for sample in samples):
        sentences = [_sentences(sample) for sample in samples]
        answers[LAST_SENTENCE] = [of_row[-1] for of_row in sentences]
        answers[NEAREST_TO_QUESTION] = [
            _nearest(of_row, sample.question) for of_row, sample in zip(sentences, samples, strict=True)
        ]
        answers[NEAREST_TO_REFERENCE] = [
            _nearest(of_row, sample.answer or "") for of_row, sample in zip(sentences, samples, strict=True)
        ]
    if len(samples) > 1:
        order = np.random.default_rng(seed).permutation(len(samples))
        other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # in a circle: never a row's own
        answers[ANOTHER_ANSWER] = [samples[other[row]].answer or "" for row in range(len(samples))]
    return answers


def _sentences(sample: Sample) -> list[str]:
    """Return the sentences of a sample's contexts; its question where it has none."""
    parts = [part.strip() for context in sample.contexts for part in _SENTENCE_END.split(context)]
    return [part for part in parts if part] or [sample.question]


def _nearest(sentences: Sequence[str], text: str) -> str:
    wanted = _pairs(text)
    return max(sentences, key=lambda sentence: _dice(_pairs(sentence), wanted))


def _pairs(text: str) -> Counter[str]:
    letters = "".join(filter(str.isalnum, text.casefold()))
    return Counter(letters[at : at + 2] for at in range(len(letters) - 1))


def _dice(one: Counter[str], other: Counter[str]) -> float:
    return 2 * (one & other).total() / max(one.total() + other.total(), 1)
