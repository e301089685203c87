"""Read questions for a model to answer, from a file or from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from toolkit.data.sources import Row, read_rows
from toolkit.runtime.errors import DataError
from toolkit.tasks.pubmedqa import ANSWER, RowFaultError, Sample, pubmedqa


def from_prompt(question: str, contexts: Sequence[str]) -> Sample:
    """Make a sample of a question and contexts from the command line.

    Raises:
        DataError: the question is empty.
    """
    if not question.strip():
        raise DataError("--question is empty; expected text")
    return Sample(question.strip(), tuple(contexts))


def read_questions(path: str, split: str | None) -> list[Sample]:
    """Return the questions of a file or Hub data set.

    Raises:
        DataError: the file is unreadable, or rows have no question; names the first of them.
    """
    return questions_of(read_rows(path, split, "--split"))


def questions_of(rows: Iterable[Row]) -> list[Sample]:
    """Make a sample of each row; a reference answer is kept if the row has one.

    Raises:
        DataError: rows have no question; names the first of them.
    """
    samples, bad = [], []
    for row in rows:
        try:
            if row.fault:
                raise RowFaultError(row.fault)
            has_answer = isinstance(row.values, dict) and bool(row.values.get(ANSWER))
            samples.append(pubmedqa(row.values, with_answer=has_answer))
        except RowFaultError as fault:
            bad.append(f"  - {row.origin} {fault}")
    if bad:
        raise DataError("\n".join([f"{len(bad)} rows cannot be answered:", *bad[:10]]))
    return samples
