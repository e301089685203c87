"""Read the end-of-text tokens that a model's config files name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file


def model_ends(source: str, revision: str | None = None) -> tuple[int, ...]:
    """Return the ``eos_token_id`` of the source's generation_config.json and config.json, in that order.

    No weights are read. A file that is missing or unreadable names none; loading the model says what is wrong with it.

    Args:
        source: a directory or Hub id, as ``toolkit.models.load.resolve_source`` gives it.
        revision: of a Hub id.
    """
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        for level in _nested_configs(_read_json(source, name, revision)):
            given = level.get("eos_token_id")
            found = given if isinstance(given, list) else [given]
            ends += [end for end in found if type(end) is int]
    return tuple(dict.fromkeys(ends))


def _nested_configs(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the config, and the text model's config nested in it if there is one."""
    yield values
    text = values.get("text_config")
    if isinstance(text, Mapping):
        yield text


def _read_json(source: str, name: str, revision: str | None) -> Mapping[str, Any]:
    """Read the object in a JSON file of the source; empty if it is missing or unreadable."""
    try:
        path = cached_file(
            source, name, revision=revision, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        values = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, Mapping) else {}
