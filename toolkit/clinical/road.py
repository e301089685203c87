"""Walk a note through all clinical steps: triage, records, rules, reporting clock, document, verification.

What a step cannot do is flagged for a person with the reason, and the next steps go on: no note is left out. Who
answers a step's task, models or others, is given as ``Respondent``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from toolkit.clinical import RESEARCH_USE
from toolkit.clinical.ae_triage import assessed
from toolkit.clinical.dictionary import Dictionary
from toolkit.clinical.document_checks import unverified
from toolkit.clinical.document_text import sentences
from toolkit.clinical.records import RecordsError, complete, read_events, to_sdtm
from toolkit.clinical.red_flags import RedFlags
from toolkit.clinical.triage import decided
from toolkit.clinical.verification import Check, Violation, find_check
from toolkit.runtime.errors import DataError, OutOfMemoryError
from toolkit.tasks.sample import RowFaultError

TRIAGE, RECORDS, CLOCK, DOCUMENT = "triage", "ae_coding", "ae_triage", "grounded_document"
"""The steps, by the tasks that they ask."""
STEPS = {TRIAGE: "triage", RECORDS: "sdtm_ae", CLOCK: "ae_triage", DOCUMENT: "grounded_document"}
"""What the task file of each step has as ``verify``."""
RECORDS_COLUMN = "AE"
"""Column by which the events of the records' step reach the document's."""
NOTE_FAULTS = (RowFaultError, DataError, OutOfMemoryError)
"""What a note may raise in a step: it is flagged, and the others go on."""


@dataclass(frozen=True)
class AskedStep:
    """A step's task about one note."""

    row: Mapping[str, Any]
    """Columns that the step was given, with passages if it has them."""
    draw: Callable[[int, str | None], str]
    """Returns the answer of a try, from 1; with an option it begins with that."""
    reference: str | None = None
    """The right answer, if the row has it."""
    options: tuple[str, ...] = ()
    probabilities: Callable[[], Sequence[float]] = tuple
    """Returns the probability of each option."""


class Respondent(Protocol):
    """Answers the steps' tasks about one note after another."""

    @property
    def steps(self) -> Collection[str]:
        """Steps that it answers."""

    def begin(self, number: int, values: Mapping[str, Any]) -> None:
        """Take up the note of row ``number``, from 0."""

    def ask(self, step: str, values: Mapping[str, Any]) -> AskedStep:
        """Ask a step's task about the note, by columns of a row; one of ``NOTE_FAULTS`` if it cannot be asked."""


@dataclass
class Walked:
    """Holds what all steps gave of one note."""

    number: int
    """From 1."""
    origin: str
    """File and row."""
    row: Mapping[str, Any]
    """Its columns as the steps were given them."""
    triage: dict[str, Any] | None = None
    """None of a step that failed, or that nobody answers."""
    records: dict[str, Any] | None = None
    clock: dict[str, Any] | None = None
    document: dict[str, Any] | None = None
    flags: list[dict[str, str]] = field(default_factory=list)
    """What a person has to look at: step and reason."""
    asked: dict[str, AskedStep] = field(default_factory=dict)
    right_document: str | None = None
    """The document that the right records give; None without them."""

    @property
    def language(self) -> str:
        """Return the language of the note: ko or en."""
        return "en" if self.row.get("LANGUAGE") == "en" else "ko"

    def flag(self, step: str, reason: object) -> None:
        """Have a person look at the note."""
        self.flags.append({"step": step, "reason": str(reason)})

    @property
    def results(self) -> dict[str, Any]:
        """Return what the output file has of the note beside its row; see ``Road.recall``."""
        right = {} if self.right_document is None else {"RIGHT_DOCUMENT": self.right_document}
        return {
            "TRIAGE": self.triage, "RECORDS": self.records, "AE_TRIAGE": self.clock, "DOCUMENT": self.document,
            **right, "FLAGS": self.flags, "NOTICE": RESEARCH_USE[self.language],
        }  # fmt: skip


