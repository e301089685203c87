"""Choose the task of a recipe: by name, by file, by an inline mapping, or by the columns that the rows have."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from typing import Any

from toolkit.config.data_schema import DataConfig
from toolkit.runtime.errors import ConfigError, DataError
from toolkit.runtime.paths import read_regular
from toolkit.runtime.printable import one_line
from toolkit.runtime.shipped import find_file, shipped_file
from toolkit.tasks.columns import nearest
from toolkit.tasks.dataset_info import from_dataset_info
from toolkit.tasks.judged import refuse_judged_columns
from toolkit.tasks.task import Task
from toolkit.tasks.task_file import OutputSpec, TaskSpec, check_spec, read_task_file

log = logging.getLogger("frostline")

AUTO, DEFAULT = "auto", "long_answer"
"""What ``data.task`` is by default, and the task of questions without rows."""
SHIPPED = ("messages", "sharegpt", "choice", "long_answer", "alpaca", "prompt_completion", "text")
"""Tasks that come with Frostline, in the order in which rows are tried against them."""
BY_NAME = (
    *SHIPPED, "pubmedqa", "decision", "decision_reasoning_free", "triage", "triage_en", "ae_triage", "ae_coding",
    "grounded_document",
)  # fmt: skip
"""All tasks that come with Frostline: also one that the columns of rows cannot tell."""
PASSAGES = "passages"
"""A task's column that ``data.retrieval`` fills."""
MOST_ROWS = 100
"""Rows whose columns are looked at to recognise a task."""


def columns_of(rows: Iterable[Any]) -> list[str]:
    """Return the columns of the first rows that are objects, each once, in order."""
    seen: dict[str, None] = {}
    for _, values in zip(range(MOST_ROWS), (row for row in rows if isinstance(row, Mapping)), strict=False):
        seen |= dict.fromkeys(one_line(str(key)) for key in values)
    return list(seen)


def choose_task(
    data: DataConfig, columns: Sequence[str], with_answer: bool = True, origin: str = "the rows", key: str = "data.task"
) -> Task:
    """Return the task that ``data.task`` names, or for ``auto`` the one that fits rows with these columns, and log it.

    Args:
        data: section of the recipe.
        columns: columns of the first rows (``columns_of``); none if no row is an object, which then is its fault.
        with_answer: whether the rows must have what an answer is made of.
        origin: where the rows come from, for messages.
        key: what names the task, for messages.

    Raises:
        ConfigError: a task file or mapping is wrong; names the line.
        DataError: there is no such task, the rows lack a column that it needs, or none fits them.
    """
    task = find_task(data, columns, with_answer, origin, key)
    if data.task == AUTO and columns:
        log.info("%s: auto takes %s (%s); columns: %s", key, task.name, task.spec.summary, ", ".join(columns))
    for note in task.notes(_with_passages(columns, task, data)) if columns else ():
        log.info("task %s: %s", task.name, note)
    return task


def find_task(
    data: DataConfig, columns: Sequence[str], with_answer: bool = True, origin: str = "the rows", key: str = "data.task"
) -> Task:
    """Return the task as ``choose_task`` does, without a word in the log."""
    recognised = data.task == AUTO
    try:
        task = recognise_task(columns, with_answer, key) if recognised else load_task(data.task, key)
    except DataError as fault:
        if recognised:
            raise DataError(f"{origin}: {fault}") from None
        raise
    task = _with_settings(task, data)
    if columns and not recognised and (missing := task.missing(_with_passages(columns, task, data), with_answer)):
        raise DataError(f"{origin}: {_missing_text(task, missing, columns, with_answer, key)}{_one_column(columns)}")
    return task


def _with_passages(columns: Sequence[str], task: Task, data: DataConfig) -> list[str]:
    """Return the columns that rows have once ``data.retrieval`` has added passages."""
    own = task.spec.columns.get(PASSAGES)
    return [*columns, *(own.path[:1] if data.retrieval is not None and own is not None else ())]


def task_for_questions(data: DataConfig, rows: Iterable[Any] = ()) -> Task:
    """Return the task by which questions are read that a model is to answer; without rows, that of a question alone.

    Raises:
        ConfigError, DataError: as ``choose_task``.
    """
    columns = columns_of(rows)
    if data.task == AUTO and not columns:
        return _with_settings(load_task(DEFAULT), data)
    return choose_task(data, columns, with_answer=False)


