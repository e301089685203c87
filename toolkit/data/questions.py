"""Read questions for a model to answer, from a file or from the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from toolkit.config.data_schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.retrieval import passages_for, texts_for
from toolkit.data.row_notes import RowNoter
from toolkit.data.sources import Row
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import AUTO, MOST_ROWS, task_for_questions
from toolkit.tasks.sample import RowFaultError, Sample
from toolkit.tasks.task import Task

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
    contexts = contexts or texts_for(data, question)
    try:
        return task.ask(question, tuple(contexts))
    except RowFaultError as fault:
        raise DataError(f"a question alone {fault} (task {task.name}); give rows with --input") from None


class Question(NamedTuple):
    """A row to answer."""

    row: int
    """Its number in the source, from 0."""
    sample: Sample
    """What is asked; a reference answer is kept if the row has one."""
    values: Any
    """The row as it was read, with identifiers masked where those of the run's rows were."""

    @property
    def columns(self) -> dict[str, Any]:
        """Return what a file of answers has of it: its columns, and as others what was asked, and the reference."""
        columns = dict(self.values) if isinstance(self.values, Mapping) else {}
        asked = {"QUESTION": self.sample.question, "CONTEXTS": list(self.sample.contexts)}
        if self.sample.answer is not None:
            asked["REFERENCE"] = self.sample.answer
        return {**columns, **{name: value for name, value in asked.items() if name not in columns}}


class RowReader:
    """Reads a row as what a task asks about it: masked where the run's rows were, with the passages of the recipe."""

    def __init__(self, data: DataConfig, task: Task) -> None:
        self.task = task
        self.masks = data.on_identifier == "mask"
        """Whether it masks identifiers."""
        self._noter, self._with_passages = RowNoter(data), passages_for(data, task)

    def question(self, number: int, row: Row) -> Question:
        """Return what is asked about a row; RowFaultError if it cannot be asked about."""
        if row.fault:
            raise RowFaultError(row.fault)
        values = self._with_passages(self.masked(row.values))
        return Question(number, self.task.read(values, with_answer=self.task.has_answer(values)), values)

    def masked(self, values: Any) -> Any:
        """Return the values of a row, with identifiers masked where those of the run's rows were."""
        return self._noter.masked(values)[0]

    def fault(self, row: Row, fault: str) -> str:
        """Return what is wrong with a row, after its name, without identifiers."""
        return f"{self._noter.origin(row.origin)} {self._noter.fault(fault)}"


class Note(NamedTuple):
    """A row that several tasks ask about."""

    row: int
    """Its number in the source, from 0."""
    samples: Mapping[str, Sample]
    """What each task asks, by its name."""
    values: Any
    """The row as it was read, with identifiers masked where one of the tasks masks them."""

    @property
    def columns(self) -> dict[str, Any]:
        """Return what a file of answers has of it: its columns, and ``REFERENCE_NAME`` of each task that has one."""
        columns = dict(self.values) if isinstance(self.values, Mapping) else {}
        found = {f"REFERENCE_{name}": sample.answer for name, sample in self.samples.items() if sample.answer}
        return {**columns, **{name: value for name, value in found.items() if name not in columns}}


