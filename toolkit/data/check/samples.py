"""The rows that a data check looks at, as texts by their role, beside what of them becomes tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from toolkit.config.schema import DataConfig
from toolkit.data.examples import Example
from toolkit.data.identifiers import texts_of
from toolkit.data.retrieval import passages_for
from toolkit.data.row_notes import RowNoter
from toolkit.data.row_samples import row_ids
from toolkit.data.sources import Row
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import choose_task, columns_of
from toolkit.tasks.sample import RowFaultError, Sample


@dataclass(frozen=True)
class CheckedSample:
    """One row as texts."""

    origin: str
    part: str
    """train, validation or test; of a set that the data are compared with, its file."""
    question: str
    contexts: tuple[str, ...]
    answer: str
    examples: tuple[Example, ...] = ()
    """What is trained on, several parts of a long text; none for rows that the data are compared with."""
    shown: Example | None = None
    """The first of ``examples``, with identifiers masked."""
    values: Any = field(default=None, repr=False)
    """The row's values as they were read, by which it is divided."""
    tokens: int = 0
    """Tokens that the row would have without ``data.max_length``."""
    learned: str = ""
    """What the last turn says: the answer, its tool calls, or plain text."""

    @property
    def text(self) -> str:
        """All texts of the row."""
        return "\n".join([*self.contexts, self.question, self.answer])

    @cached_property
    def question_key(self) -> str:
        """The question without case, blanks and punctuation."""
        return normalise(self.question)

    @cached_property
    def answer_key(self) -> str:
        """The answer without case, blanks and punctuation."""
        return normalise(self.answer)

    @cached_property
    def context_key(self) -> str:
        """The contexts without case, blanks and punctuation."""
        return normalise("".join(self.contexts))


def checked(
    row: Row, sample: Sample, part: str, examples: Sequence[Example], shown: Example, tokens: int
) -> CheckedSample:
    """Make the sample of a row that is trained on, validated on or tested on."""
    texts = sample.question, sample.contexts, sample.answer or ""
    last = sample.turns[-1]
    learned = last.content or "\n".join(str(call["function"]) for call in last.tool_calls)
    return CheckedSample(row.origin, part, *texts, tuple(examples), shown, row.values, tokens, learned)


def compared(rows: Sequence[Row], config: DataConfig, name: str, ids: Set[str] | None = None) -> list[CheckedSample]:
    """Make the samples of a set that the data are compared with.

    Args:
        rows: rows of the set; those without any text are left out.
        config: the data section, whose task reads them; rows of other columns count as one question with all their
            text.
        name: the set's name, for messages.
        ids: keys of the rows to take, such as PubMedQA's official test ids; None takes all.
    """
    samples, noter = [], RowNoter(config)
    try:
        task = choose_task(config, columns_of(row.values for row in rows), with_answer=False)
    except DataError:
        task = None
    for row in rows:
        if row.fault or (ids is not None and ids.isdisjoint(row_ids(row.origin, row.values))):
            continue
        origin = noter.origin(row.origin)
        read: Sample | None = None
        with suppress(RowFaultError):
            if task is not None:
                values = passages_for(config, task)(row.values)
                read = task.read(values, with_answer=task.has_answer(values))
        if read is not None:
            samples.append(CheckedSample(origin, name, read.question, read.contexts, read.answer or ""))
        elif text := "\n".join(texts_of(row.values)).strip():
            samples.append(CheckedSample(origin, name, text, (), ""))
    return samples


def normalise(text: str) -> str:
    """Return the letters and digits of a text, in one case and one Unicode form."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))
