"""Read questions for a model to answer, from a file or from the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from toolkit.config.data_schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.row_notes import RowNoter
from toolkit.data.sources import Row
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import AUTO, MOST_ROWS, task_for_questions
from toolkit.tasks.sample import RowFaultError, Sample

log = logging.getLogger("frostline")

_MOST_LISTED = 10
"""Most rows that an error message lists."""


def from_prompt(
    question: str, contexts: Sequence[str], data: DataConfig, rendering: Rendering, origin: str = "--question"
) -> Sample:
    """Make a sample of a question and contexts from the command line, by the task of a run; masked as its rows were.

    ``data`` is the section of the run's recipe, ``rendering`` its rendering, which knows the task that auto took, and
    ``origin`` the question's name for messages.

    Raises:
        DataError: the question is empty, or the task cannot ask it.
    """
    if not question.strip():
        raise DataError(f"{origin} is empty; expected text")
    task = task_for_questions(_with_own_task(data, rendering))
    (question, *contexts), _ = RowNoter(data).masked([question.strip(), *contexts])
    try:
        return task.ask(question, tuple(contexts))
    except RowFaultError as fault:
        raise DataError(f"a question alone {fault} (task {task.name}); give rows with --input") from None


class Questions(Iterable[Sample]):
    """The questions of a source as samples by the task of a run; a reference answer is kept if the row has one.

    ``read`` begins to read the rows anew: each pass over the questions is one over the rows, of which a few are held.
    The first pass is this constructor's, which counts and checks them. At most ``limit`` rows are taken, if given.

    Identifiers in them are masked where those of the run's rows were. Under ``data.task: auto`` rows of other columns
    than the training's are read by the task that fits them. Plain text is continued as it is; a warning says so if the
    run that ``rendering`` is of did not learn plain text.

    Raises:
        DataError: rows have no question; names the first of them.
    """

    def __init__(
        self, read: Callable[[], Iterable[Row]], data: DataConfig, rendering: Rendering = Rendering(),
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self._read, self._limit, self._noter = read, limit, RowNoter(data)
        rows = self._rows()
        first = list(islice(rows, MOST_ROWS))
        self._task = task_for_questions(data, [row.values for row in first])
        if self._task.spec.text is not None and data.task == AUTO and rendering.task != self._task.name:
            log.warning(
                "the rows have text alone, which is continued as it is, without a chat template; to ask it, name "
                "its column QUESTION, in a file with columns"
            )
        self._count = self._check(chain(first, rows))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        count = 0
        for row in self._rows():
            count += 1
            try:
                yield self._sample(row)
            except RowFaultError as fault:
                raise DataError(f"{self._fault(row, fault)}; the rows have changed since they were checked") from None
        if count != self._count:
            raise DataError(f"{count} rows are there, and {self._count} were checked; the rows have changed since")

    def _rows(self) -> Iterator[Row]:
        return islice(self._read(), self._limit)

    def _check(self, rows: Iterable[Row]) -> int:
        """Return the number of rows; DataError if some cannot be answered."""
        bad, first, count = 0, list[str](), 0
        for row in rows:
            count += 1
            try:
                self._sample(row)
            except RowFaultError as fault:
                bad += 1
                if len(first) < _MOST_LISTED:
                    first.append(f"  - {self._fault(row, fault)}")
        if bad:
            raise DataError("\n".join([f"{bad} rows cannot be answered:", *first]))
        return count

    def _sample(self, row: Row) -> Sample:
        if row.fault:
            raise RowFaultError(row.fault)
        values, _ = self._noter.masked(row.values)
        return self._task.read(values, with_answer=self._task.has_answer(values))

    def _fault(self, row: Row, fault: RowFaultError) -> str:
        return f"{self._noter.origin(row.origin)} {self._noter.fault(str(fault))}"


def questions_of(rows: Iterable[Row], data: DataConfig, rendering: Rendering = Rendering()) -> list[Sample]:
    """Make a sample of each row, all held in memory; see ``Questions``."""
    held = list(rows)
    return list(Questions(lambda: held, data, rendering))


def _with_own_task(data: DataConfig, rendering: Rendering) -> DataConfig:
    """Return the section with the task that ``auto`` took for the training rows."""
    if data.task == AUTO and rendering.task is not None:
        return data.model_copy(update={"task": rendering.task})
    return data