def recognise_task(columns: Sequence[str], with_answer: bool = True, key: str = "data.task") -> Task:
    """Return the first shipped task that fits rows with these columns; ``long_answer`` if there are none.

    ``key`` is where a task is named, for messages.

    Raises:
        DataError: none fits, or the rows are preference pairs or judged answers.
    """
    refuse_judged_columns(columns, key)
    if not columns:
        return load_task(DEFAULT)
    if (fitting := fitting_task(columns, with_answer)) is not None:
        return replace(fitting, refuses_judged="label" not in fitting.answer_columns)
    partly = [
        task
        for task in map(load_task, SHIPPED)
        if not task.missing(columns, with_answer=False) and task.has_options(columns)
    ]
    forms = "; ".join(f"{name} ({', '.join(_needed_columns(load_task(name), with_answer))})" for name in SHIPPED)
    best = f". {_missing_text(partly[0], partly[0].missing(columns), columns, with_answer, key)}" if partly else ""
    raise DataError(
        f"{key}: auto knows no task for rows with the columns {', '.join(columns)}; expected those of one of: "
        f"{forms}{best}. Map them, as in {key}: {{name: prompt_completion, columns: {{prompt: …, completion: …}}}}"
        f"{_one_column(columns)}"
    )


def _one_column(columns: Sequence[str]) -> str:
    """Return what may be wrong with rows whose only column has no simple name: a separator that was not known."""
    if len(columns) != 1 or columns[0].isidentifier():
        return ""
    return (
        ". If that one column is several, data.separator names the character between them, and a title above the "
        "header is to be taken away"
    )


def fitting_task(columns: Sequence[str], with_answer: bool = True) -> Task | None:
    """Return the first shipped task whose columns rows with these columns have; None if there is none."""
    tasks = map(load_task, SHIPPED)
    fitting = (task for task in tasks if not task.missing(columns, with_answer) and task.has_options(columns))
    return next(fitting, None)


def load_task(task: str | Mapping[str, Any], key: str = "data.task") -> Task:
    """Load a task by its name, its file, or a mapping that changes one, is one, or names a LLaMA-Factory entry.

    ``key`` is what names it, for messages.

    Raises:
        ConfigError: the file or mapping is wrong; names the line.
        DataError: there is no such task or file.
    """
    if isinstance(task, str):
        return Task(_shipped(task) if task in BY_NAME else _from_file(task, key))
    if "dataset_info" in task:
        return load_task(from_dataset_info(task))
    return Task(_built(dict(task), f"{key} of the recipe", {}))


@cache
def _shipped(name: str) -> TaskSpec:
    values, lines = read_task_file(str(shipped_file(f"recipes/tasks/{name}.yaml")), "data.task")
    if "extends" in values:
        return _built(values, f"task file {name}", lines)
    return check_spec(values, f"task file {name}", lines)


def _from_file(path: str, key: str) -> TaskSpec:
    """Read the task file of a user."""
    if not path.endswith((".yaml", ".yml", ".json")) and not find_file(path).is_file():
        near = nearest(path, BY_NAME)
        raise DataError(
            f"{key} is {path}, which is no task and no file; expected auto, {', '.join(BY_NAME)}, or a task file "
            f"(docs/tasks.md){f' (did you mean {near}?)' if near else ''}"
        )
    values, lines = read_task_file(path, key)
    return _built(values, f"task file {path}", lines, path.rpartition("/")[2].rpartition(".")[0])


