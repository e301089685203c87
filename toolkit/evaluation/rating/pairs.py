"""Read two files of answers, and put the two answers to each question beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.readers.row import ID_COLUMNS
from toolkit.runtime.errors import DataError, UsageError


@dataclass(frozen=True)
class AnswerLine:
    """A line of a file of answers."""

    id: str | None
    """Value of its id column; None without one."""
    question: str
    contexts: tuple[str, ...]
    reference: str
    """Empty where there is none."""
    answer: str


@dataclass(frozen=True)
class AnswerPair:
    """A question with the answers of both files."""

    id: str
    """Id, or number of the row in the first file where rows are not matched by id."""
    question: str
    contexts: tuple[str, ...]
    reference: str
    answers: tuple[str, str]
    """The first file's, the second's."""

    @property
    def is_same(self) -> bool:
        """Return whether both answers are the same but for white space, which leaves nothing to compare."""
        return self.answers[0].split() == self.answers[1].split()


def pair_answers(first: Path, second: Path) -> list[AnswerPair]:
    """Match the rows of two files of answers, as ``evaluate.py --predictions`` and ``generate.py --output`` write them.

    They are matched by id where each row of both files has one of its own, else by question and contexts.

    Raises:
        UsageError: both are one file.
        DataError: a file cannot be read, holds a row twice, or a row that the other lacks.
    """
    files = [read_answers(path) for path in (first, second)]
    if first.samefile(second):
        raise UsageError(f"{first} is named twice; expected the answers of two models")
    ids = [{line.id for line in lines} for lines in files]
    by_id = all(None not in of and len(of) == len(lines) for of, lines in zip(ids, files, strict=True))
    by_id = by_id and bool(ids[0] & ids[1])  # ids of another kind, as file and row, match nothing
    key: Callable[[AnswerLine], Any] = (
        (lambda line: line.id) if by_id else (lambda line: (line.question, line.contexts))
    )
    ours, theirs = (_by_key(path, lines, key) for path, lines in zip((first, second), files, strict=True))
    only = [sum(one not in there for one in here) for here, there in ((ours, theirs), (theirs, ours))]
    if any(only):
        raise DataError(
            f"{only[0]} rows are in {first} only and {only[1]} in {second} only, matched by "
            f"{'id' if by_id else 'question and contexts'}; expected the answers of two models to the same rows"
        )
    pairs = []
    for number, (name, line) in enumerate(ours.items(), start=1):
        other = theirs[name]
        if (line.question, line.contexts) != (other.question, other.contexts):
            raise DataError(
                f"id {line.id} has another question or other contexts in {first} than in {second}; expected the "
                "answers of two models to the same rows"
            )
        pairs.append(
            AnswerPair(
                str(line.id) if by_id else f"row {number}", line.question, line.contexts,
                line.reference or other.reference, (line.answer, other.answer),
            )
        )  # fmt: skip
    return pairs


def read_answers(path: Path) -> list[AnswerLine]:
    """Read a file of answers: JSON lines with QUESTION, ANSWER and, where there are any, CONTEXTS and REFERENCE.

    Raises:
        DataError: the file cannot be read, or a line has another form.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); expected the JSON lines that evaluate.py --predictions or generate.py "
            "--output writes"
        ) from None
    lines = [_answer_line(f"{path} line {at}", text) for at, text in enumerate(texts, start=1) if text.strip()]
    if not lines:
        raise DataError(f"{path} holds no rows; expected answers as JSON lines")
    return lines


def _answer_line(where: str, text: str) -> AnswerLine:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); expected a file of answers as JSON lines") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}; expected an object with QUESTION and ANSWER")
    contexts = row.get("CONTEXTS") or []
    contexts = [contexts] if isinstance(contexts, str) else contexts
    if not isinstance(contexts, list) or not all(isinstance(one, str) for one in contexts):
        raise DataError(f"{where}: CONTEXTS is neither a text nor a list of texts")
    for name in ("QUESTION", "ANSWER"):
        if not isinstance(row.get(name), str):
            raise DataError(
                f"{where}: {name} is {type(row[name]).__name__ if name in row else 'missing'}; expected a text, as "
                "evaluate.py --predictions and generate.py --output write it"
            )
    ids = (value for name, value in row.items() if name.lower() in ID_COLUMNS and value not in (None, ""))
    found = next(ids, None)
    number = None if found is None else str(found)
    return AnswerLine(number, row["QUESTION"], tuple(contexts), str(row.get("REFERENCE") or ""), row["ANSWER"])


def _by_key(path: Path, lines: Sequence[AnswerLine], key: Callable[[AnswerLine], Any]) -> dict[Any, AnswerLine]:
    found = {key(line): line for line in lines}
    if len(found) < len(lines):
        raise DataError(
            f"{len(lines) - len(found)} rows of {path} have question and contexts of another row, and no ids tell them "
            "apart; expected each row once"
        )
    return found
