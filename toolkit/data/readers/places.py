"""What lies at a path: one file, an archive, a directory or the matches of a pattern, by split."""

from __future__ import annotations

import glob
import json
import logging
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from toolkit.data.readers.columnar import DISK_SPLITS, DISK_STATE, read_saved
from toolkit.data.readers.content import COMPRESSED, Content, archive_members, is_hidden, open_content
from toolkit.data.readers.formats import ENDINGS, family_of, has_known_ending, read_content
from toolkit.data.readers.row import ReadOptions, Row
from toolkit.data.readers.saved_sets import DISK_INFO, saved_splits, shards_of, state_of, without_caches
from toolkit.data.readers.splits import choose_split, missing_shards, split_of
from toolkit.runtime import signals
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import is_directory, is_file
from toolkit.runtime.printable import one_line
from toolkit.runtime.unicode_names import as_spelled

log = logging.getLogger("frostline")

_DESCRIPTIONS = (DISK_INFO, "dataset_infos.json", DISK_STATE, DISK_SPLITS)
"""JSON files that describe a data set."""


@dataclass(frozen=True)
class Place:
    """The files of one split, in the order of their names, and their rows."""

    files: tuple[Path, ...]
    """Files on the disk."""
    parts: tuple[partial[Iterator[Row]], ...]
    """Opens the rows of each file, or of each member of an archive."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all parts."""
        for part in self.parts:
            yield from part()


def place_of_file(file: Path, path: str, split: str | None, key: str, default: str, options: ReadOptions) -> Place:
    """Return what a file or archive holds.

    ``path`` is the file as the user named it, ``key`` names ``split`` in messages, and ``default`` is the split that is
    taken of several if none is named.

    Raises:
        DataError: there is no such split, or no file of a known format in the archive.
    """
    content = open_content(file, path, file.name)
    members = archive_members(content)
    if members is None:
        if split not in (None, "train"):
            raise DataError(f"{key} is {split!r}, but {path} is a file, and files have one split only: train")
        return Place((file,), (partial(read_content, content, options),))
    return _choose(path, members, split, key, default, options)


def place_of_directory(
    directory: Path, path: str, split: str | None, key: str, default: str, options: ReadOptions
) -> Place:
    """Return what a directory holds: files of one format for each split, or what ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: as ``place_of_file``, or files of several formats.
    """
    if (directory / DISK_STATE).is_file() and (directory / DISK_INFO).is_file():
        own = state_of(directory).get("_split")
        if split not in (None, "train", own):
            raise DataError(f"{key} is {split!r}, but {path} holds one split only: {own or 'train'}")
        return _saved(directory, path)
    if (directory / DISK_SPLITS).is_file():
        splits = json.loads((directory / DISK_SPLITS).read_bytes())["splits"]
        split = choose_split(path, splits, split, key, default)
        return _saved(directory / split, f"{path}/{split}")
    with signals.waiting(f"the names of the files in {one_line(path)}"):
        files = _walk(directory, path)
    return _choose(path, _contents(files, directory, path), split, key, default, options)


def place_of_pattern(pattern: str, split: str | None, key: str, default: str, options: ReadOptions) -> Place | None:
    """Return the files that a pattern such as ``data/*.jsonl`` matches; None if ``pattern`` is none.

    Raises:
        DataError: as ``place_of_directory``, or nothing matches.
    """
    if "\0" in pattern or not glob.has_magic(pattern):
        return None
    with signals.waiting(f"the names that {one_line(pattern)} matches"):  # of /** all that the machine has
        files = _reached([Path(name) for name in _matches(pattern)], pattern)
    if not files:
        raise DataError(f"{pattern}: matches no file (from {Path.cwd()}); expected a pattern such as data/*.jsonl")
    base = Path(os.path.commonpath([file.parent for file in files]))
    return _choose(pattern, _contents(files, base, str(base)), split, key, default, options)


def _matches(pattern: str) -> set[str]:
    """Return what a pattern matches; ``**`` stands for folders, hidden files are left out.

    Folders that are there by these names are taken as they are (``data[1]/*.csv``), and names in any Unicode form.
    """
    folder, rest = "", pattern
    while "/" in rest:
        name, _, after = rest.partition("/")
        inner = as_spelled(f"{folder}{name}/")
        if not after or not is_directory(inner):
            break
        folder, rest = os.path.join(inner, ""), after  # noqa: PTH118 - ends in one slash, the root's too
    start, forms = glob.escape(folder), {rest, *(unicodedata.normalize(form, rest) for form in ("NFC", "NFD"))}
    return {name for form in forms for name in glob.glob(start + form, recursive=True)}  # noqa: PTH207 - absolute too


def _contents(files: list[Path], base: Path, label: str) -> list[Content]:
    """Return the content of files below ``base``, and of archives among them, each file once."""
    contents: list[Content] = []
    seen: dict[str, Path] = {}
    for file in files:
        if (first := seen.setdefault(os.path.realpath(file), file)) != file:
            log.info("%s is %s by another name, and is read once", one_line(str(file)), one_line(str(first)))
            continue
        name = one_line(file.relative_to(base).as_posix())
        content = open_content(file, f"{label.rstrip('/')}/{name}", name)
        contents += archive_members(content) or [content]
    return contents


