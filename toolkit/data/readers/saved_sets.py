"""What ``save_to_disk`` of ``datasets`` wrote, where it lies among other files or in an archive."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from toolkit.data.readers.columnar import DISK_SPLITS, DISK_STATE
from toolkit.data.readers.content import Content
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")

DISK_INFO = "dataset_info.json"
"""File that describes a data set, beside its Arrow files."""
_CACHE = re.compile(r"(cache-[0-9a-f]+(_\d+_of_\d+)?|tmp\w+)\.arrow")
"""Names of what ``Dataset.map`` and its kin keep beside the files of a data set."""
_LARGEST_DESCRIPTION = 2**22
"""Bytes of a description that are read."""


def state_of(directory: Path) -> dict[str, Any]:
    """Return what a saved data set says of itself; an empty mapping if that cannot be read."""
    try:
        with (directory / DISK_STATE).open("rb") as file:
            return _parsed(file.read(_LARGEST_DESCRIPTION))
    except OSError:
        return {}


def shards_of(state: dict[str, Any]) -> frozenset[str] | None:
    """Return the names of the Arrow files of a saved data set; None if its state does not name them."""
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not entries:
        return None
    names = frozenset(str(entry.get("filename")) if isinstance(entry, dict) else "" for entry in entries)
    return names if all(name == PurePosixPath(name).name for name in names) else None  # a name leads nowhere else


def without_caches(path: str, contents: Sequence[Content]) -> list[Content]:
    """Return files without the Arrow files that lie beside those of a saved data set and are not of it.

    Raises:
        DataError: a file is not there that the state of a data set names.
    """
    states = {
        _folder(content): _parsed(content.head(_LARGEST_DESCRIPTION))
        for content in contents
        if content.base_name == DISK_STATE
    }
    described = {_folder(content) for content in contents if content.base_name in (DISK_STATE, DISK_INFO)}
    names = {content.name for content in contents}
    for folder, state in states.items():
        for name in sorted(shards_of(state) or ()):
            if str(PurePosixPath(folder, name)) not in names:
                raise DataError(
                    f"{path}: {PurePosixPath(folder, name)} is not there, and {DISK_STATE} beside it says that it has "
                    "rows of the data set; copy it there, or save the data set again"
                )
    on_disk = cache(state_of)
    kept, left_out = list[Content](), list[Content]()
    for content in contents:
        is_cache = False
        if content.suffix == ".arrow":
            folder, parent = _folder(content), content.file.parent
            state = states.get(folder, on_disk(parent) if content.is_plain else {})
            shards = shards_of(state)
            is_described = folder in described or (content.is_plain and (parent / DISK_INFO).is_file())
            base = content.base_name
            is_cache = base not in shards if shards else is_described and _CACHE.fullmatch(base) is not None
        (left_out if is_cache else kept).append(content)
    if left_out:
        log.info("%s: %d Arrow files beside those of a saved data set are not read, such as %s",
                 path, len(left_out), left_out[0].shown)  # fmt: skip
    return kept


def saved_splits(contents: Sequence[Content]) -> dict[str, str]:
    """Return the split of each folder that a saved set of splits names, by the folder's path."""
    splits: dict[str, str] = {}
    for content in contents:
        if content.base_name == DISK_SPLITS:
            named = _parsed(content.head(_LARGEST_DESCRIPTION)).get("splits")
            for split in named if isinstance(named, list) else ():
                if isinstance(split, str):
                    splits[str(PurePosixPath(_folder(content), split))] = split
    return splits


def _folder(content: Content) -> str:
    """Return the folder of a file by its path within the directory or archive."""
    return str(PurePosixPath(content.name).parent)


def _parsed(text: bytes) -> dict[str, Any]:
    """Return the object that a description is; an empty one if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
