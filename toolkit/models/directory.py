"""Check a model directory: it holds safetensors of its own, and nothing that runs code or points elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from toolkit.runtime.errors import ModelError
from toolkit.runtime.paths import require_regular
from toolkit.runtime.printable import one_line

IS_ADAPTER = (
    "holds an adapter (adapter_config.json), which stands for another model; name that model, and a directory with the "
    "adapter in model.delta, or remove the file"
)
"""What is said of a source that transformers would replace by the base model that it names."""

_MOST = (
    (re.compile(r"(\w+_)?(num|n)_(\w+_)?layers?"), 10_000),
    (re.compile(r"(num_|n_)(local_|routed_|shared_|attention_|key_value_|kv_)*(experts|heads?)"), 100_000),
    (re.compile(r"\w*(vocab|hidden|intermediate|embd|inner|ffn|head|model|embedding)_?(size|dim|state_size)?"), 10**8),
    (re.compile(r"\w*(max_position_embeddings|n_positions|n_ctx|max_seq_len)"), 10**9),
)  # fmt: skip
"""Largest values of keys of a config.json, by their names; far above those of any model."""
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_directory(directory: Path, needs_weights: bool) -> None:
    """Refuse an existing model directory that cannot, or must not, be loaded; no weight is read.

    Raises:
        ModelError: no readable config.json; an adapter; weights that are pickled or missing; or an index that names
            files elsewhere.
    """
    faults = list(_find_faults(directory, needs_weights))
    if faults:
        raise ModelError(f"model directory {directory} {'; it '.join(faults)}")


def check_sizes(values: Mapping[str, Any], source: str) -> None:
    """Refuse a config.json whose sizes no model has, before transformers makes lists and layers of them.

    Raises:
        ModelError: names the first such key.
    """
    pending = [value for value in (values, *values.values()) if isinstance(value, Mapping)]
    for level in pending:
        for key, value in level.items():
            most = next((most for pattern, most in _MOST if pattern.fullmatch(str(key))), None)
            if most is not None and isinstance(value, int | float) and not -1 <= value <= most:
                shown = f"{one_line(str(key))} is {str(value)[:30]}"
                raise ModelError(f"{source}: {shown} in its config.json; expected at most {most:,}. Restore the file")


def _read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a model directory.

    Raises:
        ModelError: unreadable, not JSON in UTF-8, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({str(error)[:200]}); restore it") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def _find_faults(directory: Path, needs_weights: bool) -> Iterator[str]:
    """Yield each reason against loading the directory, as a clause for the error message."""
    if (directory / "adapter_config.json").is_file():
        yield IS_ADAPTER
    if not (directory / "config.json").is_file():
        yield "has no config.json; expected a model saved with save_pretrained"
        return
    check_sizes(_read_object(directory / "config.json"), str(directory))
    for entry in sorted(directory.iterdir()):
        try:
            with suppress(OSError):  # a folder, or a link that leads nowhere
                require_regular(entry.stat(), entry)  # a FIFO would be waited for
        except ValueError as error:
            yield f"cannot be read: {one_line(str(error))}"
            return
    if not needs_weights:
        return
    if not any(directory.glob("*.safetensors")):
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
        instead = f" but {pickled[0]}" if pickled else ""
        yield (
            f"has no *.safetensors{instead}; pickled weights are not loaded. "
            "Convert them: load once with transformers and call save_pretrained"
        )
    if (directory / _INDEX_FILE).is_file() and (wrong := _unsafe_entries(_read_object(directory / _INDEX_FILE))):
        yield f"has an index ({_INDEX_FILE}) that names {wrong[0]!r}; expected names of safetensors files beside it"


def _unsafe_entries(index: dict[str, Any]) -> list[object]:
    """Return the entries of a weight index that are not names of safetensors files in the same directory."""
    files = index.get("weight_map")
    if not isinstance(files, dict):
        return ["no weight_map"]
    return [
        name
        for name in dict.fromkeys(map(str, files.values()))
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name
    ]
