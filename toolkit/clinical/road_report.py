"""Write what the road gave of one note for a reader: Markdown or .docx, in the note's language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.clinical.document_output import GroundedDocument, Section
from toolkit.clinical.road import DOCUMENT, Walked

_WORDS = {
    "ko": {
        "note": "기록", "flags": "사람이 볼 것", "none": "없음", "triage": "분류", "records": "이상사례 기록",
        "clock": "보고 기한", "questions": "실시기관에 물을 것", "document": "문서", "failed": "하지 못함 (위의 이유)",
        "by": {"model": "모델", "rule": "적신호 규칙", "nobody": "사람이 판단"}, "sure": "모델",
        "quoted": "모델의 이유",
        "no_event": "모델이 찾은 이상사례 없음", "no_clock": "정한 기한에 들지 않음", "days": "일 이내",
        "due": "마감", "provisional": "잠정",
    },
    "en": {
        "note": "Note", "flags": "For a person to look at", "none": "nothing", "triage": "Triage",
        "records": "Records of adverse events", "clock": "Reporting clock", "questions": "Questions to the site",
        "document": "Document", "failed": "not done (the reason is above)",
        "by": {"model": "the model", "rule": "a red flag", "nobody": "a person decides"}, "sure": "the model",
        "quoted": "the model's reason", "no_event": "the model found no event", "no_clock": "in none of the periods",
        "days": "days", "due": "due", "provisional": "provisional",
    },
}  # fmt: skip


def report_of(walked: Walked, kind: str) -> str | bytes:
    """Return the report of a note: text for ``md``, the content of the file for ``docx``.

    Raises:
        UsageError: python-docx is not installed.
    """
    asked = walked.asked.get(DOCUMENT)
    text = walked.document["TEXT"] if walked.document else ""
    document = GroundedDocument.of(text, {**(asked.row if asked else {}), "LANGUAGE": walked.language})
    before = sections_of(walked)
    return document.docx(before) if kind == "docx" else document.markdown(before)


def sections_of(walked: Walked) -> list[Section]:
    """Return what stands before the document: the note, what to look at, and the result of each step."""
    words: Mapping[str, Any] = _WORDS[walked.language]
    flags = [f"{flag['step']}: {flag['reason']}" for flag in walked.flags]
    shown = [str(walked.row[name]) for name in ("USUBJID", "NOTE_DATE", "NOTE") if walked.row.get(name)]
    return [
        (f"{words['note']} {walked.number}", [walked.origin, *shown]),
        (words["flags"], flags or [words["none"]]),
        (words["triage"], _triage(walked.triage, words)),
        (words["records"], _records(walked.records, words)),
        (words["clock"], _clock(walked.clock, words)),
        (words["questions"], [one["text"] for one in (walked.clock or {}).get("QUESTIONS", ())] or [words["none"]]),
        (words["document"], [] if walked.document else [words["failed"]]),
    ]


def _triage(triage: Mapping[str, Any] | None, words: Mapping[str, Any]) -> Sequence[str]:
    if triage is None:
        return [words["failed"]]
    own = f"{words['sure']}: {triage['MODEL_CLASS']} ({triage['CONFIDENCE']:.2f})"
    flags = [f"{one['rule']} {one['name']}: {', '.join(one['words'])}" for one in triage["RED_FLAGS"]]
    reason = [f"{words['quoted']}: {triage['MODEL_REASON']}"] if triage["MODEL_REASON"] else []
    return [f"{triage['DECISION']} ({words['by'][triage['DECIDED_BY']]})", own, *flags, *reason]


def _records(records: Mapping[str, Any] | None, words: Mapping[str, Any]) -> Sequence[str]:
    if records is None:
        return [words["failed"]]
    lines = ["; ".join(f"{name} {value}" for name, value in record.items()) for record in records["RECORDS"]]
    return lines or [words["no_event"]]


def _clock(clock: Mapping[str, Any] | None, words: Mapping[str, Any]) -> Sequence[str]:
    if clock is None:
        return [words["failed"]]
    found = clock["CLOCK"]
    if found["days"] is None:
        return [f"{words['no_clock']}: {', '.join(found['reasons'])}"]
    due = f", {words['due']} {found['due']}" if found["due"] else ""
    provisional = f" ({words['provisional']})" if found["is_provisional"] else ""
    return [f"{found['days']} {words['days']}{due}{provisional}: {', '.join(found['reasons'])}", found["source"]]
