"""When something may have begun that lasts as a note says."""

from __future__ import annotations

import re
from datetime import date, timedelta

from toolkit.clinical.number_words import DAYS, ENGLISH_COUNT, KOREAN_DAYS, number_of

_DURATION = re.compile(
    rf"(?:\bx|\bfor(?: the)?(?: past| last)?|\bpast)\s?(?P<count>{ENGLISH_COUNT})\s?(?P<unit>day|week)"
    rf"|(?P<days>{KOREAN_DAYS})\s?(?:간|동안)|(?<!\d)(?P<number>\d{{1,2}})\s?(?P<korean>일|주)\s?(?:간|동안)",
    re.IGNORECASE,
)


def starts_of_durations(text: str, note_date: str) -> list[str]:
    """Return the days on which something may have begun that lasts as a note says (for 3 days, 사흘간): two for each.

    Raises:
        ValueError: ``note_date`` is no complete ISO 8601 date.
    """
    note, found = date.fromisoformat(note_date[:10]), []
    for one in _DURATION.finditer(text):
        days = DAYS[one["days"]] if one["days"] else number_of(one["count"] or one["number"])
        days *= 7 if (one["unit"] or one["korean"] or "").lower() in ("week", "주") else 1
        found += [(note - timedelta(days=days - less)).isoformat() for less in (0, 1)]
    return found
