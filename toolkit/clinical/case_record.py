"""The row of a grounded document as its sources: the columns that are the case, and the passages."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from toolkit.clinical.document_facts import dates_in, whole_dates
from toolkit.clinical.relative_dates import find_dates
from toolkit.retrieval.passages import Passage, passages_of

PASSAGES, DOCUMENT = "PASSAGES", "DOCUMENT"
"""Columns of a row that are no part of the case record: what was retrieved, and the reference."""
_ANSWERS = (PASSAGES, DOCUMENT, "ANSWER", "REFERENCE", "QUESTION", "CONTEXTS")


@dataclass(frozen=True)
class CaseRecord:
    """A row as the sources of a document."""

    values: Mapping[str, Any]
    """The columns that are the case."""
    passages: Mapping[str, Passage]
    """What was retrieved, by id."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> CaseRecord:
        """Divide the columns of a row."""
        texts = row.get(PASSAGES) or []
        values = {key: value for key, value in row.items() if key not in _ANSWERS}
        return cls(values, passages_of([texts] if isinstance(texts, str) else texts))

    @cached_property
    def text(self) -> str:
        """All values as one text."""
        return "\n".join(texts_of(self.values))

    @cached_property
    def dates(self) -> set[datetime.date]:
        """The whole dates of the case, also those that its note writes without a year or relatively, as 사흘 전."""
        day, found = self.day, whole_dates(self.text)
        for date in dates_in(self.text)[0]:
            if date.year is None and day is not None:
                found |= whole_dates(f"{day.year}-{date.month:02d}-{date.day:02d}")
        return found | {datetime.date.fromisoformat(one) for one in self._of_note if len(one) == 10}

    @cached_property
    def months(self) -> set[tuple[int, int]]:
        """The months that the note names as such, also relatively."""
        return {(int(one[:4]), int(one[5:7])) for one in self._of_note if len(one) == 7}

    @cached_property
    def _of_note(self) -> list[str]:
        if self.day is None:
            return []
        return [one.value for one in find_dates(str(self.values.get("NOTE") or ""), self.day.isoformat())]

    @property
    def day(self) -> datetime.date | None:
        """The document's date; None if the row has none."""
        for name in ("DOCUMENT_DATE", "NOTE_DATE"):
            try:
                return datetime.date.fromisoformat(str(self.values.get(name))[:10])
            except ValueError:
                continue
        return None


def texts_of(value: Any) -> Iterator[str]:
    """Yield the texts and numbers within values; an object that is not text as JSON."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_of(item)
    elif value is not None:
        yield json.dumps(value, default=str)
