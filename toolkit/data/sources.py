"""Read rows from files, directories and Hub data sets, in a stream; a row that cannot be read carries its fault."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from toolkit.config.data_schema import DataConfig, PathEntry, Paths
from toolkit.data.readers.columnar import set_rows
from toolkit.data.readers.content import COMPRESSED
from toolkit.data.readers.formats import ENDINGS, has_known_ending
from toolkit.data.readers.hub_set import hub_files, load_hub_set
from toolkit.data.readers.places import Place, place_of_directory, place_of_file, place_of_pattern
from toolkit.data.readers.row import ReadOptions, Row
from toolkit.runtime import hub
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import is_directory, is_file
from toolkit.runtime.shipped import find_file
from toolkit.runtime.unicode_names import as_spelled

__all__ = ["ReadOptions", "Row", "Source", "is_hub_dataset", "iter_rows", "read_rows", "sources_of", "task_of"]

log = logging.getLogger("frostline")

Part = Literal["train", "validation", "test"]
"""What rows of a recipe are for."""

_KEYS: dict[Part, tuple[str, str]] = {
    "train": ("path", "split"),
    "validation": ("validation", "validation_split"),
    "test": ("test", "test_split"),
}
"""Recipe keys that name the rows of a part, and their split."""


@dataclass(frozen=True)
class Source:
    """Rows that a recipe names: one file, directory, pattern or Hub data set, of which one split is read."""

    path: str
    """As the user wrote it."""
    split: str | None = None
    """None takes the only one, else ``default_split``."""
    configuration: str | None = None
    """Configuration of a Hub data set, or folder of a directory."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    weight: float = 1.0
    """How often each row is taken in an epoch; see ``toolkit.data.mixture``."""
    options: ReadOptions = field(default_factory=ReadOptions)
    key: str = "data.split"
    """Recipe key or flag that sets the split, for messages."""
    default_split: str = "train"
    task: str | Mapping[str, Any] | None = None
    """The source's own task; None takes ``data.task``."""

    @property
    def name(self) -> str:
        """Return the source as messages name it."""
        return self.path + (f":{self.configuration}" if self.configuration else "") + (
            f"[{self.split}]" if self.split else ""
        )  # fmt: skip

    @property
    def task_key(self) -> str:
        """Return what names the source's task, for messages."""
        return "data.task" if self.task is None else f"task of {self.name}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the local files behind the source, in the order in which they are read; a Hub set is downloaded.

        Raises:
            DataError: as ``iter_rows``.
        """
        return self._place.files if isinstance(self._place, Place) else hub_files(self._place[0])

    @property
    def is_on_hub(self) -> bool:
        """Return whether it is a Hub data set."""
        return is_hub_dataset(self.path)

    @property
    def edition(self) -> str:
        """Return configuration and revision of a Hub data set, which the origins of its rows do not name."""
        return f"{self.configuration} {self.revision}" if self.is_on_hub else ""

    def check_there(self) -> None:
        """Raise DataError, as ``iter_rows``, if nothing that can be read lies at the path."""
        _ = self._place

    def rows(self) -> Iterator[Row]:
        """Yield the rows; see ``iter_rows``."""
        if isinstance(self._place, Place):
            return self._place.rows()
        table, split = self._place
        return set_rows(f"{self.path}[{split}]", table)

    @cached_property
    def _place(self) -> Place | tuple[object, str]:
        """Return what lies at the path, or table and split of a Hub data set."""
        asked = self.split, self.key, self.default_split
        file = find_file(self.path)
        if is_file(file):
            return place_of_file(file, self.path, *asked, self.options)
        if is_directory(file):
            if self.configuration is not None:
                file, path = self._folder(file), f"{self.path.rstrip('/')}/{self.configuration}"
                return place_of_directory(file, path, *asked, self.options)
            return place_of_directory(file, self.path, *asked, self.options)
        if (place := place_of_pattern(self.path, *asked, self.options)) is not None:
            return place
        if self.is_on_hub:
            return load_hub_set(self.path, self.configuration, self.revision, *asked)
        raise DataError(
            f"{self.path}: no such file (from {Path.cwd()}); expected a file that ends in {ENDINGS}, also compressed "
            f"({', '.join(COMPRESSED)}) or in a .zip, a directory or pattern of such files, or a Hub id (org/name)"
        )

    def _folder(self, directory: Path) -> Path:
        """Return the folder of a directory that the configuration names; DataError if there is none."""
        folders = sorted(folder.name for folder in directory.iterdir() if folder.is_dir() and folder.name[0] != ".")
        named = as_spelled(directory / str(self.configuration))
        if named not in (directory / folder for folder in folders):
            listed = f"one of: {', '.join(folders)}" if folders else "none: it has no folders"
            raise DataError(
                f"data.name is {self.configuration!r}, but {self.path} has no such folder; set it to {listed}"
            )
        return named


def sources_of(config: DataConfig, part: Part) -> list[Source]:
    """Return the sources that a recipe names for a part; none if it names no rows of their own for it."""
    paths_key, split_key = _KEYS[part]
    named = getattr(config, paths_key, None)
    if named is None or isinstance(named, float):
        return []
    options = ReadOptions(config.encoding, config.separator, config.sheet)
    trained_on = {_place_named(entry.path): entry for entry in reversed(_entries(config.path))}  # of one, the first
    sources = []
    for entry in _entries(named):
        own = trained_on.get(_place_named(entry.path))
        sources.append(
            Source(
                entry.path,
                entry.split or getattr(config, split_key, None),
                entry.name or (config.name if own is not None else None),
                entry.revision or (config.revision if own is not None else None),
                entry.weight,
                options,
                f"data.{split_key}",
                part,
                entry.task if entry.task is not None or own is None else own.task,
            )
        )
    return sources


def task_of(config: DataConfig, path: str | None = None) -> str | Mapping[str, Any]:
    """Return the task, as a recipe names it, by which rows are read that are named beside it.

    It is that of the source with the same ``path``, however it is written, of the rows held out or else of those
    trained on; where there is none, that of the first source.
    """
    entries = _entries(config.path)
    place = None if path is None else _place_named(path)
    held_out = (source for part in ("validation", "test") for source in sources_of(config, part))
    if named := next((source for source in held_out if _place_named(source.path) == place), None):
        return config.task if named.task is None else named.task
    own = next((entry for entry in entries if _place_named(entry.path) == place), entries[0]).task
    return config.task if own is None else own


def _place_named(path: str) -> str:
    """Return one name for all that a path may be written as: ``rows.jsonl``, ``./rows.jsonl``, in full, by a link."""
    try:
        return os.path.realpath(as_spelled(path))
    except ValueError:  # a NUL in it
        return path


def _entries(named: Paths) -> list[PathEntry]:
    """Return the sources that a key names, each as a mapping."""
    return [PathEntry(path=entry) if isinstance(entry, str) else entry
            for entry in ([named] if isinstance(named, str) else named)]  # fmt: skip


def iter_rows(source: Source) -> Iterator[Row]:
    """Yield the rows of a source in a stream, in the order of its files.

    A row that cannot be read has a fault. No more than a few rows are held, but for a JSON file that is an object with
    its rows under a key, or one of columns.

    Raises:
        DataError: no such file, data set or split, an unknown format, a file that cannot be parsed, or no rows.
    """
    row = None
    try:
        for row in source.rows():
            yield row
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error})") from None
    if row is None:
        raise DataError(f"{source.path}: holds no rows; expected at least one")


def read_rows(path: str, split: str | None = None, key: str = "data.split", default_split: str = "train") -> list[Row]:
    """Read all rows of a file, directory, pattern or Hub data set (``org/name``); see ``iter_rows``.

    A ``split`` of None takes the only one, else ``default_split``. ``key`` is the recipe key or flag that sets the
    split, for messages.

    Raises:
        DataError: as ``iter_rows``.
    """
    return list(iter_rows(Source(path, split, key=key, default_split=default_split)))


def is_hub_dataset(path: str) -> bool:
    """Return whether ``path`` names a data set on the Hub (``org/name``) rather than a file."""
    return hub.is_hub_id(path) and not has_known_ending(path)
