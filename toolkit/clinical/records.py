"""Adverse events as SDTM AE records: read from answers and files, completed from the row and the dictionary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.clinical.dates import from_cdash

if TYPE_CHECKING:
    from toolkit.clinical.dictionary import Dictionary

CRITERIA = ("AESCAN", "AESCONG", "AESDISAB", "AESDTH", "AESHOSP", "AESLIFE", "AESOD", "AESMIE")
"""Flags of what makes an event serious, in SDTM's order."""
ANSWERED = (
    "AETERM", "AELLT", "AESEV", "AETOXGR", "AESER", *CRITERIA, "AEREL", "AEACN", "AEOUT", "AESTDTC", "AEENDTC",
)  # fmt: skip
"""Fields that a model answers. The others are taken from the row and the dictionary, which know them."""
CODED = ("AELLT", "AELLTCD", "AEDECOD", "AEPTCD", "AEBODSYS", "AEBDSYCD", "AESOC", "AESOCCD")
"""Fields of the dictionary: the lowest level term, its preferred term, and that one's primary system organ class."""
NUMBERS = ("AESEQ", "AELLTCD", "AEPTCD", "AEBDSYCD", "AESOCCD")
"""Fields that are numbers in SDTM."""
DICTIONARY_VERSION = "AEDICTVR"
"""Field of name and version of the dictionary; sponsor-defined, as SDTM keeps it in Define-XML."""
FIELDS = (
    "STUDYID", "DOMAIN", "USUBJID", "AESEQ", "AETERM", *CODED, "AESEV", "AETOXGR", "AESER", *CRITERIA, "AEREL", "AEACN",
    "AEOUT", "AESTDTC", "AEENDTC", DICTIONARY_VERSION,
)  # fmt: skip
"""Fields of a whole record, in the order of SDTM."""

_CDASH = {
    "AESTDAT": "AESTDTC", "AEENDAT": "AEENDTC", "AESTDT": "AESTDTC", "AEENDT": "AEENDTC", "AETRM": "AETERM",
    "AESTTIM": "AESTTIM", "AEENTIM": "AEENTIM", "AECTCAE": "AETOXGR", "AEACNST": "AEACN",
}  # fmt: skip
"""SDTM's name of the fields that CDASH names otherwise."""
_NOT_KEPT = ("AEYN", "AEONGO", "AESTTIM", "AEENTIM")
_YES_NO = {"YES": "Y", "NO": "N", "TRUE": "Y", "FALSE": "N"}
_MOST_EVENTS = 1000


class RecordsError(ValueError):
    """An answer is no list of records; the message says what it is."""


def read_events(answer: str) -> list[dict[str, Any]]:
    """Return the events of an answer: a JSON list of objects, or an object with such a list as its only value.

    Raises:
        RecordsError: it is something else.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise RecordsError(f"it is not JSON ({error})") from None
    return events_of(value)


def events_of(value: Any) -> list[dict[str, Any]]:
    """Return the events of a JSON value; see ``read_events``."""
    if isinstance(value, Mapping) and len(value) == 1 and isinstance(next(iter(value.values())), list):
        value = next(iter(value.values()))
    if not isinstance(value, list) or len(value) > _MOST_EVENTS or not all(isinstance(one, Mapping) for one in value):
        raise RecordsError("it is no list of events; expected a JSON list of objects, empty if there is no event")
    return [dict(event) for event in value]


def to_sdtm(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record under SDTM's names, from those of SDTM or CDASH, without fields that are empty.

    Dates as forms collect them (05-MAR-2026, UN-MAR-2026) become ISO 8601, with the time of ``AESTTIM``; Yes and No
    become Y and N, GRADE 2 becomes 2.
    """
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = str(key).strip().upper()
        name = _CDASH.get(name, name)
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
        if value is None or value != value or text == "":
            continue
        if name in ("AESTDTC", "AEENDTC"):
            text = from_cdash(text)
        elif name in ("AESER", "AECONTRT", *CRITERIA):
            text = _YES_NO.get(text.upper(), text)
        elif name == "AETOXGR":
            text = text.upper().removeprefix("GRADE").strip()
        if text:
            found[name] = int(text) if name in NUMBERS and text.isdigit() else text
    for name, time in (("AESTDTC", "AESTTIM"), ("AEENDTC", "AEENTIM")):
        if len(str(found.get(name, ""))) == 10 and found.get(time):
            found[name] = f"{found[name]}T{found[time]}"
    return {name: value for name, value in found.items() if name not in _NOT_KEPT}


def complete(
    events: Sequence[Mapping[str, Any]], row: Mapping[str, Any], dictionary: Dictionary | None = None
) -> list[dict[str, Any]]:
    """Return whole records of the events of one row, in the order of ``FIELDS``; what is not known is left out.

    STUDYID and USUBJID are those of the row. AESEQ counts from 1. The code of the lowest level term, preferred term
    and system organ class are the dictionary's; of a term that it does not have there are none.
    """
    records = []
    for number, event in enumerate(events, start=1):
        record = {"STUDYID": row.get("STUDYID"), "DOMAIN": "AE", "USUBJID": row.get("USUBJID"), "AESEQ": number}
        record |= to_sdtm(event)
        term = None if dictionary is None else dictionary.find(str(record.get("AELLT", "")))
        if dictionary is not None and term is not None:
            record |= term.as_fields() | {DICTIONARY_VERSION: dictionary.version}
        records.append(in_order(record))
    return records


def in_order(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's fields in SDTM's order, others last, without empty ones."""
    names = [*FIELDS, *(name for name in record if name not in FIELDS)]
    return {name: record[name] for name in names if record.get(name) not in (None, "")}


def columns_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the fields of a table of records: those of SDTM that any has, in its order, then others."""
    seen = dict.fromkeys(name for record in records for name in record)
    return [name for name in FIELDS if name in seen] + [name for name in seen if name not in FIELDS]