def _walk(directory: Path, path: str) -> list[Path]:
    """Return the files below a directory in the order of their names, without hidden ones; links are followed."""
    found: list[Path] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(PurePosixPath(name))]
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        found += [Path(folder, name) for name in names if not is_hidden(PurePosixPath(name))]
    return _reached(found, path)


def _reached(found: list[Path], path: str) -> list[Path]:
    """Return those of paths that are files, in the order of their names.

    Raises:
        DataError: one that may hold rows is a link to what is not there.
    """
    for file in found:
        if file.is_symlink() and not file.exists() and (not file.suffix or has_known_ending(file.name)):
            raise DataError(
                f"{path}: {one_line(str(file))} is a link to {one_line(str(file.readlink()))}, which cannot be "
                "reached; restore what it links to, or remove the link"
            )
    return sorted(file for file in found if file.is_file())


def _choose(
    path: str, contents: list[Content], split: str | None, key: str, default: str, options: ReadOptions
) -> Place:
    """Return the contents of a known format that belong to the split."""
    contents = without_caches(path, contents)
    known = [content for content in contents if _may_hold_rows(content)]
    if not known:
        listed = ", ".join(content.shown for content in contents[:5]) or "nothing"
        raise DataError(f"{path}: holds no data file ({listed}); expected files that end in {ENDINGS}")
    if left_out := [content.shown for content in contents if not _may_hold_rows(content)]:
        log.info("%s: %d other files are not read, such as %s", path, len(left_out), left_out[0])
    splits: dict[str, list[Content]] = {}
    saved = saved_splits(contents)
    for content in known:
        own = saved.get(str(PurePosixPath(content.name).parent)) or split_of(content.name)
        splits.setdefault(own or "", []).append(content)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise DataError(
            f"{path}: {unnamed[0].shown} belongs to no split, and other files belong to {', '.join(sorted(splits))}; "
            "rename or move it, or name the files to read, one by one or by a pattern"
        )
    if not splits and split not in (None, "train"):
        raise DataError(f"{key} is {split!r}, but no file of {path} is named after a split; leave {key} out")
    chosen = splits[choose_split(path, sorted(splits), split, key, default)] if splits else unnamed
    _check_alike(path, chosen)
    _check_complete(path, chosen)
    log.info("%s: %d file%s read, %s", path, len(chosen), "s are" if len(chosen) > 1 else " is",
             ", ".join(content.shown for content in chosen[:3]) + (" …" if len(chosen) > 3 else ""))  # fmt: skip
    files = dict.fromkeys(content.file for content in chosen)
    return Place(tuple(files), tuple(partial(read_content, content, options) for content in chosen))


def _may_hold_rows(content: Content) -> bool:
    """Return whether a file is of a known format, and does not describe a data set."""
    if content.base_name.lower() in _DESCRIPTIONS or not has_known_ending(content.name):
        return False
    is_note = PurePosixPath(content.name).stem.lower() in ("readme", "license", "licence")
    return content.suffix != ".txt" or not is_note


def _check_alike(path: str, contents: list[Content]) -> None:
    """Raise DataError if files are of several formats, or one is a copy of another in another form."""
    families = {family_of(content) for content in contents}
    names = ", ".join(sorted({content.suffix for content in contents}))
    if len(families) > 1:
        pattern = f"{path.rstrip('/')}/*{contents[0].suffix}"
        remedy = "unpack it and name one of them" if is_file(path) else f"name those to read, such as {pattern}"
        raise DataError(f"{path}: holds files of several formats ({names}), which may be the same rows; {remedy}")
    by_stem: dict[str, Content] = {}
    for content in contents:
        stem = str(PurePosixPath(content.name).with_suffix(""))
        if (other := by_stem.setdefault(stem, content)) is not content:
            raise DataError(
                f"{path}: {other.label} and {content.label} have one name, so they may be the same rows; name the one "
                f"to read. Endings of compression ({', '.join(COMPRESSED)}) do not count"
            )


def _check_complete(path: str, contents: list[Content]) -> None:
    """Raise DataError if one of several numbered files is missing, rather than left out by a pattern."""
    absent = missing_shards(content.name for content in contents)
    if not absent:
        return
    beside = {content.file.parent for content in contents if content.file.name.startswith(content.base_name)}
    there = {file.name for folder in beside for file in folder.iterdir() if has_known_ending(file.name)}
    missing = [
        " or ".join(names)
        for names in absent
        if not any(name.startswith(PurePosixPath(wanted).name) for wanted in names for name in there)
    ]
    if missing:
        raise DataError(
            f"{path}: {', '.join(missing[:3])} {'are' if len(missing) > 1 else 'is'} not there, and other files are "
            "numbered as parts of the same; copy what is missing there, or name the files to read one by one"
        )


def _saved(directory: Path, label: str) -> Place:
    """Return what ``Dataset.save_to_disk`` wrote into a directory."""
    shards = shards_of(state_of(directory)) or ()
    files = [directory / name for name in sorted(shards)] or sorted(directory.glob("*.arrow"))
    return Place(tuple(files), (partial(read_saved, directory, label),))
