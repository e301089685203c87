"""The check ``sdtm_ae``: an answer of events against its note, its row, the codelists and the dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from toolkit.clinical.context import Context
from toolkit.clinical.dictionary import Dictionary
from toolkit.clinical.records import RecordsError, read_events, to_sdtm
from toolkit.clinical.rules import check_records
from toolkit.clinical.verification import Violation


def check_answer(answer: str, row: Mapping[str, Any], dictionary: Dictionary | None = None) -> list[Violation]:
    """Return what an answer breaks; fields are named with the number of their event, as ``2.AESTDTC``.

    The note is the row's NOTE, its date NOTE_DATE. Codes are checked where a dictionary is given.
    """
    try:
        events = read_events(answer)
    except RecordsError as error:
        return [Violation(None, "", "AE-JSON", answer[:60], str(error))]
    note = row.get("NOTE")
    context = Context(str(note) if note else None, _iso(row.get("NOTE_DATE")), row, dictionary)
    found = check_records([to_sdtm(event) for event in events], context, range(1, len(events) + 1))
    return [Violation(None, f"{one.row}.{one.field}", one.rule, one.value, one.message) for one in found]


def _iso(text: Any) -> str | None:
    """Return the day of a note's date; None if the row has none that is complete."""
    try:
        return date.fromisoformat(str(text)[:10]).isoformat()
    except ValueError:
        return None
