"""Make samples of messages: which turns of a conversation are learned; prompts and completions that are messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from toolkit.tasks.columns import MISSING
from toolkit.tasks.missing import is_missing
from toolkit.tasks.output import check_answer
from toolkit.tasks.row_values import unprinted
from toolkit.tasks.sample import ASSISTANT, SYSTEM, RowFaultError, Sample, Turn
from toolkit.tasks.task_file import TaskSpec

_PRINTED = re.compile(r"""\s*\[\s*\{(?=\s*["'])[\s\S]*?["'](?:role|from)["']\s*:""")
"""How a list of messages begins that was printed into a table; keys of a message may stand in any order."""
_ONE_COLUMN = re.compile(r"\{\{ *(\w+) *\}\}")


def conversation_of(
    turns: Sequence[Turn], flags: Sequence[bool | None], spec: TaskSpec, with_answer: bool, path: str, start: int = 0
) -> Sample:
    """Make a sample of a conversation, whose answers from turn ``start`` on may be learned, each as its flag says.

    What follows the last answer that is learned is left out; without answer, nothing is. ``path`` is the column of the
    messages.

    Raises:
        RowFaultError: it has no question, no answer, or none that is to be learned.
    """
    if not with_answer:
        if all(turn.role == SYSTEM for turn in turns):
            raise RowFaultError(f"has no question in {path}; expected a turn of the user")
        return Sample(tuple(turns))
    last = max((at for at in range(start, len(turns)) if turns[at].role == ASSISTANT), default=None)
    if last is None:
        raise RowFaultError(f"has no answer in its {path if start else 'conversation'}; expected one of the assistant")
    trained = [
        turn.role == ASSISTANT and at >= start and flag is not False and (spec.train_on == "all" or at == last)
        for at, (turn, flag) in enumerate(zip(turns, flags, strict=True))
    ]
    if not any(trained):
        raise RowFaultError("has no answer that is to be learned; each is marked as not to be")
    end = max(at for at, learned in enumerate(trained) if learned) + 1
    kept = tuple(replace(turn, trained=learned) for turn, learned in zip(turns, trained, strict=True))[:end]
    check_answer(spec, kept[-1].content)
    return Sample(kept)


def whole_turns(spec: TaskSpec) -> tuple[str, ...]:
    """Return the columns that are the whole prompt and the whole target of a task; none if a template adds to them.

    Only these may be lists of messages in place of texts.
    """
    found = [_ONE_COLUMN.fullmatch(template) for template in (spec.prompt, spec.target) if template is not None]
    names = [match[1] for match in found if match is not None and match[1] in spec.columns]
    kinds = {spec.columns[name].kind for name in names}
    return tuple(names) if len(names) == 2 and kinds <= {"text", "raw"} else ()


def messages_in(found: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]] | None:
    """Return the prompt and completion of a row, each with its column, if they are messages; None if they are texts.

    Raises:
        RowFaultError: one of them is messages and the other is not.
    """
    if all(isinstance(value, str) and _PRINTED.match(value) for _, value in found):
        read = [(name, unprinted(value, name)) for name, value in found]
        found = read if all(_has_roles(value) for _, value in read) else found  # else texts that are JSON
    kinds = [_kind(value) for _, value in found]
    if "messages" not in kinds:
        return None
    if set(kinds) != {"messages"}:
        each = " and ".join(f"{kind} in {name}" for kind, (name, _) in zip(kinds, found, strict=True))
        raise RowFaultError(f"has {each}; expected messages in both, or text in both")
    return list(found)


def _has_roles(value: Any) -> bool:
    """Return whether a value that was printed is a list of messages, each with its role."""
    return _kind(value) == "messages" and all("role" in one or "from" in one for one in value)


def _kind(value: Any) -> str:
    """Return what a value is, in words."""
    if value is MISSING:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if is_missing(value):
        return "null"
    if isinstance(value, Sequence) and value and all(isinstance(one, Mapping) for one in value):
        return "messages"
    return f"an empty {type(value).__name__}" if value in ([], {}) else f"a {type(value).__name__}"
