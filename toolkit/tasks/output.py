"""What an answer may be: one of a list of labels, or JSON by a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from toolkit.runtime.errors import UsageError
from toolkit.tasks.sample import RowFaultError
from toolkit.tasks.task_file import OutputSpec, TaskSpec


def labels_of(spec: TaskSpec) -> tuple[str, ...]:
    """Return the task's fixed labels; none if it has no list of them."""
    output = spec.output
    return tuple(output.labels) if isinstance(output, OutputSpec) and output.labels else ()


def schema_of(spec: TaskSpec) -> Mapping[str, Any] | None:
    """Return the JSON schema of the task's answers; None if they are no JSON."""
    output = spec.output
    return output.json_schema if isinstance(output, OutputSpec) and isinstance(output.json_schema, dict) else None


def check_answer(spec: TaskSpec, answer: str) -> None:
    """Raise RowFaultError if an answer is none that the task allows.

    Options that a row brings are checked where its answer is read.
    """
    labels = labels_of(spec)
    if labels and answer not in labels and not any(column.kind == "choice" for column in spec.columns.values()):
        raise RowFaultError(f"has the answer {answer[:60]!r}; expected one of {', '.join(labels)}")
    if (schema := schema_of(spec)) is not None:
        check_json(answer, schema)


def is_answer(spec: TaskSpec, answer: str) -> bool:
    """Return whether an answer is one that the task allows, see ``check_answer``."""
    try:
        check_answer(spec, answer)
    except RowFaultError:
        return False
    return True


def check_json(answer: str, schema: Mapping[str, Any]) -> None:
    """Raise RowFaultError if an answer is not JSON, or breaks the schema; UsageError if that is none."""
    import jsonschema
    from referencing.exceptions import Unresolvable

    try:
        value = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise RowFaultError(f"has an answer that is not JSON ({error})") from None
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        raise RowFaultError(
            f"has an answer that breaks the task's schema{f' at {where}' if where else ''}: {error.message[:200]}"
        ) from None
    except Unresolvable as error:
        raise UsageError(f"the task's schema has a $ref that leads nowhere: {error}") from None
    except RecursionError:
        raise UsageError("the task's schema has a $ref that leads back to itself") from None
    except jsonschema.SchemaError as error:
        raise UsageError(f"the task's schema is no JSON schema: {error.message[:200]}") from None