@dataclass(frozen=True)
class Road:
    """The steps with their rules."""

    respondent: Respondent
    least_confidence: float = 0.0
    """Below it triage abstains."""
    tries: int = 3
    """Most answers to a task whose rules the ones before break."""
    dictionary: Dictionary | None = None
    """Completes and checks the records."""
    red_flags: RedFlags | None = None
    """Defaults to those that come with Frostline."""
    scores: bool = False
    """Whether the document is also asked for with the right records, where a row has them."""

    def walk(self, number: int, origin: str, values: Any, fault: str | None = None) -> Walked:
        """Walk a note, ``number`` from 1; ``fault`` says what is wrong with its row, of which then nothing is read."""
        walked = Walked(number, origin, values if isinstance(values, Mapping) else {})
        if fault is None and not isinstance(values, Mapping):
            fault = "is no object with columns"
        if fault is not None:
            for step in self.respondent.steps:
                walked.flag(step, fault)
            return walked
        self.respondent.begin(number - 1, walked.row)
        for step, take in ((TRIAGE, self._triage), (RECORDS, self._records), (CLOCK, self._clock),
                           (DOCUMENT, self._document)):  # fmt: skip
            if step in self.respondent.steps:
                try:
                    take(walked)
                except NOTE_FAULTS as error:
                    walked.flag(step, error)
        return walked

    def recall(
        self, number: int, origin: str, row: Mapping[str, Any], results: Mapping[str, Any], fault: str | None
    ) -> Walked:
        """Return a note that was walked before an interruption, by the ``results`` of its line; no model answers."""
        walked = Walked(
            number, origin, row, triage=results["TRIAGE"], records=results["RECORDS"], clock=results["AE_TRIAGE"],
            document=results["DOCUMENT"], flags=results["FLAGS"], right_document=results.get("RIGHT_DOCUMENT"),
        )  # fmt: skip
        if self.scores and fault is None:  # which need the right answers
            self.respondent.begin(number - 1, row)
            for step in self.respondent.steps:
                with suppress(*NOTE_FAULTS):  # as before
                    self._ask(walked, step)
        return walked

    def _ask(self, walked: Walked, step: str) -> AskedStep:
        """Ask a step's task; that of the document by the records of the step before."""
        values = walked.row if step != DOCUMENT else {**walked.row, RECORDS_COLUMN: _events(walked)}
        return walked.asked.setdefault(step, self.respondent.ask(step, values))

    def _triage(self, walked: Walked) -> None:
        asked = self._ask(walked, TRIAGE)
        probabilities = list(asked.probabilities())
        own = asked.options[max(range(len(probabilities)), key=probabilities.__getitem__)]
        answer = asked.draw(1, own)
        walked.triage = decided(
            asked.row, asked.options, probabilities, answer, self.least_confidence, self.red_flags
        )  # fmt: skip
        by, label = walked.triage["DECIDED_BY"], walked.triage["DECISION"]
        if by == "nobody":
            walked.flag(TRIAGE, f"{label}: {own} at {walked.triage['CONFIDENCE']}")
        if by == "rule":
            rules = ", ".join(flag["rule"] for flag in walked.triage["RED_FLAGS"])
            walked.flag(TRIAGE, f"{label} by {rules}; the model: {own}")
        self._flag_broken(walked, TRIAGE, walked.triage["VIOLATIONS"])

    def _records(self, walked: Walked) -> None:
        asked = self._ask(walked, RECORDS)
        answer, broken, tries = self._checked(asked, find_check(STEPS[RECORDS], self.dictionary))
        walked.records = {
            "RECORDS": self.records_of(answer, asked.row), "ANSWER": answer, "VERIFIED": not broken,
            "VIOLATIONS": [one.as_dict() for one in broken], "TRIES": tries,
        }  # fmt: skip
        self._flag_broken(walked, RECORDS, walked.records["VIOLATIONS"])

    def records_of(self, answer: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the whole records of an answer; none of one that is no list of events."""
        try:
            return complete(read_events(answer), row, self.dictionary)
        except RecordsError:
            return []

    def _clock(self, walked: Walked) -> None:
        asked = self._ask(walked, CLOCK)
        answer, _, tries = self._checked(asked, find_check(STEPS[CLOCK]))
        walked.clock = {**assessed(answer, asked.row), "TRIES": tries}
        if walked.clock["CLOCK"]["is_provisional"]:
            walked.flag(CLOCK, "; ".join(walked.clock["CLOCK"]["reasons"]))
        self._flag_broken(walked, CLOCK, walked.clock["VIOLATIONS"])

    def _document(self, walked: Walked) -> None:
        """Write the document by the records of the step before."""
        if walked.records is None:
            walked.flag(DOCUMENT, f"written without records, for the step {RECORDS} gave none")
        asked = self._ask(walked, DOCUMENT)
        answer, broken, tries = self._checked(asked, find_check(STEPS[DOCUMENT]))
        walked.document = {
            "TEXT": answer, "SENTENCES": sentences_of(answer, asked.row), "VERIFIED": not broken,
            "VIOLATIONS": [one.as_dict() for one in broken], "TRIES": tries,
        }  # fmt: skip
        bad = [one for one in walked.document["SENTENCES"] if not one["verified"]]
        if bad or broken:
            walked.flag(DOCUMENT, f"{len(bad)} of {len(walked.document['SENTENCES'])} sentences are not verified")
        of_records = walked.asked.get(RECORDS)
        if self.scores and of_records is not None and of_records.reference is not None:
            right = events_of_answer(of_records.reference)
            walked.right_document = answer
            if right != _events(walked):
                again = self.respondent.ask(DOCUMENT, {**walked.row, RECORDS_COLUMN: right})
                walked.right_document = self._checked(again, find_check(STEPS[DOCUMENT]))[0]

    def _checked(self, asked: AskedStep, check: Check) -> tuple[str, list[Violation], int]:
        """Return the first answer that breaks no rule, else the first of those that break the fewest; and the tries."""
        best: tuple[str, list[Violation]] | None = None
        for number in range(1, self.tries + 1):
            answer = asked.draw(number, None)
            broken = check(answer, asked.row)
            if best is None or len(broken) < len(best[1]):
                best = answer, broken
            if not broken:
                break
        assert best is not None
        return *best, number

    def _flag_broken(self, walked: Walked, step: str, violations: Sequence[Mapping[str, Any]]) -> None:
        for one in violations:
            walked.flag(step, f"{one['rule']} {one['field'] or 'answer'}: {one['value']!r}; {one['message']}")


def _events(walked: Walked) -> list[dict[str, Any]]:
    return events_of_answer(walked.records["ANSWER"]) if walked.records else []


def events_of_answer(answer: str) -> list[dict[str, Any]]:
    """Return the events of an answer under SDTM's names; none of one that is no list of events."""
    try:
        return [to_sdtm(event) for event in read_events(answer)]
    except RecordsError:
        return []


def sentences_of(document: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sentences of a document, headings apart, with what is not verified of each."""
    said = unverified(document, row)
    return [
        {"text": one.text, "verified": one.number not in said, "faults": said.get(one.number, [])}
        for one in sentences(document)
        if not one.is_heading
    ]
