"""Forgetting: what models lost of abilities that they were not trained for, on labelled items of the user's."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from toolkit.config.schema import DataConfig
from toolkit.data.sources import Row, Source, iter_rows
from toolkit.data.tokenising import source_columns
from toolkit.evaluation.contamination import public_source
from toolkit.runtime.errors import DataError, UsageError
from toolkit.tasks.choose import find_task
from toolkit.tasks.lm_eval import PLAIN_TEMPLATE, LmEvalTask, is_lm_eval_file, read_lm_eval_task
from toolkit.tasks.sample import RowFaultError

log = logging.getLogger("frostline")

FLAG, TASK_FLAG = "--forgetting", "--forgetting.task"


@dataclass(frozen=True)
class Items:
    """Labelled questions with options, each of which was read once."""

    source: Source
    count: int
    data: str | None = None
    """Origin of the items, as a phrase; None where the source's path tells it."""
    plain_template: str | None = None
    """Chat template of models that have none of their own; None takes texts with blank lines between them."""


@contextmanager
def labelled_items(file: str, task: str | Mapping[str, Any] | None) -> Iterator[Items]:
    """Read labelled items, all of which are checked before a model loads.

    Args:
        file: rows with options, or a task file of lm-eval that names local rows.
        task: by which they are read, or a task file of lm-eval; None is ``choice``, or the file's own.

    Raises:
        DataError: a file cannot be read, or a row is no question with options and an answer.
        ConfigError: the task is wrong, or one of lm-eval with more than templates.
        UsageError: two tasks are named.
    """
    lm_eval_file = next((str(name) for name in (task, file) if isinstance(name, str) and is_lm_eval_file(name)), None)
    if lm_eval_file is None:
        source = Source(file, key=FLAG, task="choice" if task is None else task)
        yield Items(source, _check(source))
        return
    if lm_eval_file == file and task is not None:
        raise UsageError(f"{FLAG} {file} is a task of lm-eval, and {TASK_FLAG} names another; leave out one of the two")
    lm_eval = read_lm_eval_task(lm_eval_file)
    files = lm_eval.files if lm_eval_file == file else (file,)
    if not files:
        raise DataError(
            f"{file} names no local rows (dataset_kwargs: {{data_files: …}}); expected {FLAG} ROWS {TASK_FLAG} {file}"
        )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "items.jsonl"
        count = _write_items(lm_eval, files, path)
        names = ", ".join(files)
        spec = _choice_task(f"lm-eval {lm_eval.name}", public_source(f"{names} {lm_eval.name}"))
        data = (
            f"all {count} rows of {names} by lm-eval's task {lm_eval.name} (accuracy is acc, accuracy_per_character "
            "acc_norm); prompts by each model's chat template (lm-eval's --apply_chat_template), plain for one without"
        )
        source = Source(str(path), key=FLAG, task=spec)
        yield Items(source, _check(source), data, PLAIN_TEMPLATE)


def _check(source: Source) -> int:
    """Return the number of items; DataError names the first that is none."""
    columns, rows = source_columns(iter_rows(source))
    task = find_task(DataConfig.model_validate({"task": source.task}), columns, origin=source.name, key=TASK_FLAG)
    count = 0
    for row in rows:
        try:
            if row.fault is not None:
                raise RowFaultError(row.fault)
            if task.read(row.values).label is None:
                raise RowFaultError(f"has no options by task {task.name}; expected those of which one is right")
        except RowFaultError as fault:
            raise DataError(f"{FLAG}: {row.origin} {fault}") from None
        count += 1
    return count


def _write_items(task: LmEvalTask, files: tuple[str, ...], path: Path) -> int:
    """Write the items that a task of lm-eval makes of rows; return their number."""
    rows = list(_rows(files))
    columns = {str(name) for row in rows if isinstance(row.values, Mapping) for name in row.values}
    lines = []
    for row in rows:
        try:
            if row.fault is not None:
                raise RowFaultError(row.fault)
            lines.append(json.dumps(task.item(row.values, columns), ensure_ascii=False))
        except RowFaultError as fault:
            raise DataError(f"{FLAG}: {row.origin} {fault} (lm-eval's task {task.name})") from None
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def _rows(files: tuple[str, ...]) -> Iterator[Row]:
    return chain.from_iterable(iter_rows(Source(file, key=FLAG, default_split="test")) for file in files)


def _choice_task(name: str, public: str | None) -> dict[str, Any]:
    """Return the task of ready questions, options and numbers of the right ones."""
    return {
        "name": name,
        "columns": {
            "question": {"path": "question", "kind": "raw"},
            "options": {"path": "options", "kind": "options"},
            "answer": {"path": "answer", "kind": "choice"},
        },
        "prompt": "{{ question }}",
        "target": "{{ label }}",
        "first_number": 0,
        "public_source": public,
    }
