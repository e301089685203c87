"""Score the steps of the road with the right inputs of each and with those that the step before predicted.

Triage, records and the fields of the reporting clock are read from the note alone: they have one input, and so the same
score in both columns. What follows from them has two: the clock's dates, the rules and the document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from toolkit.clinical.ae_metrics import event_metrics
from toolkit.clinical.ae_triage import complete
from toolkit.clinical.document_checks import score_citations
from toolkit.clinical.road import (
    CLOCK,
    DOCUMENT,
    RECORDS,
    RECORDS_COLUMN,
    STEPS,
    TRIAGE,
    Road,
    Walked,
    events_of_answer,
    sentences_of,
)
from toolkit.clinical.verification import find_check
from toolkit.metrics.fields import field_metrics

_SHOWN_EVENTS = ("events/precision", "events/recall", "events/f1", "field/AELLT", "field/AESTDTC")


@dataclass(frozen=True)
class StepScore:
    """A metric of a step, from 0 to 1; NaN where it is not defined, as of no rows."""

    step: str
    metric: str
    right_inputs: float
    """With what the rows have as the right answers of the steps before."""
    predicted_inputs: float
    """With what the steps before gave."""
    rows: int
    """Notes with a right answer, and right inputs where the step has some; a step that failed is wrong."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, NaN as None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def road_scores(notes: Sequence[Walked], road: Road) -> list[StepScore]:
    """Return the scores of the steps that some note has a right answer for, in the order of the steps."""
    parts = (_of_triage(notes), _of_records(notes, road), _of_clock(notes), _of_documents(notes))
    return [score for part in parts for score in part]


def scores_table(scores: Sequence[StepScore]) -> str:
    """Return the scores as a table in Markdown."""
    lines = ["| step | metric | right inputs | predicted inputs | notes |", "|---|---|---|---|---|"]
    for one in scores:
        values = [f"{value:.3f}" if value == value else "–" for value in (one.right_inputs, one.predicted_inputs)]
        lines.append(f"| {one.step} | {one.metric} | {' | '.join(values)} | {one.rows} |")
    return "\n".join(lines)


def _known(notes: Sequence[Walked], *steps: str) -> list[Walked]:
    """Return the notes that have a right answer to each of some steps."""
    return [note for note in notes if all(_reference(note, step) is not None for step in steps)]


def _reference(note: Walked, step: str) -> str | None:
    return note.asked[step].reference if step in note.asked else None


def _right(note: Walked, step: str) -> str:
    return _reference(note, step) or ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _of_triage(notes: Sequence[Walked]) -> Iterator[StepScore]:
    known = _known(notes, TRIAGE)
    for name, column in (
        ("class of the model", "MODEL_CLASS"),
        ("class decided, red flags and abstentions", "DECISION"),
    ):
        value = _mean([
            float(note.triage is not None and note.triage[column] == _right(note, TRIAGE).partition("\n")[0].strip())
            for note in known
        ])  # fmt: skip
        if known:
            yield StepScore(TRIAGE, name, value, value, len(known))


def _of_records(notes: Sequence[Walked], road: Road) -> Iterator[StepScore]:
    known = _known(notes, RECORDS)
    if not known:
        return
    check = find_check(STEPS[RECORDS], road.dictionary)
    given = [note.records["ANSWER"] if note.records else "" for note in known]
    right, rows = [_right(note, RECORDS) for note in known], [note.asked[RECORDS].row for note in known]
    for metric in event_metrics(given, right, rows, check):
        if metric.name in _SHOWN_EVENTS:
            yield StepScore(RECORDS, metric.name, metric.value, metric.value, len(known))
    unbroken = [_mean([float(not check(*pair)) for pair in zip(of, rows, strict=True)]) for of in (right, given)]
    yield StepScore("rules", "notes whose records break none", unbroken[0], unbroken[1], len(known))


def _of_clock(notes: Sequence[Walked]) -> Iterator[StepScore]:
    known = _known(notes, CLOCK)
    if not known:
        return
    given, right = (
        [note.clock["ANSWER"] if note.clock else "" for note in known],
        [_right(note, CLOCK) for note in known],
    )
    (value,) = (one.value for one in field_metrics(given, right, bool) if one.name == "fields")
    yield StepScore(CLOCK, "fields", value, value, len(known))
    same = [
        float(note.clock is not None and _dates(note.clock) == _dates(complete(of_note, note.asked[CLOCK].row)))
        for note, of_note in zip(known, right, strict=True)
    ]
    yield StepScore("reporting clock", "period and due date, computed", 1.0, _mean(same), len(known))


def _dates(assessed: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(assessed["CLOCK"][name] for name in ("days", "due", "follow_up_due"))


def _of_documents(notes: Sequence[Walked]) -> Iterator[StepScore]:
    known = _known(notes, RECORDS, DOCUMENT)
    if not known:
        return
    texts = [note.document["TEXT"] if note.document else "" for note in known]
    of_right, wanted = [note.right_document or "" for note in known], [_right(note, DOCUMENT) for note in known]
    cited = [score_citations(of, wanted) for of in (of_right, texts)]
    yield StepScore(DOCUMENT, "citation precision", cited[0].precision, cited[1].precision, len(known))
    yield StepScore(DOCUMENT, "citation recall", cited[0].recall, cited[1].recall, len(known))
    given_rows = [note.asked[DOCUMENT].row for note in known]
    right_rows = [
        {**row, RECORDS_COLUMN: events_of_answer(_right(note, RECORDS))}
        for row, note in zip(given_rows, known, strict=True)
    ]
    of = partial(StepScore, "verification", rows=len(known))
    first = _verified(of_right, right_rows)
    yield of("sentences, against the records given", first, _verified(texts, given_rows))
    yield of("sentences, against the right records", first, _verified(texts, right_rows))


def _verified(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of sentences that are verified; of a document without any, one is counted that is not."""
    found = [[one["verified"] for one in sentences_of(*pair)] or [False] for pair in zip(texts, rows, strict=True)]
    return _mean([float(one) for of_text in found for one in of_text])
