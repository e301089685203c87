"""Which reader a file's format has: by its first bytes where they tell, else by the ending of its name."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator

from toolkit.data.readers.columnar import read_arrow, read_parquet
from toolkit.data.readers.content import COMPRESSED, LOCK_MARK, Content
from toolkit.data.readers.delimited import read_delimited
from toolkit.data.readers.json_rows import read_json
from toolkit.data.readers.row import ReadOptions, Row
from toolkit.data.readers.sheets import read_workbook
from toolkit.data.readers.text_rows import read_text
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")

Reader = Callable[[Content, ReadOptions], Iterator[Row]]

_FAMILIES: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "JSON": (read_json, (".json", ".jsonl", ".ndjson")),
    "CSV": (read_delimited, (".csv", ".tsv", ".tab")),
    "Parquet": (read_parquet, (".parquet", ".pq")),
    "Arrow": (read_arrow, (".arrow", ".feather")),
    "Excel": (read_workbook, (".xlsx", ".xlsm")),
    "text": (read_text, (".txt",)),
}
"""Reader and endings by the name of the format."""
_BY_ENDING = {ending: (family, reader) for family, (reader, endings) in _FAMILIES.items() for ending in endings}

_MAGIC = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"PK\x03\x04": "Excel"}
_NO_ROWS = (
    (
        re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
        "is an old Excel file (.xls), or one with a password; save it as .xlsx without one",
    ),
    (
        re.compile(rb"(?:\xef\xbb\xbf)?version https://git-lfs\.github\.com/spec/"),
        "is a pointer of Git LFS and not the file itself; run `git lfs pull` in its repository",
    ),
    (re.compile(rb"[\0-\xff]{257}ustar"), "is a tar archive; unpack it and name the files that it holds"),
    (re.compile(rb"FEA1"), "is a Feather file of version 1; save it again with version 2, or as Parquet"),
)
"""First bytes of files that are read as no format, and what they are."""
_WEB_PAGE = (b"<html", b"<!doc", b"<?xml", b"<tabl")

ENDINGS = ", ".join(_BY_ENDING)
"""Endings of the formats that are read, for messages."""


def has_known_ending(name: str) -> bool:
    """Return whether a file's name ends as one of the formats does, or as such a file compressed, or as ``.zip``."""
    name = name.lower()
    while name.endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    return name.endswith((*_BY_ENDING, ".zip"))


def family_of(content: Content) -> str | None:
    """Return the name of the format that the ending of a file's name stands for; None if it is unknown."""
    return _BY_ENDING[content.suffix][0] if content.suffix in _BY_ENDING else None


def read_content(content: Content, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of one file or member of an archive.

    Raises:
        DataError: an unknown format, or a file that cannot be parsed as a whole.
    """
    head = content.head(4096)
    named = family_of(content)
    if reason := next((reason for magic, reason in _NO_ROWS if magic.match(head)), None):
        raise DataError(f"{content.label}: {reason}")
    if content.base_name.startswith(LOCK_MARK):
        raise DataError(
            f"{content.label}: holds no rows: Excel writes it beside a workbook that is open; name the workbook, "
            f"without {LOCK_MARK}"
        )
    if named is None:
        raise DataError(
            f"{content.label}: unknown data format {content.suffix!r}; expected {ENDINGS}, also compressed "
            f"({', '.join(COMPRESSED)}) or in a .zip"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:5].lower() in _WEB_PAGE and named != "text":
        raise DataError(
            f"{content.label}: is a web page or XML, not {named}; download the file itself, or save it again from the "
            "program that shows it"
        )
    family = next((family for magic, family in _MAGIC.items() if head.startswith(magic)), named)
    if named == "CSV" and _is_json(head):
        family = "JSON"
    if family != named:
        log.info("%s is read as %s, by its content", content.label, family)
    yield from _FAMILIES[family][0](content, options)


def _is_json(head: bytes) -> bool:
    """Return whether a file called CSV begins as JSON rows do, and no header line does."""
    start = b"".join(head.lstrip(b"\xef\xbb\xbf \t\r\n").split())
    return start.startswith((b'{"', b'[{"')) and b'":' in start
