"""The options of a question, and each of them as the answer that it would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.tasks.output import labels_of
from toolkit.tasks.row_values import LETTERS
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


def answer_variables(options: Sequence[str], chosen: int) -> dict[str, Any]:
    """Return what a target template knows of the option that is the answer."""
    return {"label": options[chosen], "number": chosen + 1, "letter": LETTERS[chosen] if chosen < len(LETTERS) else ""}


def answers_of(spec: TaskSpec, variables: Mapping[str, Any], options: Sequence[str]) -> tuple[str, ...]:
    """Return each option as the answer that it would be."""
    return tuple(answer_of(spec, {**variables, **answer_variables(options, at)}) for at in range(len(options)))


def answer_of(spec: TaskSpec, variables: Mapping[str, Any]) -> str:
    """Return the answer that a row's variables make."""
    return render(spec.all_turns[-1].content, variables, "target").strip()
