"""Metrics of answers that are sets of adverse events, and of the retrieval of their terms.

**Alignment.** Events of an answer and of its reference are paired one to one, the best pairs first. A pair's score is 1
if both have the same lowest level term, plus the share of characters that their AETERM have in common
(``difflib.SequenceMatcher.ratio``); pairs below 0.5 are none. Order and number of events do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from toolkit.clinical.dictionary import Dictionary
from toolkit.clinical.records import ANSWERED, RecordsError, read_events, to_sdtm
from toolkit.clinical.verification import Check
from toolkit.metrics.metric import Metric, mean_metric

LEAST_SCORE = 0.5
"""Least score of a pair."""
DEPTHS = (1, 5)
"""Numbers of candidates among which the recall of retrieval is counted."""
NO_EVENT, NAMED_TERMS = "no event", "candidate terms that stand in the note"
"""Trivial answers."""

Event = Mapping[str, Any]


def align(answer: Sequence[Event], reference: Sequence[Event]) -> list[tuple[int, int]]:
    """Return the pairs of events of an answer and its reference, by their numbers; see the module."""
    scores = sorted(
        (-_score(own, wanted), at, to) for at, own in enumerate(answer) for to, wanted in enumerate(reference)
    )
    pairs: list[tuple[int, int]] = []
    for score, at, to in scores:
        if -score >= LEAST_SCORE and all(at != one and to != other for one, other in pairs):
            pairs.append((at, to))
    return sorted(pairs)


def _score(own: Event, wanted: Event) -> float:
    term, other = str(own.get("AETERM", "")), str(wanted.get("AETERM", ""))
    same = bool(own.get("AELLT")) and own.get("AELLT") == wanted.get("AELLT")
    return float(same) + SequenceMatcher(None, term, other, autojunk=False).ratio()


def event_metrics(
    answers: Sequence[str], references: Sequence[str], rows: Sequence[Mapping[str, Any]], check: Check
) -> list[Metric]:
    """Return the metrics of answers to notes: [rows] each.

    ``events/precision`` and ``events/recall`` are the shares of answered and of wanted events that are in a pair,
    ``events/f1`` their harmonic mean, ``events/exact`` the share of rows whose sets are equal, fields included.
    ``field/NAME`` is the share of wanted events, and of paired ones that have the field where it is not wanted, whose
    field is right; an event without a pair has none. ``verified`` is the share of answers that break no rule.
    An answer that is no list of events has none, and is not exact.
    """
    given, wanted = [_events(one) for one in answers], [_events(one) or [] for one in references]
    pairs = [align(own or [], of_row) for own, of_row in zip(given, wanted, strict=True)]
    paired, answered, asked = (
        np.array([float(len(one or [])) for one in of_rows]) for of_rows in (pairs, given, wanted)
    )
    exact = [own is not None and _is_same(own, of_row) for own, of_row in zip(given, wanted, strict=True)]
    broken = [bool(check(answer, row)) for answer, row in zip(answers, rows, strict=True)]
    found = [
        mean_metric("events/precision", paired, answered),
        mean_metric("events/recall", paired, asked),
        mean_metric("events/f1", 2 * paired, answered + asked),
        mean_metric("events/exact", np.array(exact, float)),
        mean_metric("verified", 1 - np.array(broken, float)),
    ]
    names = [name for name in ANSWERED if any(name in event for of_row in wanted for event in of_row)]
    return found + [_field_metric(name, given, wanted, pairs) for name in names]


def _field_metric(
    name: str,
    given: Sequence[list[Event] | None],
    wanted: Sequence[list[Event]],
    pairs: Sequence[list[tuple[int, int]]],
) -> Metric:
    right, counted = np.zeros(len(wanted)), np.zeros(len(wanted))
    for row, (own, of_row, of_pairs) in enumerate(zip(given, wanted, pairs, strict=True)):
        of_wanted = {to: at for at, to in of_pairs}
        for to, event in enumerate(of_row):
            mine = (own or [])[of_wanted[to]].get(name) if to in of_wanted else None
            if name in event or mine is not None:
                counted[row] += 1
                right[row] += name in event and mine == event[name]
    return mean_metric(f"field/{name}", right, counted)


def trivial_events(rows: Sequence[Mapping[str, Any]], candidates: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Return the trivial answers to notes, by name: none, and each candidate term that stands in the note."""
    import json

    answers = {NO_EVENT: ["[]"] * len(rows)}
    if any(candidates):
        answers[NAMED_TERMS] = [
            json.dumps(
                [
                    {"AETERM": name, "AELLT": name, "AESER": "N"}
                    for name in of_row
                    if name.casefold() in str(row.get("NOTE", "")).casefold()
                ],
                ensure_ascii=False,
            )
            for row, of_row in zip(rows, candidates, strict=True)
        ]
    return answers


def retrieval_recall(references: Sequence[str], dictionary: Dictionary) -> dict[str, float]:
    """Return how well a dictionary's terms are found by the words of the wanted events.

    ``recall@1`` and ``recall@5`` are the shares of all events whose term is among so many candidates for its AETERM.
    Events for which the dictionary has no term are counted as not found, and their share is ``unanswerable``; ``terms``
    is the number of events.
    """
    events = [event for one in references for event in _events(one) or []]
    places = []
    for event in events:
        term = dictionary.find(str(event.get("AELLT", "")))
        found = dictionary.candidates(str(event["AETERM"]), max(DEPTHS)) if term is not None else []
        places.append(found.index(term) if term is not None and term in found else max(DEPTHS))
    has_term = [dictionary.find(str(event.get("AELLT", ""))) is not None for event in events]
    total = max(len(events), 1)
    values = {f"recall@{depth}": sum(place < depth for place in places) / total for depth in DEPTHS}
    return {**values, "unanswerable": has_term.count(False) / total, "terms": float(len(events))}


def _events(answer: str) -> list[Event] | None:
    """Return the events of an answer under SDTM's names; None if it is no list of them."""
    try:
        return [to_sdtm(event) for event in read_events(answer)]
    except RecordsError:
        return None


def _is_same(own: Sequence[Event], wanted: Sequence[Event]) -> bool:
    left = [dict(event) for event in wanted]
    for event in own:
        if dict(event) not in left:
            return False
        left.remove(dict(event))
    return not left
