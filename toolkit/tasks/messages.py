"""Read a list of messages, in the forms of OpenAI, ShareGPT and their kin, into turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.tasks.missing import is_missing
from toolkit.tasks.row_values import RowValues, unprinted
from toolkit.tasks.sample import ASSISTANT, SYSTEM, TOOL, USER, RowFaultError, Turn
from toolkit.tasks.task_file import TagsSpec

_CALL = "function_call"
_ROLES = {
    "user": USER, "human": USER, "prompter": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT,
    "bot": ASSISTANT, "chatgpt": ASSISTANT, "system": SYSTEM, "developer": SYSTEM, "tool": TOOL, "ipython": TOOL,
    "observation": TOOL, "function": TOOL, "function_response": TOOL, "tool_response": TOOL, "function_call": _CALL,
}  # fmt: skip
"""Our role by the names that others give it, in lower case."""
_EXCHANGE_KEYS = {name for name, ours in _ROLES.items() if ours in (USER, ASSISTANT)}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_FLAG_KEYS = ("train", "training", "trained", "weight", "loss")
"""Keys of a message that say whether it is learned: false or 0 is not."""


def read_messages(
    value: Any, name: str, values: RowValues, tags: TagsSpec, may_begin_with_answer: bool = False
) -> tuple[list[Turn], list[bool | None]]:
    """Return the turns of a list of messages, and each one's own flag of whether it is learned (None without one).

    Raises:
        RowFaultError: it is no such list, a message has no role or content, or the first is an answer.
    """
    value = unprinted(value, name)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        kind = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise RowFaultError(f"has {kind} in {name}; expected a list of messages with role and content")
    turns, flags = [], []
    for number, message in enumerate(_parted_exchanges(value, tags), start=1):
        where = f"{name} {number}"
        if not isinstance(message, Mapping):
            raise RowFaultError(f"has a {type(message).__name__} as {where}; expected a message with role and content")
        turn = _read_turn(message, _role(message, where, tags), where, values, tags)
        if turn is not None:
            turns.append(turn)
            flags.append(_flag(message, where))
    if turns and turns[0].role == ASSISTANT and not may_begin_with_answer:
        raise RowFaultError(f"has an answer before any question in {name}; expected a system or user turn first")
    return turns, flags


def _parted_exchanges(value: Sequence[Any], tags: TagsSpec) -> Sequence[Any]:
    """Return as messages the exchanges of ms-swift, such as ``{human: …, assistant: …}``; other values as they are."""
    keys = {str(key) for one in value for key in one} if all(isinstance(one, Mapping) for one in value) else set()
    if tags.role or len(keys) < 2 or not keys <= _EXCHANGE_KEYS:
        return value
    in_order = sorted(keys, key=lambda key: _ROLES[key] == ASSISTANT)
    return [{"role": key, "content": one[key]} for one in value for key in in_order if one.get(key) is not None]


def _role(message: Mapping[str, Any], where: str, tags: TagsSpec) -> str:
    """Return our name of a message's role."""
    keys = (tags.role,) if tags.role else _ROLE_KEYS
    key = next((key for key in keys if message.get(key) is not None), None)
    if key is None:
        raise RowFaultError(
            f"has no {' or '.join(keys)} in {where}; it has {', '.join(map(str, message)) or 'nothing'}"
        )
    role = str(message[key]).strip()
    ours = tags.roles.get(role) or _ROLES.get(role.lower())
    if ours is None:
        known = ", ".join([*tags.roles, "system, user (human), assistant (gpt), tool (observation), function_call"])
        raise RowFaultError(f"has the role {role!r} in {where}; expected one of {known}")
    return ours


def _read_turn(message: Mapping[str, Any], role: str, where: str, values: RowValues, tags: TagsSpec) -> Turn | None:
    """Read one message; None if it says nothing, as an empty system prompt."""
    keys = (tags.content,) if tags.content else _CONTENT_KEYS
    content = _content(_only(message, keys, where), where, values)
    calls = unprinted(message.get("tool_calls"), where) or ()
    if role == _CALL:
        calls, content, role = _parse_call(content, where), "", ASSISTANT
    elif role == ASSISTANT and not calls and message.get("function_call"):  # OpenAI's form before tool_calls
        calls = (unprinted(message["function_call"], where),)
    calls = tuple(_check_call(call, where) for call in calls)
    if role == ASSISTANT and (thought := _only(message, _THOUGHT_KEYS, where)):
        content = f"<think>\n{values.text(thought, where)}\n</think>\n\n{content}"
    if not content.strip() and not calls:
        if role == SYSTEM:
            return None
        if role != TOOL:
            raise RowFaultError(f"has an empty {' or '.join(keys)} in {where}; expected text")
    if role in (USER, ASSISTANT) and content:
        values.text(content, where)  # for its faults; blanks around it stay
    extra = tuple((key, str(message[key])) for key in ("name", "tool_call_id") if message.get(key) is not None)
    return Turn(role, content, tool_calls=calls, extra=extra if role == TOOL else ())


def _only(message: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    """Return what a message has at one of these keys; RowFaultError if two of them say different things."""
    found = {key: value for key in keys if not (is_missing(value := message.get(key)) or value == "")}
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise RowFaultError(f"has different values as {' and '.join(found)} of {where}; keep one of them")
    return values[0] if values else None


def _content(value: Any, where: str, values: RowValues) -> str:
    """Return the text of a message: one text, or the texts of its parts."""
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return values.clean(value, where)
    if isinstance(value, Sequence) and all(isinstance(part, Mapping) for part in value):
        other = sorted({str(part.get("type")) for part in value if not isinstance(part.get("text"), str)})
        if other:
            raise RowFaultError(f"has content of type {', '.join(other)} in {where}; only text can be trained")
        return values.clean("".join(part["text"] for part in value), where)
    raise RowFaultError(f"has a {type(value).__name__} as content of {where}; expected text")


def _flag(message: Mapping[str, Any], where: str) -> bool | None:
    """Return what a message's own flag says; None if it has none."""
    for key in _FLAG_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise RowFaultError(f"has {value!r} as {key} of {where}; expected true or false, 1 or 0")
    return None


def _parse_call(content: str, where: str) -> list[Any]:
    """Return the calls that a ShareGPT message of the role function_call holds as JSON."""
    try:
        call = json.loads(content)
    except ValueError:
        raise RowFaultError(f"has a function_call in {where} that is not JSON; expected name and arguments") from None
    return list(call) if isinstance(call, list) else [call]


def _check_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call as ``{type, function: {name, arguments}}`` with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowFaultError(f"has a tool call without a name in {where}; expected function: {{name, arguments}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI has them; templates take either, and print an object without escapes
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise RowFaultError(f"has arguments in a tool call of {where} that are not JSON") from None
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
