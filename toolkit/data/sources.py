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
    """One row of a file or Hub data set, not checked yet."""

    origin: str
    """File and row, for messages: ``answers.jsonl line 12``."""
    values: Any = None
    fault: str | None = None
    """Why the row could not be read; None if it could."""


def read_rows(path: str, split: str | None = None, key: str = "data.split", default_split: str = "train") -> list[Row]:
    """Read all rows of a ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, or of a Hub data set (``org/name``).

    A ``.json`` file holds a list of rows, or an object of rows by key as PubMedQA is published (keyed by PMID). A
    ``split`` of None takes the only one of a Hub data set, else ``default_split``. ``key`` is the recipe key or flag
    that sets the split, for messages.

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
        rows = list(_read_hub(path, split, key, default_split))
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


def _read_text(file: Path) -> str:
    """Read the file as text; bytes that are not UTF-8 become lone surrogates, to be found row by row."""
    content = file.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in content:
        raise DataError(f"{file}: is UTF-16 text (Excel's 'Unicode Text'); save the file as UTF-8")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _make_row(origin: str, values: Any) -> Row:
    """Make a row of these values, or one with a fault if they are not UTF-8 or nested too deeply."""
    try:
        text = json.dumps(values, ensure_ascii=False, skipkeys=True, default=str)
    except RecursionError:
        return Row(origin, fault="is nested too deeply; expected columns that hold text or lists of texts")
    if re.search("[\ud800-\udfff]", text):  # lone surrogates stand for bytes that are not UTF-8
        return Row(origin, fault="is not UTF-8 text; save the file as UTF-8")
    return Row(origin, values)


def _read_jsonl(file: Path) -> Iterator[Row]:
    """Yield a row for each line that is not blank; a line that is not JSON gives a row with a fault."""
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        origin = f"{file} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError alone: a number of thousands of digits
            yield Row(origin, fault=f"is not valid JSON ({error}); expected one object a line")
        else:
            yield _make_row(origin, values)


def _read_json(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSON file, a list of rows or an object of rows by key; DataError if it is neither."""
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not readable JSON ({str(error)[:100]}); expected a list of rows or an object of rows by key"
        ) from None
    if isinstance(content, dict) and all(isinstance(row, dict) for row in content.values()):
        for key, values in content.items():
            yield _make_row(f"{file} key {key}", values)
    elif isinstance(content, list):
        for number, values in enumerate(content, start=1):
            yield _make_row(f"{file} row {number}", values)
    else:
        raise DataError(
            f"{file}: holds one {type(content).__name__}; expected a list of rows or an object of rows by key"
        )


def _read_csv(file: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header line; DataError if it is not CSV or its header would be misread."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
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
                yield _make_row(origin, values)
    except csv.Error as error:
        raise DataError(f"{file}: not valid CSV near line {reader.line_num}: {error}") from None


def _check_header(file: Path, names: Sequence[str]) -> None:
    """Raise DataError if fields are not separated by commas, or several columns have the name of one that is used."""
    if len(names) == 1 and (separators := [mark for mark in (";", "\t", "|") if mark in names[0]]):
        raise DataError(
            f"{file}: the header line is separated by {separators[0]!r}; expected commas. Save the file again as CSV "
            "with commas, or as JSON lines"
        )
    if duplicates := [name for name in (QUESTION, CONTEXTS, ANSWER) if names.count(name) > 1]:
        raise DataError(
            f"{file}: the header line names {', '.join(duplicates)} more than once; keep one column of each name"
        )


def _read_parquet(file: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file; DataError if it cannot be read or a text column is not UTF-8."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: a text column is not UTF-8 ({error}); save the file as UTF-8") from None
    for number, values in enumerate(table, start=1):
        yield _make_row(f"{file} row {number}", values)


def _read_hub(name: str, split: str | None, key: str, default_split: str) -> Iterator[Row]:
    """Download a Hub data set and yield the rows of one split; DataError if either cannot be loaded."""
    from datasets import load_dataset_builder

    hub.set_limits()
    try:
        builder = load_dataset_builder(name)
        builder.download_and_prepare()
        split = _choose_split(name, list(builder.info.splits or ()), split, key, default_split)
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
        yield _make_row(f"{name}[{split}] row {number}", values)


def _choose_split(name: str, available: list[str], split: str | None, key: str, default_split: str) -> str:
    """Choose the split of a Hub data set, and log it if the user named none; DataError if there is no such split."""
    listed = ", ".join(available)
    if split is not None:
        named = [part.partition("[")[0].strip() for part in split.split("+")]  # datasets also takes train[:10%]+test
        if unknown := [part for part in named if part not in (*available, "all")]:
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


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
