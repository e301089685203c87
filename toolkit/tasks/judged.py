"""Refuse rows that judge answers or set a good one beside a bad one: supervised tuning would learn the bad ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.runtime.errors import DataError
from toolkit.tasks.columns import loose
from toolkit.tasks.sample import RowFaultError

_BAD_ANSWERS = tuple(map(loose, ("rejected", *(f"rejected_{name}" for name in (
    "response", "message", "answer", "output", "completion", "conversation", "text",
)))))  # fmt: skip
"""Columns that hold an answer not to be learned, by their loose names."""
_TAG = loose("kto_tag")
_LABEL = "label"
_TASKS = {loose("messages"): "messages", loose("conversations"): "sharegpt", loose("instruction"): "alpaca"}
"""Tasks that read all answers, by a column that tells them from prompt and completion."""


def refuse_judged_columns(columns: Sequence[str], key: str) -> None:
    """Raise DataError if columns are those of preference pairs or judged answers; ``key`` is where a task is named."""
    named = {loose(column): column for column in columns}
    if {loose("chosen"), loose("rejected")} <= named.keys():
        raise DataError(
            "the rows are preference pairs (chosen, rejected), which are not for supervised tuning: it would learn one "
            "and ignore the other. To learn the chosen answers, map the column: "
            f"{key}: {{name: prompt_completion, columns: {{completion: chosen}}}}"
        )
    judged = next((named[name] for name in (*_BAD_ANSWERS, _TAG) if name in named), None)
    if judged is None and {loose("prompt"), loose("completion"), _LABEL} <= named.keys():
        judged = f"{named[_LABEL]} beside prompt and completion"
    if judged is not None:
        task = next((task for column, task in _TASKS.items() if column in named), "prompt_completion")
        raise DataError(
            f"the rows are judged answers ({judged}), which are not for supervised tuning: it would learn the bad "
            f"ones, too. To learn every answer all the same, name the task: {key}: {task}"
        )


def require_no_judgement(values: Mapping[Any, Any]) -> None:
    """Raise RowFaultError if a row says by a label of true or false whether its answer is good (KTO)."""
    for name, value in values.items():
        is_judgement = isinstance(value, bool) or (
            isinstance(value, str) and value.strip().lower() in ("true", "false")
        )
        if is_judgement and loose(name) == _LABEL:
            raise RowFaultError(
                f"has {name}: {str(value).lower()} beside its answer, as judged answers have, which are not for "
                "supervised tuning: it would learn the bad ones, too. Leave these rows and the column out; or, to "
                "learn every answer all the same, name the task in data.task"
            )
