"""Read rows from a file or a Hub data set; a row that cannot be read carries its fault instead of stopping the read."""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.runtime import hub
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import is_directory, is_file
from toolkit.runtime.shipped import find_file
from toolkit.tasks.pubmedqa import ANSWER, CONTEXTS, QUESTION

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class Row:
    """One row as it was found."""

    origin: str
    """File and row, as a person would look it up: ``answers.jsonl line 12``."""
    values: Any = None
    fault: str | None = None
    """Why the row could not be read, if so."""


def read_rows(path: str, split: str | None = None, key: str = "data.split", usual: str = "train") -> list[Row]:
    """Read all rows of a ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, or of a Hub data set (``org/name``).

    A ``.json`` file holds a list of rows, or an object of rows by key as PubMedQA is published (keyed by PMID).

    Args:
        path: file or Hub id.
        split: of a Hub data set; none takes its only one, or the usual.
        key: what the user sets the split with, for messages.
        usual: split to take from a set that has it among others.

    Raises:
        DataError: no such file, data set or split, an unknown format, a file that cannot be parsed, or no rows.
    """
    file = find_file(path)
    if is_file(file):
        if split not in (None, "train"):
            raise DataError(f"{key} is {split!r}, but {path} is a file, and files have one split only: train")
        reader = _READERS.get(file.suffix.lower())
        if reader is None:
            raise DataError(f"{path}: unknown data format {file.suffix!r}; expected {', '.join(_READERS)}")
        try:
            rows = list(reader(file))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
    elif is_hub_dataset(path):
        rows = list(_hub(path, split, key, usual))
    elif is_directory(file):
        raise DataError(f"{path}: is a directory; name one {', '.join(_READERS)} file in it")
    else:
        raise DataError(
            f"{path}: no such file (from {Path.cwd()}); expected a {', '.join(_READERS)} file or a Hub id (org/name)"
        )
    if not rows:
        raise DataError(f"{path}: holds no rows; expected at least one")
    return rows


def is_hub_dataset(path: str) -> bool:
    """Return whether ``path`` names a data set on the Hub (``org/name``) rather than a file."""
    return hub.is_hub_id(path) and Path(path).suffix.lower() not in _READERS


def _text(file: Path) -> str:
    """Read the file as text; bytes that are not UTF-8 become lone surrogates, to be found row by row."""
    content = file.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in content:
        raise DataError(f"{file}: is UTF-16 text (Excel's 'Unicode Text'); save the file as UTF-8")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _not_utf8(values: Any) -> bool:
    return re.search("[\ud800-\udfff]", values if isinstance(values, str) else _all_text(values)) is not None


def _all_text(values: Any) -> str:
    """Join all strings of a JSON-like value."""
    if isinstance(values, str):
        return values
    if isinstance(values, dict):
        return "".join(_all_text(part) for item in values.items() for part in item)
    if isinstance(values, list):
        return "".join(_all_text(part) for part in values)
    return ""


def _row(origin: str, values: Any) -> Row:
    if _not_utf8(values):
        return Row(origin, fault="is not UTF-8 text; save the file as UTF-8")
    return Row(origin, values)


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        origin = f"{file} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError alone: a number of thousands of digits
            yield Row(origin, fault=f"is not valid JSON ({error}); expected one object a line")
        else:
            yield _row(origin, values)


def _json(file: Path) -> Iterator[Row]:
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not readable JSON ({str(error)[:100]}); expected a list of rows or an object of rows by key"
        ) from None
    if isinstance(content, dict) and all(isinstance(row, dict) for row in content.values()):
        for key, values in content.items():
            yield _row(f"{file} key {key}", values)
    elif isinstance(content, list):
        for number, values in enumerate(content, start=1):
            yield _row(f"{file} row {number}", values)
    else:
        raise DataError(
            f"{file}: holds one {type(content).__name__}; expected a list of rows or an object of rows by key"
        )


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        _check_header(file, reader.fieldnames or [])
        for number, values in enumerate(reader, start=1):
            origin = f"{file} row {number}"
            if None in values or None in values.values():
                yield Row(
                    origin,
                    fault=f"has not the {len(reader.fieldnames or [])} fields of the header line; check its quotes",
                )
            else:
                yield _row(origin, values)
    except csv.Error as error:
        raise DataError(f"{file}: not valid CSV near line {reader.line_num}: {error}") from None


def _check_header(file: Path, names: Sequence[str]) -> None:
    """Refuse a header line whose columns would be mistaken.

    Raises:
        DataError: its fields are not separated by commas, or it names a column that is read more than once.
    """
    if len(names) == 1 and (found := [mark for mark in (";", "\t", "|") if mark in names[0]]):
        raise DataError(
            f"{file}: the header line is separated by {found[0]!r}; expected commas. Save the file again as CSV with "
            "commas, or as JSON lines"
        )
    if twice := [name for name in (QUESTION, CONTEXTS, ANSWER) if names.count(name) > 1]:
        raise DataError(
            f"{file}: the header line names {', '.join(twice)} more than once; keep one column of each name"
        )


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: a text column is not UTF-8 ({error}); save the file as UTF-8") from None
    for number, values in enumerate(table, start=1):
        yield _row(f"{file} row {number}", values)


def _hub(name: str, split: str | None, key: str, usual: str) -> Iterator[Row]:
    from datasets import load_dataset_builder

    hub.set_limits()
    try:
        builder = load_dataset_builder(name)
        builder.download_and_prepare()
        split = _choose_split(name, list(builder.info.splits or ()), split, key, usual)
        table = builder.as_dataset(split=split)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for: no such set, network, format
        raise DataError(
            hub.explain(error, name, "data set")
            or f"Hub data set {name} cannot be loaded: {type(error).__name__}: {str(error)[:300]}. "
            "Check the name and the network, or download it and pass the file"
        ) from None
    for number, values in enumerate(table, start=1):
        yield _row(f"{name}[{split}] row {number}", values)


def _choose_split(name: str, there: list[str], split: str | None, key: str, usual: str) -> str:
    """Choose the split of a Hub data set to read, and log it where it was not asked for.

    Raises:
        DataError: there is no such split, or none was asked for and it is not plain which; names those there are.
    """
    listed = ", ".join(there)
    if split is not None:
        wanted = [part.partition("[")[0].strip() for part in split.split("+")]  # datasets also takes train[:10%]+test
        if unknown := [part for part in wanted if part not in (*there, "all")]:
            raise DataError(
                f"{key} is {split!r}, but {name} has no split {unknown[0]!r}; set {key} to one of: {listed}"
            )
        return split
    if len(there) == 1:
        log.info("%s has one split, %s, which is taken", name, listed)
        return there[0]
    if usual not in there:
        raise DataError(f"{name} has the splits {listed}, and {key} names none of them; set it to the one to read")
    log.info("%s has the splits %s; %s is taken, as %s names none", name, listed, usual, key)
    return usual


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
