"""The key of rating sheets: which answer of each row is whose, and by what a sheet is known again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from toolkit.runtime.errors import DataError

Language = Literal["en", "ko"]
SHEET_ID = re.compile(r"R-[0-9a-f]{16}")
"""Form of a sheet's id, which is random and stands in its workbook."""
_VERSION = 1


@dataclass(frozen=True)
class KeyRow:
    """A row of one rater's sheet."""

    number: int
    """As in the sheet, from 1; the order is the rater's own."""
    row: int
    """The same for all raters, from 1."""
    id: str
    """Its id in the files of answers."""
    a_is_first: bool
    """Whether answer 1 is A's."""
    digests: Mapping[str, str]
    """Of the texts in the sheet, by column; see ``digest``."""


@dataclass(frozen=True)
class KeySheet:
    """The sheet of one rater."""

    rater: int
    """From 1."""
    file: str
    """Name under which it was written."""
    rows: tuple[KeyRow, ...]


@dataclass(frozen=True)
class RatingKey:
    """All that the sheets do not tell."""

    a: str
    """File of A's answers."""
    b: str
    """File of B's answers."""
    language: Language
    criteria: tuple[str, ...]
    scale: tuple[int, int]
    """Lowest and highest rating."""
    columns: Mapping[str, str]
    """Header of each column in the sheets, by its name; see ``column_headers``."""
    sheets: Mapping[str, KeySheet]
    """By the sheet's id."""

    def as_json(self) -> str:
        """Return the content of the key's file."""
        return json.dumps({"frostline rating key": _VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"


def digest(text: str) -> str:
    """Return 12 hex digits that tell a text in a cell from others, whichever program saved the workbook.

    White space does not count, nor whether control characters and what looks like them are escaped, as ``_x000D_``.
    """
    plain = re.sub(r"_x000[9AD]_", " ", re.sub("x005F_", "", text, flags=re.IGNORECASE), flags=re.IGNORECASE)
    return hashlib.sha256(" ".join(plain.split()).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_key(path: Path) -> RatingKey:
    """Read a key.

    Raises:
        DataError: the file cannot be read, or is no key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--key {path} cannot be read ({error}); expected the key.json beside the sheets") from None
    if not isinstance(content, dict) or content.get("frostline rating key") != _VERSION:
        raise DataError(f"--key {path} is no key of rating sheets; expected the key.json that rate.py make wrote")
    try:
        return _key_of(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"--key {path} is damaged ({type(error).__name__}: {error}); take a copy of it") from None


def _key_of(content: Mapping[str, Any]) -> RatingKey:
    if content["language"] not in get_args(Language):
        raise ValueError(f"language {content['language']!r}")
    low, high = map(int, content["scale"])
    sheets = {
        name: KeySheet(int(sheet["rater"]), str(sheet["file"]), tuple(KeyRow(**row) for row in sheet["rows"]))
        for name, sheet in content["sheets"].items()
    }
    return RatingKey(
        content["a"], content["b"], content["language"], tuple(content["criteria"]), (low, high),
        dict(content["columns"]), sheets,
    )  # fmt: skip
