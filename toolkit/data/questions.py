"""Questions to be answered, from a file or from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from toolkit.data.sources import Row, read_rows
from toolkit.runtime.errors import DataError
from toolkit.tasks.pubmedqa import ANSWER, RowFaultError, Sample, pubmedqa


def from_prompt(question: str, contexts: Sequence[str]) -> Sample:
    """Return a question as typed.

    Raises:
        DataError: it is empty.
    """
    if not question.strip():
        raise DataError("--question is empty; expected text")
    return Sample(question.strip(), tuple(contexts))


def read_questions(path: str, split: str | None) -> list[Sample]:
    """Return the questions of a file or Hub data set.

    Raises:
        DataError: unreadable, or rows without a question; names each row.
    """
    return questions_of(read_rows(path, split, "--split"))


def questions_of(rows: Iterable[Row]) -> list[Sample]:
    """Return the questions of rows; a reference answer is kept where a row has one.

    Raises:
        DataError: rows without a question; names each row.
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
