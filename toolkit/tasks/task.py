"""Read rows by a task: from columns to the turns of a conversation, or to plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from toolkit.tasks.columns import MISSING, find, find_each, is_there, loose, nearest, top_names
from toolkit.tasks.conversation import conversation_of, messages_in, whole_turns
from toolkit.tasks.judged import require_no_judgement
from toolkit.tasks.kinds import check_found, empty_value, first_value, is_empty, is_left_out, read_kind, shown_path
from toolkit.tasks.messages import read_messages
from toolkit.tasks.missing import MissingWord
from toolkit.tasks.options import answer_of, answer_variables, answers_of, chosen_option, options_of
from toolkit.tasks.output import check_answer, labels_of, schema_of
from toolkit.tasks.row_values import RowValues, unprinted, without_gaps
from toolkit.tasks.sample import ASSISTANT, SYSTEM, TEXT, USER, RowFaultError, Sample, Turn
from toolkit.tasks.task_file import TaskSpec, used_variables
from toolkit.tasks.templates import render


@dataclass(frozen=True)
class Task:
    """A task file, ready to read rows."""

    spec: TaskSpec
    normalize: bool = True
    """Bring texts into Unicode's composed form (NFC)."""
    refuses_judged: bool = False
    """Take a label of true or false for a judgement of the answer: of a task that nobody named."""

    @property
    def name(self) -> str:
        """Return the task's name."""
        return self.spec.name

    def read(self, values: Any, with_answer: bool = True) -> Sample:
        """Make a sample of a row.

        Args:
            values: columns of the row.
            with_answer: whether to read the answer, which a question to be answered lacks.

        Raises:
            RowFaultError: a column is missing, null, empty or of the wrong type, or the answer is none that is allowed.
        """
        if not isinstance(values, Mapping):
            names = ", ".join(column.path[0] for column in self.spec.columns.values())
            raise RowFaultError(f"is a {type(values).__name__}; expected an object with columns {names}")
        if self.refuses_judged and with_answer:
            require_no_judgement(values)
        reader = RowValues(self.normalize)
        if self.spec.conversation is not None:
            sample: Sample | None = self._read_conversation(values, reader, with_answer)
        else:
            sample = self._read_messages(values, reader, with_answer)
        if sample is None:
            sample = self._read_columns(values, reader, with_answer)
        tools = sample.tools or self._read_tools(values, self.spec.tools)
        allowed = partial(labels_of, self.spec) if sample.allowed is tuple else sample.allowed
        return replace(sample, tools=tools, normalised=reader.normalised, allowed=allowed, schema=schema_of(self.spec))

    def ask(self, question: str, contexts: Sequence[str] = ()) -> Sample:
        """Make a sample of a question without a row, as from the command line.

        It stands where the first column that the prompt needs would; contexts stand in the task's own column of them,
        or before the question.
        """
        spec = self.spec
        if spec.cut is None and contexts:
            question, contexts = "\n\n".join([*contexts, question]), ()
        if spec.conversation is not None:
            return self.read({_key(spec, spec.conversation): [{"role": USER, "content": question}]}, False)
        asked = next(name for name in spec.columns if name in self._needed(False))
        row = {name: column.default for name, column in spec.columns.items() if column.may_be_missing}
        if spec.cut is not None:
            row[spec.cut] = list(contexts)
        row[asked] = question
        flat = {name: column.model_copy(update={"path": [name]}) for name, column in spec.columns.items()}
        return Task(spec.model_copy(update={"columns": flat}), self.normalize).read(row, False)

    def missing(self, columns: Sequence[str], with_answer: bool = True) -> list[str]:
        """Return the names of the task's columns that rows with these columns lack, and need."""
        needed = self._needed(with_answer)
        return [
            name
            for name, column in self.spec.columns.items()
            if name in needed and not column.may_be_missing and not any(is_there(columns, path) for path in column.path)
        ]

    def has_options(self, columns: Sequence[str]) -> bool:
        """Return whether rows with these columns bring the options of the task's questions, if it has such."""
        own = [column for column in self.spec.columns.values() if column.kind == "options"]
        return all(any(is_there(columns, path) for path in column.path) for column in own)

    def notes(self, columns: Sequence[str]) -> list[str]:
        """Return a line for the log on each column that is not named as the task has it, or that no row has."""
        lines: list[str] = []
        renamed: list[str] = []
        used = self._needed(True)
        for name, column in self.spec.columns.items():
            tops = [top for path in column.path for top in top_names(path)]
            found = [own for own in columns if any(loose(own) == loose(top) for top in tops)]
            if found and not any(own in tops for own in found):
                renamed.append(f"{found[0]!r} as {tops[0]}")
            elif not found and name == self.spec.cut and name in used:
                near = nearest(tops[0], columns, cutoff=0.75)  # it need not be there: cot is no contexts
                hint = f"; {near} is named most like it (data.task: {{columns: {{{name}: {near}}}}})" if near else ""
                lines.append(f"no column {tops[0]}: the rows have no {name}{hint}")
        return [f"columns are read by other names: {', '.join(renamed)}", *lines] if renamed else lines

    def describe(self, name: str) -> str:
        """Return the columns that a value may come from, for messages."""
        return " or ".join(self.spec.columns[name].path)

    def has_answer(self, values: Any) -> bool:
        """Return whether a row has what its answer is made of."""
        if not isinstance(values, Mapping):
            return False
        if self.spec.conversation is not None:
            try:
                return self.read(values, with_answer=False).turns[-1].role == ASSISTANT
            except RowFaultError:  # which reading it says
                return False
        columns = [self.spec.columns[name] for name in self._all_needed - self._asked]
        columns = [column for column in columns if not column.may_be_missing] or columns  # a reason may be missing
        found = [[find(values, path) for path in column.path] for column in columns]
        return all(any(not is_empty(value) for value in one) for one in found)

    @cached_property
    def asked_columns(self) -> frozenset[str]:
        """Return the names of the columns of rows that a question is read for."""
        return self._names_in_rows(self._asked)

    @cached_property
    def answer_columns(self) -> frozenset[str]:
        """Return the names of the columns of rows that the answer alone is made of."""
        return self._names_in_rows(self._all_needed - self._asked)

    def _names_in_rows(self, names: frozenset[str]) -> frozenset[str]:
        paths = [path for name in names for path in self.spec.columns[name].path]
        return frozenset(top for path in paths for top in top_names(path))

    @cached_property
    def _all_needed(self) -> frozenset[str]:
        """Return the columns that a row with its answer is read for."""
        return self._columns_of(self.spec.variables(with_answer=True), ("options", "choice"))

    @cached_property
    def _asked(self) -> frozenset[str]:
        """Return the columns that a question is read for."""
        return self._columns_of(self.spec.variables(with_answer=False), ("options",))

    @cached_property
    def _beside_option(self) -> frozenset[str]:
        """Return the columns that the answer alone has beside its option, such as the reason; options go without."""
        return frozenset(name for name in self._all_needed - self._asked if self.spec.columns[name].kind != "choice")

    @cached_property
    def _whole_turns(self) -> tuple[str, ...]:
        """Return the columns of prompt and target that may be messages."""
        return whole_turns(self.spec)

    def _columns_of(self, names: set[str], kinds: tuple[str, ...]) -> frozenset[str]:
        columns = self.spec.columns
        read = {name for name, column in columns.items() if column.kind in kinds or name in names}
        return frozenset(read | ({self.spec.cut} if self.spec.cut else set()))

    def _needed(self, with_answer: bool) -> frozenset[str]:
        return self._all_needed if with_answer else self._asked

    def _read_columns(self, values: Mapping[str, Any], reader: RowValues, with_answer: bool) -> Sample:
        """Read the row's columns, and render the templates with them."""
        spec = self.spec
        needed = self._needed(with_answer)
        found = {name: self._read_column(name, values, reader) for name in spec.columns if name in needed}
        absent = {name: "" for name in spec.columns if name not in needed}
        variables: dict[str, Any] = {**absent, **found, "labels": list(labels_of(spec))}
        if spec.text is not None:
            text = render(spec.text, variables, "text")
            return Sample((Turn(TEXT, text, trained=True),))
        options = options_of(spec, variables)
        if options and with_answer:
            variables |= answer_variables(options, chosen_option(spec, values, options, variables))
        contexts = tuple(variables[spec.cut]) if spec.cut is not None else ()
        arrange = partial(self._arrange, variables, with_answer)
        turns = arrange(contexts)
        if with_answer:
            check_answer(spec, turns[-1].content)
        bare = {**variables, **dict.fromkeys(self._beside_option, "")}
        allowed = partial(answers_of, spec, bare, options) if options else tuple
        label = answer_of(spec, bare) if options and with_answer else None
        if label is not None and not turns[-1].content.startswith(label):
            raise RowFaultError(f"has an answer that does not begin with its option {label!r}; put it first in target")
        explained, cuttable = bool(options and self._beside_option), arrange if spec.cut is not None else None
        return Sample(turns, contexts, label=label, allowed=allowed, explained=explained, arrange=cuttable)

    def _arrange(self, variables: Mapping[str, Any], with_answer: bool, contexts: tuple[str, ...]) -> tuple[Turn, ...]:
        """Return the turns with these contexts."""
        spec = self.spec
        known = {**variables, **({spec.cut: list(contexts)} if spec.cut is not None else {})}
        turns = [turn for question, answer in self._history(known) for turn in (question, answer)]
        specs = spec.all_turns if with_answer else spec.all_turns[:-1]
        rendered = []
        for number, turn in enumerate(specs):
            text = render(turn.content, known, f"turn {number + 1} ({turn.role})").strip()
            if text or turn.role == ASSISTANT:
                learned = turn.train and (spec.train_on == "all" or number == len(spec.all_turns) - 1)
                rendered.append(Turn(turn.role, text, trained=turn.role == ASSISTANT and learned))
        if rendered and not rendered[-1].content:
            raise RowFaultError("has an empty answer; expected text")
        leading = [turn for turn in rendered[:1] if turn.role == SYSTEM]
        return (*leading, *turns, *rendered[len(leading) :])

    def _history(self, variables: Mapping[str, Any]) -> list[tuple[Turn, Turn]]:
        """Return the turns of the column of earlier questions and answers."""
        if self.spec.history is None:
            return []
        learned = self.spec.train_on == "all"
        return [
            (Turn(USER, question), Turn(ASSISTANT, answer, trained=learned))
            for question, answer in variables[self.spec.history] or ()
        ]

    def _read_conversation(self, values: Mapping[str, Any], reader: RowValues, with_answer: bool) -> Sample:
        """Read the column that holds a conversation, and which of its turns are learned."""
        spec = self.spec
        assert spec.conversation is not None
        path, messages = first_value(values, spec.columns[spec.conversation])
        if messages is MISSING:
            raise self._no_column(values, spec.conversation)
        turns, flags = read_messages(messages, path, reader, spec.tags)
        turns, flags = self._with_system(turns, flags, values, reader)
        return conversation_of(turns, flags, spec, with_answer, path)

    def _read_messages(self, values: Mapping[str, Any], reader: RowValues, with_answer: bool) -> Sample | None:
        """Read a prompt and its completion that are messages, as TRL has them; None if they are texts."""
        spec = self.spec
        names = self._whole_turns[: 1 + with_answer]
        if not names or (found := messages_in([first_value(values, spec.columns[name]) for name in names])) is None:
            return None
        if spec.history is not None and self._read_column(spec.history, values, reader):
            raise RowFaultError(
                f"has messages in {found[0][0]} and turns in {_key(spec, spec.history)}; put these into the messages"
            )
        turns, flags = read_messages(found[0][1], found[0][0], reader, spec.tags)
        turns, flags = self._with_system(turns, flags, values, reader)
        start = len(turns)
        for path, messages in found[1:]:
            more, more_flags = read_messages(messages, path, reader, spec.tags, may_begin_with_answer=True)
            turns, flags = [*turns, *more], [*flags, *more_flags]
        sample = conversation_of(turns, flags, spec, with_answer, found[-1][0], start)
        return replace(sample, tools=self._read_tools(values, spec.message_tools))

    def _with_system(
        self, turns: list[Turn], flags: list[bool | None], values: Mapping[str, Any], reader: RowValues
    ) -> tuple[list[Turn], list[bool | None]]:
        """Put the task's system prompt before a conversation that has none."""
        if self.spec.system is None or (turns and turns[0].role == SYSTEM):
            return turns, flags
        names = used_variables(self.spec.system) & set(self.spec.columns)
        known = {name: self._read_column(name, values, reader) for name in names}
        system = render(self.spec.system, known, "system").strip()
        return ([Turn(SYSTEM, system), *turns], [None, *flags]) if system else (turns, flags)

    def _read_tools(self, values: Mapping[str, Any], name: str | None) -> tuple[Mapping[str, Any], ...]:
        """Return the functions that a row declares in a column, as JSON schemas."""
        if name is None:
            return ()
        shown = _key(self.spec, name)
        _, value = first_value(values, self.spec.columns[name])
        value = () if is_empty(value) or isinstance(value, MissingWord) else unprinted(value, shown)
        if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
            raise RowFaultError(f"has no list of functions in {shown}; expected their JSON schemas")
        return tuple(dict(tool) for tool in value)

    def _read_column(self, name: str, values: Mapping[str, Any], reader: RowValues) -> Any:
        """Return a column's value as its kind says; its default if the row has none."""
        column = self.spec.columns[name]
        path, value = first_value(values, column)
        if value is MISSING and not column.may_be_missing:
            raise self._no_column(values, name)
        check_found(values, column, path, value, self.spec.leaks if name in self._asked else ())
        if value is not MISSING and column.kind == "options" and "," in path:
            value = without_gaps(find_each(values, path))
        if isinstance(value, MissingWord) and name not in self._asked and value.strip() in labels_of(self.spec):
            value = str(value)
        if is_left_out(column, value):
            return empty_value(column) if column.default is None else column.default
        return read_kind(column, value, shown_path(values, path), name, reader)

    def _no_column(self, values: Mapping[str, Any], name: str) -> RowFaultError:
        return RowFaultError(f"has no column {self.describe(name)}; it has {', '.join(map(str, values)) or 'none'}")


def _key(spec: TaskSpec, name: str) -> str:
    return spec.columns[name].path[0]