def _built(
    values: dict[str, Any], source: str, lines: Mapping[tuple[str, ...], int], file_name: str | None = None
) -> TaskSpec:
    """Validate a task's values, over those of the task that it extends: ``extends``, or a ``name`` that is shipped.

    ``file_name`` names a task whose file does not: that extends nothing, whatever the file is called.
    """
    base = values.pop("extends", None)
    name = values.get("name")
    if base is None and name in BY_NAME:
        base = name
    if base is None and not lines and "columns" not in values and isinstance(name, str):
        near = nearest(name, BY_NAME)
        hint = f" (did you mean {near}?)" if near else ""
        raise ConfigError(
            [f"name is {name}, which is no task{hint}; expected one of {', '.join(BY_NAME)}, or columns and turns"],
            source,
        )
    if file_name is not None:
        values.setdefault("name", file_name)
    own_columns: set[str] = set()
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError([f"extends is {base!r}; expected the name of a task, or its file"], source)
        known = _shipped(base) if base in BY_NAME else _from_file(base, "extends")
        own_columns = set(values.get("columns") or ()) - set(known.columns)
        values = _laid_over(known.model_dump(by_alias=True, exclude_unset=True), values, source)
    spec = check_spec(values, source, lines)
    _check_used(spec, own_columns, source)
    if isinstance(spec.output, OutputSpec) and isinstance(spec.output.json_schema, str):
        output = OutputSpec.model_validate({"schema": _read_schema(spec.output.json_schema)})
        return spec.model_copy(update={"output": output})
    return spec


def _check_used(spec: TaskSpec, own_columns: Set[str], source: str) -> None:
    """Raise ConfigError if a column that is added to a known task is used by nothing, such as context for contexts."""
    used = spec.variables(with_answer=True) | {name for name in (spec.cut, spec.message_tools) if name}
    used |= {name for name, column in spec.columns.items() if column.kind in ("options", "choice")}
    for name in sorted(own_columns - used):
        rest = [known for known in spec.columns if known in used]
        near = nearest(name, rest)
        hint = f" (did you mean {near}?)" if near else ""
        raise ConfigError([f"columns has {name}, which the task does not use{hint}; it uses {', '.join(rest)}"], source)


def _laid_over(base: Mapping[str, Any], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a task's values with some replaced; a column that is only a path keeps its kind and default."""
    merged = {**base, **values}
    columns = values.get("columns", {})
    if not isinstance(columns, Mapping):
        raise ConfigError([f"columns is {columns!r}; expected names with their paths"], source)
    merged["columns"] = {**base["columns"]}
    for name, column in columns.items():
        known = base["columns"].get(name, {})
        own = {"path": column} if isinstance(column, str | list) else column
        merged["columns"][name] = {**known, **own} if isinstance(own, Mapping) else own
    forms = ("conversation", "text", "prompt", "turns")
    if any(form in values for form in forms):  # another way of making turns takes the place of the base's
        for form in (*forms, "target"):
            if form not in values and not (form in ("prompt", "target") and {"prompt", "target"} & values.keys()):
                merged.pop(form, None)
    return merged


def _read_schema(path: str) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(find_file(path), 2**26))
    except (OSError, ValueError) as error:
        raise DataError(f"the task's schema is {path}, which cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}; expected a JSON schema, which is an object")
    return value


def _with_settings(task: Task, data: DataConfig) -> Task:
    """Return the task with the recipe's own settings."""
    spec = task.spec if data.train_on is None else task.spec.model_copy(update={"train_on": data.train_on})
    return replace(task, spec=spec, normalize=data.normalize == "nfc")


def _needed_columns(task: Task, with_answer: bool) -> list[str]:
    return [task.spec.columns[name].path[0] for name in task.missing((), with_answer)]


def _missing_text(task: Task, missing: Sequence[str], columns: Sequence[str], with_answer: bool, key: str) -> str:
    """Say which columns are missing, what is named most like them, and which task would fit."""
    wanted = ", ".join(task.describe(name) for name in missing)
    text = f"task {task.name} needs the column{'s' if len(missing) > 1 else ''} {wanted}; the rows have "
    text += ", ".join(columns)
    if PASSAGES in missing:
        text += ". data.retrieval adds passages, as in data.retrieval: {corpus: DIR}"
    for name in missing:
        if near := nearest(task.spec.columns[name].path[0], columns) or nearest(name, columns):
            text += f". {near} is named most like it: {key}: {{name: {task.name}, columns: {{{name}: {near}}}}}"
    fitting = [
        name for name, other in ((name, load_task(name)) for name in SHIPPED)
        if name != task.name and not other.missing(columns, with_answer) and other.has_options(columns)
    ]  # fmt: skip
    return text + (f". {key}: {fitting[0]} would fit them" if fitting else "")
