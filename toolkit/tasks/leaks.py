"""Keep columns that give the outcome away out of what a model is asked (``leaks`` of a task file)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from toolkit.tasks.columns import loose
from toolkit.tasks.sample import RowFaultError


def leak_in_path(path: str, leaks: Iterable[str]) -> str | None:
    """Return the first of ``leaks`` that a path of a row reads, or reads something that holds it; None if none.

    Names match loosely (``columns.loose``) and by the wildcards ``*`` and ``?``: ``reasoning_*_pred`` is found in
    ``context.reasoning_free_preds``. Of a leak with dots its parts are found side by side.
    """
    for leak in leaks:
        wanted = _parts(leak)
        if any(_reads(_parts(part), wanted) for part in path.split(",")):
            return leak
    return None


def require_no_leak(columns: Mapping[str, Sequence[str]], users: Mapping[str, set[str]], leaks: Sequence[str]) -> None:
    """Refuse a task whose question uses a column that gives its outcome away.

    Args:
        columns: paths of each column of the task.
        users: columns that each part of the question uses, by that part's key.
        leaks: names or patterns of columns of the rows.

    Raises:
        ValueError: names the column, its path and what uses it.
    """
    for name, paths in columns.items():
        found = [(path, leak) for path in paths if (leak := leak_in_path(path, leaks)) is not None]
        used_by = [key for key, names in users.items() if name in names]
        if found and used_by:
            path, leak = found[0]
            declared = "" if leak == path else f" as {leak}"
            raise ValueError(
                f"columns.{name} reads {path}, which gives the outcome away (leaks has it{declared}), and "
                f"{used_by[0]} uses it; map another column, take {name} out of {used_by[0]}, or take it out of leaks "
                "if the model is to be given it"
            )


def require_none_inside(value: Any, leaks: Sequence[str], shown: str) -> None:
    """Raise RowFaultError if an object or list, the column ``shown`` of a row, holds a key that ``leaks`` has."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{shown}.{key}"
            if leak_in_path(place, leaks) is not None:
                raise RowFaultError(
                    f"has {place}, which gives the outcome away (leaks of the task); name the parts of {shown} that "
                    f"may be asked with, as in {shown}.text"
                )
            require_none_inside(inner, leaks, place)
    elif isinstance(value, list | tuple):
        for inner in value:
            require_none_inside(inner, leaks, shown)


def _parts(path: str) -> list[str]:
    return [loose(name.strip().removesuffix("[]")) for name in path.strip().split(".")]


def _reads(path: Sequence[str], leak: Sequence[str]) -> bool:
    """Return whether the parts of a leak stand side by side in a path, or the path ends at what holds the leak."""
    windows = [path[start : start + len(leak)] for start in range(len(path) - len(leak) + 1)]
    holds = len(path) < len(leak) and _same(path, leak[: len(path)])
    return holds or any(_same(window, leak) for window in windows)


def _same(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(fnmatchcase(name, pattern) for name, pattern in zip(names, patterns, strict=True))
