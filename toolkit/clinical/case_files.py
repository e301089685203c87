"""Read a case as the columns of a row: plain text, SOAP notes, or a FHIR bundle by fhir.resources."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.paths import read_regular

MISSING_FHIR = 'a FHIR bundle needs fhir.resources: pip install fhir.resources (pip install -e ".[fhir]")'
_MOST_BYTES = 2**26
REQUESTS = {
    "ko": {
        "narrative": "이상사례 서술문을 쓰고, 중대한 이상사례이면 최초 보고 기한을 적어 주세요.",
        "site_letter": "실시기관에 보낼 서신을 쓰고, 질의의 회신 기한을 적어 주세요.",
        "deviation_report": "계획서 이탈 보고를 쓰고, 중대한 이탈인지와 보고 기한을 적어 주세요.",
    },
    "en": {
        "narrative": "Write the narrative of the adverse event; if it is serious, say when the initial report is due.",
        "site_letter": "Write the letter to the site, and say when the query is to be answered.",
        "deviation_report": "Write the report of the protocol deviation, whether it is major, and when it is due.",
    },
}
"""What is asked for, by language and type of document; with the note it is what passages are found by."""
_SOAP = {"S": "SUBJECTIVE", "O": "OBJECTIVE", "A": "ASSESSMENT", "P": "PLAN"}
_SECTION = re.compile(r"^\s*([SOAP])\s*[):.]\s*|^\s*(SUBJECTIVE|OBJECTIVE|ASSESSMENT|PLAN)\s*:\s*", re.IGNORECASE)
_SHOWN = {
    "Condition": ("code", "onsetDateTime", "abatementDateTime", "clinicalStatus"),
    "Observation": ("code", "effectiveDateTime", "valueQuantity", "valueString", "valueCodeableConcept"),
    "MedicationStatement": ("medication", "effectiveDateTime", "effectivePeriod", "status"),
    "MedicationRequest": ("medication", "authoredOn", "status"),
    "MedicationAdministration": ("medication", "occurrenceDateTime", "status"),
    "Procedure": ("code", "occurrenceDateTime", "performedDateTime", "status"),
    "Encounter": ("class", "type", "actualPeriod", "status"),
    "AdverseEvent": ("code", "occurrenceDateTime", "detected", "seriousness", "outcome", "actuality"),
    "AllergyIntolerance": ("code", "onsetDateTime"),
}
"""Elements of each kind of resource that go into the note. Patients, people and organisations are left out."""


def read_case(path: Path) -> dict[str, Any]:
    """Return the columns of a case file: NOTE, what SOAP sections there are, NOTE_DATE and AE if it says them.

    A .json file is a FHIR bundle (R5), another file a note in plain text.

    Raises:
        DataError: it cannot be read, or is no bundle.
        UsageError: fhir.resources is not installed.
    """
    try:
        text = read_regular(path, _MOST_BYTES).strip()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not text:
        raise DataError(f"{path}: is empty; expected a note or a FHIR bundle")
    return _of_bundle(path, text) if path.suffix.lower() == ".json" else {"NOTE": text, **soap_sections(text)}


def soap_sections(note: str) -> dict[str, str]:
    """Return the sections of a SOAP note by name; none unless it has two or more."""
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in note.splitlines():
        if head := _SECTION.match(line):
            name = _SOAP.get((head[1] or "").upper()) or head[2].upper()
            current = sections.setdefault(name, [])
            line = line[head.end() :]
        if current is not None:
            current.append(line.strip())
    return {name: "\n".join(lines).strip() for name, lines in sections.items()} if len(sections) > 1 else {}


def _of_bundle(path: Path, text: str) -> dict[str, Any]:
    try:
        from fhir.resources.bundle import Bundle
        from pydantic import ValidationError
    except ImportError:
        raise UsageError(MISSING_FHIR) from None
    try:
        bundle = Bundle.model_validate_json(text)
    except (ValidationError, ValueError) as error:
        first = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: is no FHIR bundle that fhir.resources accepts ({first})") from None
    resources = [entry.resource for entry in bundle.entry or [] if entry.resource is not None]
    lines = [line for resource in resources if (line := _line(resource))]
    if not lines:
        raise DataError(f"{path}: has no resource that is read; expected some of {', '.join(_SHOWN)}")
    events = [_event(_plain(one)) for one in resources if one.get_resource_type() == "AdverseEvent"]
    days = [day for resource in resources for day in _days(_plain(resource))]
    row: dict[str, Any] = {"NOTE": "\n".join(lines), "AE": events}
    return {**row, "NOTE_DATE": max(days)} if days else row


def _plain(resource: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(resource.model_dump_json(exclude_none=True))
    return values


def _line(resource: Any) -> str:
    """Return what the note says of a resource: its kind, and the elements that are shown."""
    kind, values = resource.get_resource_type(), _plain(resource)
    shown = [
        _text(values[name.removesuffix("_fhir")])
        for name in _SHOWN.get(kind, ())
        if name.removesuffix("_fhir") in values
    ]
    notes = [note["text"] for note in values.get("note", ()) if note.get("text")]
    return f"{kind}: {'; '.join(filter(None, [*shown, *notes]))}" if shown or notes else ""


def _text(value: Any) -> str:
    """Return a FHIR element as words: the text or display of a concept, a quantity with its unit, a period."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(_text, value)))
    if not isinstance(value, Mapping):
        return str(value)
    if "value" in value:
        return f"{value['value']} {value.get('unit', value.get('code', ''))}".strip()
    if "start" in value or "end" in value:
        return f"{value.get('start', '')} ~ {value.get('end', '')}".strip()
    for key in ("text", "display", "concept", "code"):
        if key in value:
            return _text(value[key])
    return _text(value["coding"]) if "coding" in value else ""


def _event(values: Mapping[str, Any]) -> dict[str, str]:
    """Return an AdverseEvent as an SDTM record: term, start, seriousness."""
    event = {"AETERM": _text(values.get("code", ""))}
    if start := values.get("occurrenceDateTime") or values.get("detected"):
        event["AESTDTC"] = str(start)[:10]
    if serious := _text(values.get("seriousness", "")):
        event["AESER"] = "N" if serious.lower().startswith(("non", "not")) else "Y"
    return event


def _days(value: Any) -> Iterator[str]:
    """Yield the whole dates within values."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _days(item)
    elif isinstance(value, list):
        for item in value:
            yield from _days(item)
    elif isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value):
        try:
            yield date.fromisoformat(value[:10]).isoformat()
        except ValueError:
            return
