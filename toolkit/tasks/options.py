"""The options of a question, and each of them as the answer that it would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.tasks.columns import MISSING, find
from toolkit.tasks.kinds import first_value
from toolkit.tasks.output import labels_of
from toolkit.tasks.row_values import LETTERS, choose
from toolkit.tasks.sample import RowFaultError
from toolkit.tasks.task_file import TaskSpec
from toolkit.tasks.templates import render


def options_of(spec: TaskSpec, variables: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options of a row, or the task's labels; none if the answer is free text.

    Raises:
        RowFaultError: there is one, or none, and the answer is to be an option.
    """
    if not any(column.kind == "choice" for column in spec.columns.values()):
        return ()
    own = next((name for name, column in spec.columns.items() if column.kind == "options"), None)
    options = tuple(variables.get(own) or ()) if own is not None else ()
    options = options or labels_of(spec)
    if len(options) < 2:
        raise RowFaultError(f"has {len(options)} options; expected two or more, or labels in the task's output")
    return options


def chosen_option(
    spec: TaskSpec, values: Mapping[str, Any], options: Sequence[str], variables: Mapping[str, Any]
) -> int:
    """Return the index of the option that a row's answer names; see ``choose`` for what is raised."""
    name, column = next(one for one in spec.columns.items() if one[1].kind == "choice")
    is_fixed = options == labels_of(spec)
    marks = () if is_fixed else _marks_of(spec, values, len(options))
    return choose(variables[name], options, column.path[0], spec.first_number, is_fixed, marks)


def _marks_of(spec: TaskSpec, values: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Return what a row calls each of its ``count`` options: its list ``choices.label`` beside ``choices.text``.

    Such a list is ARC's. Nothing if there is none, or it does not name each of them once.
    """
    column = next((column for column in spec.columns.values() if column.kind == "options"), None)
    path = "" if column is None else first_value(values, column)[0]
    parent, _, last = path.rpartition(".")
    found = find(values, f"{parent}.label") if parent and last == "text" else MISSING
    if not isinstance(found, Sequence) or isinstance(found, str):
        return ()
    marks = tuple(str(mark).strip() for mark in found)
    return marks if len(marks) == len(set(marks)) == count else ()


def answer_variables(options: Sequence[str], chosen: int) -> dict[str, Any]:
    """Return what a target template knows of the option that is the answer."""
    return {"label": options[chosen], "number": chosen + 1, "letter": LETTERS[chosen] if chosen < len(LETTERS) else ""}


def answers_of(spec: TaskSpec, variables: Mapping[str, Any], options: Sequence[str]) -> tuple[str, ...]:
    """Return each option as the answer that it would be."""
    return tuple(answer_of(spec, {**variables, **answer_variables(options, at)}) for at in range(len(options)))


def answer_of(spec: TaskSpec, variables: Mapping[str, Any]) -> str:
    """Return the answer that a row's variables make."""
    return render(spec.all_turns[-1].content, variables, "target").strip()
