"""What records are checked against: their note, its row, the dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.clinical.dictionary import Dictionary

Record = Mapping[str, Any]
"""A record under SDTM's names."""


@dataclass(frozen=True)
class Context:
    """Holds what the records of a note are held against, as far as it is known."""

    note: str | None = None
    note_date: str | None = None
    """ISO date of the note."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the note's row: STUDYID, USUBJID."""
    dictionary: Dictionary | None = None


NOTHING_KNOWN = Context()
"""What records of a file are checked against that has no notes."""


def value(record: Record, name: str) -> str:
    """Return a field as text without blanks around it; empty if it is not there."""
    found = record.get(name)
    return "" if found is None else str(found).strip()