class Questions(Iterable[Question]):
    """The questions of a source by the task of a run.

    ``read`` begins to read the rows anew: each pass over the questions is one over the rows, of which a few are held.
    The first pass is this constructor's, which counts and checks them. At most ``limit`` rows are taken, if given.

    Identifiers in them are masked where those of the run's rows were. Under ``data.task: auto`` rows of other columns
    than the training's are read by the task that fits them. Plain text is continued as it is; a warning says so if the
    run that ``rendering`` is of did not learn plain text.

    Rows without a question are an error, or left out with a warning if ``skips_bad_rows``; either names the first. So
    are rows that have a column ``answer_column`` already.

    Raises:
        DataError: rows have no question.
    """

    def __init__(
        self, read: Callable[[], Iterable[Row]], data: DataConfig, rendering: Rendering = Rendering(),
        limit: int | None = None, skips_bad_rows: bool = False, answer_column: str | None = None,
    ) -> None:  # fmt: skip
        self._read, self._limit = read, limit
        self._skips, self._answer_column = skips_bad_rows, answer_column
        rows = self._rows()
        first = list(islice(rows, MOST_ROWS))
        self._reader = RowReader(data, task_for_questions(data, [row.values for row in first]))
        if self.task.spec.text is not None and data.task == AUTO and rendering.task != self.task.name:
            log.warning(
                "the rows have text alone, which is continued as it is, without a chat template; to ask it, name "
                "its column QUESTION, in a file with columns"
            )
        self._bad = set[int]()
        self._count = self._check(chain(first, rows))

    @property
    def task(self) -> Task:
        """Return the task by which the rows are read."""
        return self._reader.task

    def __len__(self) -> int:
        """Return the number of questions."""
        return self._count - len(self._bad)

    def __iter__(self) -> Iterator[Question]:
        count = 0
        for number, row in enumerate(self._rows()):
            count += 1
            if number in self._bad:
                continue
            try:
                yield self._question(number, row)
            except RowFaultError as fault:
                raise DataError(f"{self._fault(row, fault)}; the rows have changed since they were checked") from None
        if count != self._count:
            raise DataError(f"{count} rows are there, and {self._count} were checked; the rows have changed since")

    def _rows(self) -> Iterator[Row]:
        return islice(self._read(), self._limit)

    def _check(self, rows: Iterable[Row]) -> int:
        """Return the number of rows, and keep the numbers of those that cannot be answered; DataError if there are."""
        first, count = list[str](), 0
        for number, row in enumerate(rows):
            count += 1
            try:
                self._question(number, row)
            except RowFaultError as fault:
                self._bad.add(number)
                if len(first) < _MOST_LISTED:
                    first.append(f"  - {self._fault(row, fault)}")
        if self._bad:
            text = "\n".join([f"{len(self._bad)} rows cannot be answered:", *first])
            if not self._skips or len(self._bad) == count:
                raise DataError(text)
            log.warning("%s", text.replace("cannot be answered", "cannot be answered and are skipped", 1))
        return count

    def _question(self, number: int, row: Row) -> Question:
        if self._answer_column is not None and isinstance(row.values, Mapping) and self._answer_column in row.values:
            raise RowFaultError(
                f"has a column {self._answer_column}, where its answer would go; name another with --answer-column"
            )
        return self._reader.question(number, row)

    def _fault(self, row: Row, fault: RowFaultError) -> str:
        return self._reader.fault(row, str(fault))


class Notes(Iterable[Note]):
    """The rows of one source that every task can ask about: ``questions`` of each by its name.

    ``masks`` says which of them mask identifiers: if one does, they are masked in the columns of a note.
    """

    def __init__(self, questions: Mapping[str, Questions], masks: Mapping[str, bool]) -> None:
        self._questions = questions
        self._shown = next((name for name in questions if masks[name]), next(iter(questions)))

    def __len__(self) -> int:
        """Return the most notes that there can be."""
        return min(map(len, self._questions.values()))

    def __iter__(self) -> Iterator[Note]:
        streams = {name: iter(of_task) for name, of_task in self._questions.items()}
        found = {name: next(stream, None) for name, stream in streams.items()}
        while all(found.values()):
            of_task = {name: question for name, question in found.items() if question is not None}
            last = max(question.row for question in of_task.values())
            behind = [name for name, question in of_task.items() if question.row < last]  # another task skips a row
            if not behind:
                samples = {name: question.sample for name, question in of_task.items()}
                yield Note(last, samples, of_task[self._shown].values)
            for name in behind or list(streams):
                found[name] = next(streams[name], None)


def questions_of(rows: Iterable[Row], data: DataConfig, rendering: Rendering = Rendering()) -> list[Sample]:
    """Make a sample of each row, all held in memory; see ``Questions``."""
    held = list(rows)
    return [question.sample for question in Questions(lambda: held, data, rendering)]


def _with_own_task(data: DataConfig, rendering: Rendering) -> DataConfig:
    """Return the section with the task that ``auto`` took for the training rows."""
    if data.task == AUTO and rendering.task is not None:
        return data.model_copy(update={"task": rendering.task})
    return data
