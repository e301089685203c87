"""Understand the entries of LLaMA-Factory's ``dataset_info.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from toolkit.runtime.errors import ConfigError, DataError
from toolkit.runtime.paths import read_regular
from toolkit.runtime.shipped import find_file
from toolkit.tasks.columns import nearest

_MEDIA = ("images", "videos", "audios")
_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip


def from_dataset_info(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return as a task what ``{dataset_info: FILE, name: ENTRY}`` names; the rows themselves are ``data.path``'s.

    Raises:
        ConfigError: the mapping has other keys.
        DataError: no such file or entry, or the entry is for preference pairs, images, video or sound.
    """
    if unknown := set(setting) - {"dataset_info", "name"}:
        raise ConfigError(
            [f"data.task has dataset_info and {', '.join(sorted(unknown))}; expected dataset_info and name alone"],
            "recipe",
        )
    path, name = str(setting["dataset_info"]), setting.get("name")
    entries = _read(path)
    if name not in entries:
        near = nearest(str(name), entries)
        raise DataError(
            f"{path} has no entry {name!r}; expected data.task: {{dataset_info: {path}, name: …}} with one of "
            f"{', '.join(list(entries)[:20])}{f' (did you mean {near}?)' if near else ''}"
        )
    entry = entries[name]
    columns = entry.get("columns", {}) if isinstance(entry, Mapping) else None
    if not isinstance(columns, Mapping):
        raise DataError(f"{path}: the entry {name} is no mapping with columns; expected one as LLaMA-Factory has it")
    if entry.get("ranking") or {"chosen", "rejected", "kto_tag"} & columns.keys():
        raise DataError(f"{path}: the entry {name} is of preference pairs, which are not for supervised tuning")
    if media := [key for key in _MEDIA if key in columns]:
        raise DataError(f"{path}: the entry {name} has {', '.join(media)}; only text can be trained")
    formatting = entry.get("formatting", "alpaca")
    if formatting in ("sharegpt", "openai"):
        return _conversations(columns, entry.get("tags", {}))
    if formatting != "alpaca":
        raise DataError(f"{path}: the entry {name} has formatting {formatting}; expected alpaca, sharegpt or openai")
    own = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
    task: dict[str, Any] = {"name": "alpaca"}
    task["columns"] = {ours: columns[key] for key, ours in own.items() if columns.get(key)}
    if columns.get("tools"):
        task["columns"]["tools"] = {"path": columns["tools"], "kind": "any", "optional": True}
        task["tools"] = "tools"
    return task


def _conversations(columns: Mapping[str, Any], tags: Mapping[str, Any]) -> dict[str, Any]:
    own = {"messages": "conversations", "system": "system", "tools": "tools"}
    roles = {tags[key]: role for key, role in _ROLES.items() if tags.get(key)}
    return {
        "name": "sharegpt",
        "columns": {ours: columns[key] for key, ours in own.items() if columns.get(key)},
        "tags": {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value"), "roles": roles},
    }


def _read(path: str) -> dict[str, Any]:
    """Read the entries of a ``dataset_info.json``."""
    try:
        entries = json.loads(read_regular(find_file(path), 2**26))
    except (OSError, ValueError) as error:
        raise DataError(f"data.task names {path}, which cannot be read as JSON ({error})") from None
    if not isinstance(entries, dict):
        raise DataError(
            f"{path}: holds a {type(entries).__name__}; expected entries by name, as LLaMA-Factory has them"
        )
    return entries
