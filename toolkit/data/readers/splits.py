"""Splits of a data set: which of its files belong to which, and which one is read."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import PurePosixPath

from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")

_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "학습": "train", "훈련": "train", "검증": "validation", "평가": "test", "시험": "test", "테스트": "test",
}  # fmt: skip
"""Split by a word in the name of a file or folder: in English as ``datasets`` reads them, and in Korean."""
_WORD = re.compile("[a-z]+|[가-힣]+")
_DATA_WORDS = re.compile("(?:용|데이터|자료|셋|세트|집합)+$")
"""What follows the split in a word of a Korean name, as in ``학습용데이터``."""

_SHARD = re.compile(r"(.+?)[-_]\d+[-_]of[-_]\d+$")
_NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?P<of>[-_]of[-_])(?P<count>\d+)(?:-[0-9a-f]{8,})?$")
"""Name of one of several files, as ``train-00001-of-00003``; the Hub has written digits of a hash behind it."""


def split_of(name: str) -> str | None:
    """Return the split that a file belongs to by its path within a data set; None if nothing in it names one.

    The file's own name counts before those of its folders, the nearest first.
    """
    path = PurePosixPath(name)
    stem = path.name.partition(".")[0]
    for part in (stem, *reversed(path.parts[:-1])):
        words = [_DATA_WORDS.sub("", word) for word in _WORD.findall(unicodedata.normalize("NFC", part.lower()))]
        if found := {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}:
            return sorted(found)[0] if len(found) == 1 else None
    shard = _SHARD.match(stem)
    return shard[1] if shard and not shard[1].lower().startswith(("data", "part")) else None


def missing_shards(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the first few that are missing of files numbered as ``train-00001-of-00003``; empty if none are.

    Each is a path without its ending, or two where it is unknown whether the numbers begin with 0 or 1. A single name
    is taken for one of several where its numbers have leading zeros, as tools write them: ``visit-3-of-10`` may be all
    that there is.
    """
    groups: dict[tuple[str, str, str], dict[int, int]] = {}
    for name in names:
        path = PurePosixPath(name)
        if found := _NUMBERED.match(path.name.partition(".")[0]):
            key = f"{path.parent}/{found['before']}".removeprefix("./"), found["of"], found["count"]
            groups.setdefault(key, {})[int(found["number"])] = len(found["number"])
    missing: list[tuple[str, ...]] = []
    for (before, of, written), numbers in groups.items():
        count, width = int(written), min(numbers.values())
        if len(numbers) >= count or (len(numbers) == 1 and written[0] != "0"):
            continue
        inner = ((number,) for number in range(1, count) if number not in numbers)
        absent = [*([] if {0, count} & set(numbers) else [(0, count)]), *islice(inner, 3)]
        missing += [tuple(f"{before}{number:0{width}d}{of}{written}" for number in either) for either in absent]
    return missing


def choose_split(
    name: str, available: Sequence[str], split: str | None, key: str, default_split: str, may_slice: bool = False
) -> str:
    """Choose the split of a data set, and log it if the user named none.

    Args:
        name: the data set, for messages.
        available: its splits.
        split: the one that the user named.
        key: recipe key or flag that names the split, for messages.
        default_split: the one that is taken of several if none is named.
        may_slice: whether ``split`` may be an expression of ``datasets``, as ``train[:10%]+test``.

    Raises:
        DataError: there is no such split, or none is named and ``default_split`` is not there.
    """
    listed = ", ".join(available)
    if split is not None:
        named = [part.partition("[")[0].strip() for part in split.split("+")] if may_slice else [split]
        if unknown := [part for part in named if part not in (*available, *(("all",) if may_slice else ()))]:
            raise DataError(
                f"{key} is {split!r}, but {name} has no split {unknown[0]!r}; set {key} to one of: {listed}"
            )
        return split
    if len(available) == 1:
        log.info("%s has one split, %s, which is taken", name, listed)
        return available[0]
    if default_split not in available:
        raise DataError(f"{name} has the splits {listed}, and {key} names none of them; set it to the one to read")
    log.info("%s has the splits %s; %s is taken, as %s names none", name, listed, default_split, key)
    return default_split
