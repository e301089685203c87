"""Check answers by their task's rules as they are given; ask again a few times, then flag for a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from toolkit.clinical.verification import Check, Violation
from toolkit.data.questions import Question
from toolkit.inference.answering import Answerer
from toolkit.inference.sampling import Sampling
from toolkit.runtime.errors import DataError

COLUMNS = ("VERIFIED", "VIOLATIONS", "TRIES")
"""Columns of a checked answer: whether it breaks no rule, what it breaks, and how often it was asked for."""
_LEAST_TEMPERATURE = 0.7
"""Of further tries: the likeliest tokens alone would give the same answer again."""
_SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class CheckedAnswer:
    """The best answer to a question: the first that breaks no rule, or else the first of those that break the fewest.

    None where the question was skipped.
    """

    answer: str | None
    violations: Sequence[Violation] = ()
    tries: int = 1

    def columns(self) -> dict[str, Any]:
        """Return what stands beside the answer in a file."""
        values = (not self.violations, [one.as_dict() for one in self.violations], self.tries)
        return dict(zip(COLUMNS, values, strict=True))


def checked_batches(
    answerer: Answerer, questions: Iterable[Question], check: Check, tries: int
) -> Iterator[dict[int, CheckedAnswer]]:
    """Yield checked answers by row number as they are given; a collective.

    An answer that breaks a rule is asked for again, up to ``tries`` times in all: drawn at a temperature of at least
    0.7, each time by another seed. No question is left out: what still breaks a rule is kept with what it breaks.

    Raises:
        DataError: a row has a column of ``COLUMNS`` already.
        QuestionError, ModelError, UsageError: as ``Answerer.batches``.
    """
    asked: dict[int, Question] = {}

    def ask() -> Iterator[tuple[int, Any]]:
        for question in questions:
            taken = [name for name in COLUMNS if isinstance(question.values, dict) and name in question.values]
            if taken:
                raise DataError(f"row {question.row + 1} has a column {taken[0]}, where --verify writes; rename it")
            asked[question.row] = question
            yield question.row, question.sample

    for batch in answerer.batches(ask()):
        found = {row: _checked(answer, asked[row], check, 1) for row, answer in batch.items()}
        for number in range(2, tries + 1):
            again = [(row, asked[row].sample) for row, one in found.items() if one.violations]
            for answers in _draw(answerer, again, number):
                for row, answer in answers.items():
                    one = _checked(answer, asked[row], check, number)
                    is_better = len(one.violations) < len(found[row].violations)
                    found[row] = one if is_better else replace(found[row], tries=number)
        for row in batch:
            del asked[row]
        yield found


def _checked(answer: str | None, question: Question, check: Check, number: int) -> CheckedAnswer:
    if answer is None:
        return CheckedAnswer(None)
    return CheckedAnswer(answer, check(answer, question.values), number)


def _draw(answerer: Answerer, samples: Sequence[tuple[int, Any]], number: int) -> Iterator[dict[int, str | None]]:
    """Answer again, by other draws than in the tries before."""
    with drawing_again(answerer, number):
        yield from answerer.batches(samples)


@contextmanager
def drawing_again(answerer: Answerer, number: int) -> Iterator[None]:
    """Have an answerer draw otherwise than in the tries before, of which this is ``number``; the first is as it is."""
    first = answerer.sampling
    if number == 1:
        yield
        return
    answerer.sampling = Sampling(
        max(first.temperature, _LEAST_TEMPERATURE), first.top_p, first.seed + (number - 1) * _SEEDS_APART
    )
    try:
        yield
    finally:
        answerer.sampling = first
