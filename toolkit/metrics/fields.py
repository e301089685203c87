"""Metrics of answers that are JSON: whether they keep to their schema, and which of their fields are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from toolkit.metrics.metric import Metric, check_rows, mean_metric
from toolkit.runtime.errors import DataError

_ABSENT = object()


def field_metrics(
    answers: Sequence[str], references: Sequence[str], is_valid: Callable[[str], bool]
) -> list[Metric]:  # fmt: skip
    """Return the metrics of JSON answers.

    ``valid`` is the share that ``is_valid``, and ``exact_match`` that of the reference's value; ``fields`` is the share
    of the reference's fields that the answers have with their value, and ``field/NAME`` that of one at the top. A field
    within another is one by itself; a list is one value. An answer that is no JSON, or is nested too deeply to be
    read, has no field.

    Raises:
        DataError: a reference is no JSON, or there are no rows, or other answers than references.
    """
    check_rows(answers=answers, references=references)
    wanted = [_reference(reference) for reference in references]
    given = [_parsed(answer) for answer in answers]
    flat = [(_flat(one), _flat(other)) for one, other in zip(given, wanted, strict=True)]
    hits = [[_same(own.get(path, _ABSENT), value) for path, value in of_row.items()] for own, of_row in flat]
    found = [
        mean_metric("valid", np.array([float(is_valid(answer)) for answer in answers])),
        mean_metric("exact_match", np.array([float(_same(*pair)) for pair in zip(given, wanted, strict=True)])),
        mean_metric("fields", np.array(list(map(sum, hits))), np.array(list(map(len, hits)))),
    ]
    names = dict.fromkeys(name for value in wanted if isinstance(value, Mapping) for name in value)
    for name in names:
        pairs = [
            (_at(own, name), _at(value, name)) for own, value in zip(given, wanted, strict=True)
        ]  # fmt: skip
        has = np.array([float(value is not _ABSENT) for _, value in pairs])
        right = np.array([float(value is not _ABSENT and _same(own, value)) for own, value in pairs])
        found.append(mean_metric(f"field/{name}", right, has))
    return found


def _reference(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"the reference {text[:60]!r} is not JSON ({error}); expected JSON, as in the answers"
        ) from None


def _parsed(text: str) -> Any:
    """Return the value of an answer; _ABSENT if it is no JSON that can be walked through."""
    try:
        value = json.loads(text)
        _flat(value)  # takes more of the stack than json does: a loop of braces is read, and not walked through
    except (ValueError, RecursionError):
        return _ABSENT
    return value


def _at(value: Any, name: str) -> Any:
    return value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return the fields of a value by their path; a value that is no object is one field."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {at: one for name, own in value.items() for at, one in _flat(own, (*path, name)).items()}


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; 1 is 1.0, and true is no 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)
