"""Rows of a data set on the Hub: one split of one configuration, at a revision."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from toolkit.data.readers.splits import choose_split
from toolkit.runtime import hub, signals
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")


def load_hub_set(
    name: str, configuration: str | None, revision: str | None, split: str | None, key: str, default_split: str
) -> tuple[Any, str]:
    """Download a Hub data set, or find it in the local cache; return its table, and the split that it is.

    Raises:
        DataError: the set, configuration, revision or split is not there, or cannot be loaded.
    """
    from datasets import load_dataset_builder

    hub.set_limits()
    try:
        with signals.waiting(f"the data set {name}, from the Hub or another process that prepares it"):
            builder = load_dataset_builder(name, configuration, revision=revision)
            builder.download_and_prepare()
        split = choose_split(name, list(builder.info.splits or ()), split, key, default_split, may_slice=True)
        return builder.as_dataset(split=split), split
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for: no such set, network, format
        raise DataError(
            _configuration_fault(name, configuration, error)
            or hub.explain(error, name, "data set")
            or f"Hub data set {name} cannot be loaded: {type(error).__name__}: {str(error)[:300]}. "
            "Check the name and the network, or download it and pass the file"
        ) from None


def hub_files(table: Any) -> tuple[Path, ...]:
    """Return the local files behind a loaded Hub data set."""
    return tuple(Path(file["filename"]) for file in table.cache_files)


def _configuration_fault(name: str, configuration: str | None, error: Exception) -> str | None:
    """Return what is wrong with ``data.name``, and its choices; None if it is not at fault."""
    text = str(error)
    found = re.search(r"available configs: (\[.*?\])", text) or re.search(r"Available: (\[.*?\])", text)
    if not found or "onfig" not in text:
        return None
    listed = ", ".join(re.findall(r"'([^']+)'", found[1]))
    if configuration is None:
        return f"{name} has several configurations, and data.name names none of them; set it to one of: {listed}"
    return f"data.name is {configuration!r}, but {name} has no such configuration; set it to one of: {listed}"
