"""Faults to plant in right outputs, by which checks are tried: an operator returns an output with one fault.

The operators were written from the tasks and their sample rows alone, before the rules and checks were read. None knows
what a check looks at; ``tests/test_mutations.py`` says which of them the docs promise to find.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "examples" / "data" / "clinical"
FLAGS = ("AESCAN", "AESCONG", "AESDISAB", "AESDTH", "AESHOSP", "AESLIFE", "AESOD", "AESMIE")
CITATION = re.compile(r"\[([^\[\]]+)\]")
PASSAGE = re.compile(r"\[P:([^/\[\]]+)/([^\[\]]+)\]")
QUOTE = re.compile(r"“([^”]+)”")
SENTENCE = re.compile(r"[^.\n][^\n]*?(?:\s*\[[^\[\]]+\])+\.?")
"""What stands before citations, and the citations: the part of a text to which one fault belongs."""


@dataclass(frozen=True)
class Output:
    """What a model wrote about a row: records of adverse events, or a document."""

    row: dict[str, Any]
    """Columns of the row, the note and its date among them."""
    records: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    """The document; empty if the output is records."""

    @property
    def name(self) -> str:
        """The subject's number, which no two outputs of a file share."""
        return str(self.row["USUBJID"])


Change = Callable[[Output, random.Random], Output | None]
"""Plants a fault; None if the output has no place for it."""


@dataclass(frozen=True)
class Mutation:
    """An operator with its name."""

    name: str
    change: Change
    is_of_records: bool

    def apply(self, output: Output, seed: int = 0) -> Output | None:
        """Return the output with the fault, the same for the same seed; None if it has no place for one."""
        if bool(output.text) == self.is_of_records:
            return None
        changed = self.change(deepcopy(output), random.Random(f"{self.name} {seed} {output.name}"))
        return None if changed == output else changed


MUTATIONS: list[Mutation] = []


def of_records(change: Change) -> Change:
    """Add an operator on records."""
    MUTATIONS.append(Mutation(change.__name__, change, is_of_records=True))
    return change


def of_documents(change: Change) -> Change:
    """Add an operator on documents."""
    MUTATIONS.append(Mutation(change.__name__, change, is_of_records=False))
    return change


# ---------------------------------------------------------------------------------------------------- right outputs


@cache
def dictionary_rows() -> dict[str, dict[str, str]]:
    """Rows of the toy dictionary by the names of their lowest level terms, Korean and English."""
    lines = (ROOT / "toolkit" / "clinical" / "toy_dictionary.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {row[key]: row for key in ("llt_en", "llt_ko") for row in rows}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def whole_record(event: dict[str, Any], row: dict[str, Any], number: int) -> dict[str, Any]:
    """Return an event of a row as a whole record, with codes of the toy dictionary."""
    record = {"STUDYID": row["STUDYID"], "DOMAIN": "AE", "USUBJID": row["USUBJID"], "AESEQ": number, **event}
    if "AELLT" in event:
        term = dictionary_rows()[event["AELLT"]]
        record |= {"AELLTCD": int(term["llt_code"]), "AEDECOD": term["pt_en"], "AEPTCD": int(term["pt_code"])}
        record |= {"AEBODSYS": term["soc_en"], "AEBDSYCD": int(term["soc_code"])}
        record |= {"AESOC": term["soc_en"], "AESOCCD": int(term["soc_code"])}
    return record


def coded(path: Path) -> list[Output]:
    """Return the reference records of a file, whole."""
    outputs = []
    for row in _read(path):
        events = row.pop("EVENTS")
        row.pop("HARD", None)
        outputs.append(Output(row, [whole_record(event, row, 1 + at) for at, event in enumerate(events)]))
    return outputs


def written(path: Path) -> list[Output]:
    """Return the reference documents of a file."""
    outputs = []
    for row in _read(path):
        row.pop("HARD", None)
        outputs.append(Output(row, text=row.pop("DOCUMENT")))
    return outputs


def hard_clean() -> list[Output]:
    """Return 100 right outputs that look wrong: 50 times records, 50 documents."""
    return coded(ROOT / "tests" / "hard_clean_ae.jsonl") + written(ROOT / "tests" / "hard_clean_documents.jsonl")


@cache
def sample_outputs() -> list[Output]:
    """Return the references of the sample rows: 82 times records, 80 documents."""
    documents = [
        output for language in ("ko", "en") for output in written(SAMPLES / f"grounded_document_{language}.jsonl")
    ]
    return coded(SAMPLES / "ae_coding.jsonl") + documents


def chosen(seed: int = 0) -> list[Output]:
    """Return 100 right outputs to mutate: 25 of each kind and source, records of at least one event."""
    groups: dict[tuple[bool, bool], list[Output]] = {}
    for is_hard, outputs in ((False, sample_outputs()), (True, hard_clean())):
        for output in outputs:
            if output.text or output.records:
                groups.setdefault((is_hard, bool(output.text)), []).append(output)
    return [output for group in groups.values() for output in random.Random(seed).sample(group, 25)]


# --------------------------------------------------------------------------------------------------------- records


def _set(
    output: Output, rng: random.Random, change: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> Output | None:
    """Change one record, one of those for which ``change`` has something to put."""
    changes = [(at, new) for at, record in enumerate(output.records) if (new := change(dict(record)))]
    if not changes:
        return None
    at, new = rng.choice(changes)
    kept = {key: value for key, value in (output.records[at] | new).items() if value is not None}
    return replace(output, records=[*output.records[:at], kept, *output.records[at + 1 :]])


def _other_term(record: dict[str, Any], rng: random.Random, key: str) -> dict[str, str] | None:
    """Return a term of the dictionary that differs in a column from the record's."""
    if "AELLT" not in record:
        return None
    own = dictionary_rows()[record["AELLT"]]
    return rng.choice([term for term in dictionary_rows().values() if term[key] != own[key]])


@of_records
def wrong_llt_code(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: (t := _other_term(r, rng, "llt_code")) and {"AELLTCD": int(t["llt_code"])})


@of_records
def llt_code_that_does_not_exist(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AELLTCD": 910000 + rng.randrange(1000)} if "AELLTCD" in r else None)


@of_records
def wrong_pt_code(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: (t := _other_term(r, rng, "pt_code")) and {"AEPTCD": int(t["pt_code"])})


@of_records
def wrong_soc_code(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: (t := _other_term(r, rng, "soc_code")) and {"AESOCCD": int(t["soc_code"])})


@of_records
def digits_of_a_code_swapped(output: Output, rng: random.Random) -> Output | None:
    def swap(record: dict[str, Any]) -> dict[str, Any] | None:
        code = str(record.get("AELLTCD", ""))
        places = [at for at in range(len(code) - 1) if code[at] != code[at + 1]]
        if not places:
            return None
        at = rng.choice(places)
        return {"AELLTCD": int(code[:at] + code[at + 1] + code[at] + code[at + 2 :])}

    return _set(output, rng, swap)


@of_records
def llt_not_of_its_code(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: (t := _other_term(r, rng, "llt_code")) and {"AELLT": t["llt_en"]})


@of_records
def pt_not_of_its_code(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: (t := _other_term(r, rng, "pt_code")) and {"AEDECOD": t["pt_en"]})


@of_records
def soc_not_of_its_pt(output: Output, rng: random.Random) -> Output | None:
    return _set(
        output,
        rng,
        lambda r: (t := _other_term(r, rng, "soc_code")) and {"AEBODSYS": t["soc_en"], "AESOC": t["soc_en"]},
    )


@of_records
def invented_dictionary_term(output: Output, rng: random.Random) -> Output | None:
    made_up = ["가상 증후군", "전신 불쾌 소견", "cryptic malaise", "Frost syndrome"]
    return _set(output, rng, lambda r: {"AELLT": rng.choice(made_up)} if "AELLT" in r else None)


@of_records
def impossible_start(output: Output, rng: random.Random) -> Output | None:
    days = ["2026-02-30", "2026-13-01", "2026-00-10", "2025-02-29", "2026-04-31", "2026-06-00", "2026-03-05T25:00"]
    return _set(output, rng, lambda r: {"AESTDTC": rng.choice(days), "AEENDTC": None})


@of_records
def impossible_end(output: Output, rng: random.Random) -> Output | None:
    days = ["2026-02-30", "2026-13-01", "2025-02-29", "2026-09-31", "2026-11-31"]
    return _set(output, rng, lambda r: {"AEENDTC": rng.choice(days)} if "AEENDTC" in r else None)


@of_records
def date_that_is_not_iso(output: Output, rng: random.Random) -> Output | None:
    days = ["12/03/2026", "3월 5일", "2026.03.05", "20260305", "2026-3-5", "05-MAR-2026", "2026/03", "어제", "UNK"]
    return _set(output, rng, lambda r: {"AESTDTC": rng.choice(days)} if "AESTDTC" in r else None)


def _day(text: Any) -> date | None:
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)(T.*)?", str(text))
    return date.fromisoformat(found[1]) if found else None


@of_records
def end_before_start(output: Output, rng: random.Random) -> Output | None:
    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        start = _day(record.get("AESTDTC"))
        return {"AEENDTC": str(start - timedelta(rng.randint(1, 20)))} if start and "AEENDTC" in record else None

    return _set(output, rng, change)


@of_records
def end_in_a_month_before_the_start(output: Output, rng: random.Random) -> Output | None:
    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        start = _day(record.get("AESTDTC"))
        return {"AEENDTC": str(start.replace(day=1) - timedelta(1))[:7]} if start and "AEENDTC" in record else None

    return _set(output, rng, change)


@of_records
def start_and_end_swapped(output: Output, rng: random.Random) -> Output | None:
    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        start, end = _day(record.get("AESTDTC")), _day(record.get("AEENDTC"))
        return {"AESTDTC": str(end), "AEENDTC": str(start)} if start and end and start < end else None

    return _set(output, rng, change)


@of_records
def start_after_the_note(output: Output, rng: random.Random) -> Output | None:
    note = date.fromisoformat(output.row["NOTE_DATE"])
    return _set(output, rng, lambda r: {"AESTDTC": str(note + timedelta(rng.randint(1, 300))), "AEENDTC": None})


@of_records
def end_after_the_note(output: Output, rng: random.Random) -> Output | None:
    note = date.fromisoformat(output.row["NOTE_DATE"])
    later = str(note + timedelta(rng.randint(1, 300)))
    return _set(output, rng, lambda r: {"AEENDTC": later} if "AEENDTC" in r else None)


@of_records
def start_off_by_a_day(output: Output, rng: random.Random) -> Output | None:
    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        start = _day(record.get("AESTDTC"))
        return {"AESTDTC": str(start - timedelta(1))} if start else None

    return _set(output, rng, change)


@of_records
def start_a_year_early(output: Output, rng: random.Random) -> Output | None:
    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        start = _day(record.get("AESTDTC"))
        return (
            {"AESTDTC": f"{start.year - 1}{str(start)[4:]}"} if start and (start.month, start.day) != (2, 29) else None
        )

    return _set(output, rng, change)


@of_records
def term_by_another_word(output: Output, rng: random.Random) -> Output | None:
    words = ["불편감", "급성 위장관염", "malaise", "전신 쇠약", "discomfort NOS"]
    return _set(output, rng, lambda r: {"AETERM": rng.choice([w for w in words if w not in output.row["NOTE"]])})


@of_records
def letter_of_the_term_changed(output: Output, rng: random.Random) -> Output | None:
    def change(record: dict[str, Any]) -> dict[str, Any]:
        term = record["AETERM"]
        at = rng.randrange(len(term))
        return {"AETERM": term[:at] + rng.choice("뷁쵸zq") + term[at + 1 :]}

    return _set(output, rng, change)


@of_records
def term_that_is_empty(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AETERM": rng.choice(["", " "])})


@of_records
def term_that_is_missing(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AETERM": None})


@of_records
def sequence_number_twice(output: Output, rng: random.Random) -> Output | None:
    first, *_ = output.records or [None]
    return replace(output, records=[*output.records, {**first, "AESEQ": 1}]) if first else None


@of_records
def sequence_numbers_all_one(output: Output, rng: random.Random) -> Output | None:
    return replace(output, records=[{**record, "AESEQ": 1} for record in output.records])


@of_records
def sequence_number_not_positive(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESEQ": rng.choice([0, -1, 1.5])})


@of_records
def subject_of_another_row(output: Output, rng: random.Random) -> Output | None:
    other = f"{output.name[:-3]}{rng.randrange(300, 999)}"
    return _set(output, rng, lambda r: {"USUBJID": other})


@of_records
def study_of_another_row(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"STUDYID": "THAW-99"})


@of_records
def records_of_another_patient(output: Output, rng: random.Random) -> Output | None:
    note, own = output.row["NOTE"], {key: output.row[key] for key in ("STUDYID", "USUBJID")}
    others = [o for o in sample_outputs() if o.records and not any(r["AETERM"] in note for r in o.records)]
    return replace(output, records=[{**record, **own} for record in rng.choice(others).records])


@of_records
def wrong_domain(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"DOMAIN": rng.choice(["CM", "MH", "ae"])})


@of_records
def serious_without_a_criterion(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESER": "Y", **dict.fromkeys(FLAGS), "AEOUT": "RECOVERED/RESOLVED"})


@of_records
def serious_with_all_criteria_no(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESER": "Y", **dict.fromkeys(FLAGS, "N"), "AEOUT": "RECOVERED/RESOLVED"})


@of_records
def criterion_but_not_serious(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESER": "N", rng.choice(FLAGS): "Y"})


@of_records
def fatal_but_not_serious(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESER": "N", **dict.fromkeys(FLAGS), "AEOUT": "FATAL"})


@of_records
def fatal_without_death_flag(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESER": "Y", "AESHOSP": "Y", "AESDTH": "N", "AEOUT": "FATAL"})


@of_records
def death_flag_but_recovered(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESER": "Y", "AESDTH": "Y", "AEOUT": "RECOVERED/RESOLVED"})


@of_records
def grade_5_but_recovered(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AETOXGR": "5", "AESEV": None, "AESDTH": None, "AEOUT": "RECOVERED/RESOLVED"})


@of_records
def recovered_not_but_ended(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AEOUT": "NOT RECOVERED/NOT RESOLVED"} if "AEENDTC" in r else None)


@of_records
def seriousness_missing(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AESER": None})


def _controlled(name: str, field_name: str, values: list[str]) -> None:
    def change(output: Output, rng: random.Random) -> Output | None:
        return _set(output, rng, lambda r: {field_name: rng.choice(values)})

    change.__name__ = name
    of_records(change)


_controlled("severity_that_is_no_term", "AESEV", ["VERY SEVERE", "경증", "Moderate to severe", "3"])
_controlled("grade_that_is_no_term", "AETOXGR", ["6", "0", "G3", "Grade 2", "II"])
_controlled("outcome_that_is_no_term", "AEOUT", ["RECOVERED", "ONGOING", "회복", "DIED", "NOT RECOVERED"])
_controlled("action_that_is_no_term", "AEACN", ["STOPPED", "NONE", "투약 중단", "DRUG HELD", "DOSE HALVED"])
_controlled("relation_that_is_no_term", "AEREL", ["MAYBE", "관련 있음", "LIKELY", "YES"])
_controlled("seriousness_that_is_no_term", "AESER", ["YES", "예", "1", "TRUE", "X"])
_controlled("flag_that_is_no_term", "AESHOSP", ["NO", "아니오", "0", "CHECKED"])


@of_records
def field_that_does_not_exist(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {rng.choice(["AESEVERITY", "AEONSET", "SERIOUS", "AENOTE2"]): "MILD"})


@of_records
def denied_event_added(output: Output, rng: random.Random) -> Output | None:
    found = re.findall(r"([가-힣]{2,6}?)(?:은|는)? 없[음고]|[Nn]o (fever|vomiting|rash|diarrhoea)", output.row["NOTE"])
    denied = [korean or english for korean, english in found]
    if not denied or not output.records:
        return None
    event = {"AETERM": rng.choice(denied), "AESER": "N"}
    return replace(output, records=[*output.records, whole_record(event, output.row, len(output.records) + 1)])


@of_records
def event_dropped(output: Output, rng: random.Random) -> Output | None:
    return replace(output, records=output.records[:-1]) if output.records else None


@of_records
def seriousness_flipped_with_its_flags(output: Output, rng: random.Random) -> Output | None:
    return _set(
        output,
        rng,
        lambda r: {"AESER": "N", **dict.fromkeys(FLAGS)} if r["AESER"] == "Y" else {"AESER": "Y", "AESHOSP": "Y"},
    )


@of_records
def outcome_of_another_event(output: Output, rng: random.Random) -> Output | None:
    return _set(output, rng, lambda r: {"AEOUT": "UNKNOWN"})


@of_records
def another_term_coded_right(output: Output, rng: random.Random) -> Output | None:
    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        other = _other_term(record, rng, "pt_code")
        return other and whole_record({"AELLT": other["llt_ko"]}, output.row, record["AESEQ"])

    return _set(output, rng, change)


# -------------------------------------------------------------------------------------------------------- documents


def _swap(output: Output, start: int, end: int, new: str) -> Output:
    return replace(output, text=output.text[:start] + new + output.text[end:])


def _edit(
    output: Output, rng: random.Random, pattern: str | re.Pattern[str], new: Callable[[re.Match[str]], str | None]
) -> Output | None:
    """Replace one of the matches outside of citations, one of those for which ``new`` has something to put."""
    cited = [found.span() for found in CITATION.finditer(output.text)]
    edits = []
    for found in re.finditer(pattern, output.text):
        is_cited = any(start <= found.start() < end for start, end in cited)
        if not is_cited and (text := new(found)) is not None and text != found[0]:
            edits.append((found.start(), found.end(), text))
    return _swap(output, *rng.choice(edits)) if edits else None


def _cite(
    output: Output, rng: random.Random, pattern: str | re.Pattern[str], new: Callable[[re.Match[str]], str | None]
) -> Output | None:
    """Replace one of the citations that match, one of those for which ``new`` has something to put."""
    edits = [
        (f.start(), f.end(), t) for f in re.finditer(pattern, output.text) if (t := new(f)) is not None and t != f[0]
    ]
    return _swap(output, *rng.choice(edits)) if edits else None


@of_documents
def passage_of_a_document_that_does_not_exist(output: Output, rng: random.Random) -> Output | None:
    return _cite(output, rng, PASSAGE, lambda f: f"[P:{rng.choice(['AE-9', 'SOP-12', 'KGCP', 'ICH-E2A'])}/{f[2]}]")


@of_documents
def passage_that_does_not_exist(output: Output, rng: random.Random) -> Output | None:
    return _cite(output, rng, PASSAGE, lambda f: f"[P:{f[1]}/{rng.choice(['99.1', '0.3', f[2] + '.77'])}]")


@of_documents
def field_that_the_case_has_not(output: Output, rng: random.Random) -> Output | None:
    names = ["AE.AEFOO", "AE.AEACNOTH", "LB.LBORRES", "VITALS", "AE9.AESTDTC"]
    return _cite(output, rng, r"\[(?:NOTE|AE\d?\.\w+)\]", lambda f: f"[{rng.choice(names)}]")


@of_documents
def citation_without_its_form(output: Output, rng: random.Random) -> Output | None:
    return _cite(output, rng, PASSAGE, lambda f: rng.choice([f"[P: {f[1]} {f[2]}]", f"[{f[1]}/{f[2]}]", f"[P:{f[1]}]"]))


@of_documents
def citations_of_a_sentence_missing(output: Output, rng: random.Random) -> Output | None:
    return _cite(output, rng, r"(?: \[[^\[\]]+\])+", lambda f: "")


@of_documents
def citation_moved_to_another_passage(output: Output, rng: random.Random) -> Output | None:
    """Cite, for a sentence with a number of a passage, a passage that says nothing of the kind."""
    found = [
        f for f in SENTENCE.finditer(output.text) if re.search(r"\d+(?=시간|일 |일마다|배| hours| days| times)", f[0])
    ]
    found = [f for f in found if PASSAGE.search(f[0])]
    if not found:
        return None
    sentence = rng.choice(found)
    to = "[P:AE-EN-2/1.2]" if output.row["LANGUAGE"] == "en" else "[P:NAR-1/2.2]"
    return _swap(output, *sentence.span(), PASSAGE.sub(to, sentence[0]))


@of_documents
def passage_superseded(output: Output, rng: random.Random) -> Output | None:
    day, old = output.row["NOTE_DATE"], {"AE-2": "2026-03-01", "DEV-2": "2026-02-01", "LTR-2": "2026-04-01"}
    clauses = {"AE-2/3.1", "AE-2/4.1", "DEV-2/2.1", "DEV-2/3.1", "DEV-2/3.2", "LTR-2/2.1"}

    def new(found: re.Match[str]) -> str | None:
        is_both = f"{found[1]}/{found[2]}" in clauses and day >= old[found[1]]
        return f"[P:{found[1][:-1]}1/{found[2]}]" if is_both else None

    return _cite(output, rng, PASSAGE, new)


@of_documents
def passage_not_yet_in_force(output: Output, rng: random.Random) -> Output | None:
    if output.row["LANGUAGE"] == "en" or output.row["NOTE_DATE"] >= "2026-04-01":
        return None
    day, later = (
        output.row["NOTE_DATE"],
        {"LTR-2/2.1": "2026-04-01", "AE-2/5.1": "2026-03-01", "KR-RULE/24.5": "2026-03-05"},
    )
    ids = [name for name, first in later.items() if day < first]
    return _cite(output, rng, PASSAGE, lambda f: f"[P:{rng.choice(ids)}]" if ids else None)


@of_documents
def word_of_a_quote_changed(output: Output, rng: random.Random) -> Output | None:
    def new(found: re.Match[str]) -> str:
        words = found[1].split(" ")
        words[rng.randrange(len(words))] = rng.choice(["언제나", "다른", "never"])
        return f"“{' '.join(words)}”"

    return _edit(output, rng, QUOTE, new)


@of_documents
def word_of_a_quote_left_out(output: Output, rng: random.Random) -> Output | None:
    def new(found: re.Match[str]) -> str | None:
        words = found[1].split()
        if len(words) < 4:
            return None
        del words[rng.randrange(1, len(words) - 1)]
        return f"“{' '.join(words)}”"

    return _edit(output, rng, QUOTE, new)


@of_documents
def letter_of_a_quote_changed(output: Output, rng: random.Random) -> Output | None:
    def new(found: re.Match[str]) -> str:
        places = [at for at, letter in enumerate(found[1]) if letter.isalpha()]
        at = rng.choice(places)
        return f"“{found[1][:at]}{rng.choice('뷁쵸zq')}{found[1][at + 1 :]}”"

    return _edit(output, rng, QUOTE, new)


@of_documents
def words_of_a_quote_swapped(output: Output, rng: random.Random) -> Output | None:
    def new(found: re.Match[str]) -> str | None:
        words = found[1].split()
        if len(words) < 3:
            return None
        words[0], words[1] = words[1], words[0]
        return f"“{' '.join(words)}”"

    return _edit(output, rng, QUOTE, new)


@of_documents
def quote_invented(output: Output, rng: random.Random) -> Output | None:
    text = {
        "ko": "기록에는 “투약을 즉시 재개할 것”이라고 적혀 있다",
        "en": "The note says “resume the product at once”",
    }
    return replace(output, text=f"{output.text} {text[output.row['LANGUAGE']]} [NOTE].")


NUMBER = re.compile(r"(?<![\d.,/:~\-–A-Za-z])\d+(?:[.,]\d+)*(?![\d.,/:~\-–]*\d)(?!\s*[년월일.]|일|th\b|[A-Za-z]*-)")
"""A number that is no part of a date, a time, a range or a name."""


def _numbers(output: Output) -> set[str]:
    """Return the numbers of the row and of the document: a fault must not be right elsewhere in the case."""
    text = json.dumps(output.row, ensure_ascii=False) + output.text
    return {number.lstrip("0") for number in re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))}


def _number(output: Output, rng: random.Random, new: Callable[[str], str | None]) -> Output | None:
    known = _numbers(output)

    def change(found: re.Match[str]) -> str | None:
        is_year = len(found[0]) == 4 and found[0].startswith("20")
        number = None if is_year else new(found[0])
        return None if number in known else number

    return _edit(output, rng, NUMBER, change)


@of_documents
def number_plus_one(output: Output, rng: random.Random) -> Output | None:
    return _number(output, rng, lambda n: str(int(n) + 1) if n.isdigit() else None)


@of_documents
def number_ten_times(output: Output, rng: random.Random) -> Output | None:
    return _number(output, rng, lambda n: f"{n}0" if n.isdigit() else None)


@of_documents
def digits_of_a_number_swapped(output: Output, rng: random.Random) -> Output | None:
    return _number(output, rng, lambda n: n[1] + n[0] + n[2:] if n.isdigit() and len(n) > 1 and n[1] != "0" else None)


@of_documents
def decimal_point_moved(output: Output, rng: random.Random) -> Output | None:
    def move(number: str) -> str | None:
        whole, dot, part = number.partition(".")
        return f"{whole}{part[0]}{'.' if part[1:] else ''}{part[1:]}".lstrip("0") if dot and whole.isdigit() else None

    return _number(output, rng, move)


@of_documents
def number_in_words_changed(output: Output, rng: random.Random) -> Output | None:
    words = {
        "두 번": "세 번",
        "네 번": "두 번",
        "세 알": "다섯 알",
        "한 세트": "두 세트",
        "사흘": "나흘",
        "보름": "열흘",
    }
    words |= {"세 차례": "네 차례", "한 알": "세 알", "twice": "three times", "three": "five", "two weeks": "six weeks"}
    return _edit(output, rng, "|".join(words), lambda f: words[f[0]])


@of_documents
def unit_changed(output: Output, rng: random.Random) -> Output | None:
    units = {"mg": ["g", "mL", "µg"], "g": ["mg", "kg"], "ms": ["s"], "kg": ["g"], "℃": ["%", "℉"], "°C": ["%", "°F"]}
    units |= {
        "시간": ["일", "분"],
        "hours": ["days", "weeks"],
        "days": ["hours", "weeks"],
        "주": ["시간"],
        "주 ": ["년 "],
    }
    units |= {"%": ["mg"], "도": ["%"], "분": ["시간", "일"], "weeks": ["days"]}
    pattern = r"(?<=\d)(\s*)(mg|kg|ms|℃|°C|시간|hours|days|weeks|%|g(?![a-z])|도(?=[의였라])|분(?= )|주까지|주(?=까))"
    return _edit(output, rng, pattern, lambda f: f[1] + rng.choice(units[f[2]]) if f[2] in units else None)


@of_documents
def iso_date_changed(output: Output, rng: random.Random) -> Output | None:
    def new(found: re.Match[str]) -> str:
        return str(date.fromisoformat(found[0]) + timedelta(rng.choice([-40, -9, 2, 11, 365])))

    return _edit(output, rng, r"\d{4}-\d\d-\d\d(?!까지)(?<!by \d{4}-\d\d-\d\d)", new)


@of_documents
def date_in_words_changed(output: Output, rng: random.Random) -> Output | None:
    def day(old: str) -> int:
        return rng.choice([day for day in range(1, 29) if str(day) not in _numbers(output) and str(day) != old])

    def korean(found: re.Match[str]) -> str:
        return f"{found[1]}월 {day(found[2])}일"

    def english(found: re.Match[str]) -> str:
        return f"{day(found[1])} {found[2]}"

    if output.row["LANGUAGE"] == "en":
        return _edit(output, rng, r"(?<!\d)(\d+) (March|April|May|June)", english)
    return _edit(output, rng, r"(?<!년 )(\d+)월 (\d+)일", korean)


@of_documents
def month_of_a_date_changed(output: Output, rng: random.Random) -> Output | None:
    return _edit(output, rng, r"(\d+)월 (?=\d+일)", lambda f: f"{int(f[1]) % 12 + 1}월 ")


@of_documents
def year_of_a_date_changed(output: Output, rng: random.Random) -> Output | None:
    return _edit(output, rng, r"20\d\d(?=-\d\d|년)", lambda f: str(int(f[0]) + rng.choice([-1, 1])))


def _deadline(output: Output, rng: random.Random, days: int) -> Output | None:
    def new(found: re.Match[str]) -> str:
        return str(date.fromisoformat(found[0]) + timedelta(days))

    return _edit(
        output, rng, r"\d{4}-\d\d-\d\d(?=까지)|(?<=due by )\d{4}-\d\d-\d\d|(?<=answer by )\d{4}-\d\d-\d\d", new
    )


@of_documents
def deadline_a_day_late(output: Output, rng: random.Random) -> Output | None:
    return _deadline(output, rng, 1)


@of_documents
def deadline_a_day_early(output: Output, rng: random.Random) -> Output | None:
    return _deadline(output, rng, -1)


@of_documents
def deadline_a_month_late(output: Output, rng: random.Random) -> Output | None:
    return _deadline(output, rng, 30)


@of_documents
def hours_of_a_rule_changed(output: Output, rng: random.Random) -> Output | None:
    return _edit(output, rng, r"(?<!\d)(24|48|72)(?=시간| hours)", lambda f: {"24": "48", "48": "24", "72": "24"}[f[1]])


DRUGS = {
    "세프트리악손": "반코마이신", "클래리트로마이신": "아지트로마이신", "로페라미드": "라니티딘",
    "세티리진": "로라타딘", "타이레놀": "이부프로펜", "아세트아미노펜": "나프록센", "메틸프레드니솔론": "덱사메타손",
    "와파린": "아픽사반", "아토르바스타틴": "심바스타틴", "리팜피신": "이소니아지드", "아스피린": "나프록센",
    "클로피도그렐": "티카그렐러", "에피네프린": "도파민", "비소프롤롤": "암로디핀", "리바록사반": "에독사반",
    "덱사메타손": "프레드니솔론",
    "Ceftriaxone": "Vancomycin", "Clarithromycin": "Azithromycin", "clarithromycin": "azithromycin",
    "Loperamide": "Ranitidine", "loperamide": "ranitidine", "Acetaminophen": "Naproxen",
    "Methylprednisolone": "Dexamethasone",
}  # fmt: skip


@of_documents
def drug_changed(output: Output, rng: random.Random) -> Output | None:
    return _edit(output, rng, "|".join(DRUGS), lambda f: DRUGS[f[0]] if DRUGS[f[0]] not in output.row["NOTE"] else None)


@of_documents
def drug_invented(output: Output, rng: random.Random) -> Output | None:
    text = {"ko": f"{rng.choice(list(DRUGS.values())[:8])}을 투여하였다", "en": "Vancomycin was given"}
    return replace(output, text=f"{output.text} {text[output.row['LANGUAGE']]} [NOTE].")


@of_documents
def subject_number_changed(output: Output, rng: random.Random) -> Output | None:
    """Name another subject; where the text names none, in a new first sentence."""
    other = f"{output.name[:-3]}{rng.randrange(300, 999)}"
    if output.name in output.text:
        return replace(output, text=output.text.replace(output.name, other))
    text = {"ko": f"대상자 {other}에 관한 기록이다", "en": f"This is about subject {other}"}
    return replace(output, text=f"{text[output.row['LANGUAGE']]} [USUBJID]. {output.text}")


@of_documents
def document_of_another_patient(output: Output, rng: random.Random) -> Output | None:
    kind = ("LANGUAGE", "DOCUMENT_TYPE")
    others = [
        o for o in sample_outputs() if o.text and o.name != output.name and all(o.row[k] == output.row[k] for k in kind)
    ]
    return replace(output, text=rng.choice(others).text)


@of_documents
def sentence_without_a_source_added(output: Output, rng: random.Random) -> Output | None:
    text = {
        "ko": "대상자는 현재 안정적이며 추가 조치는 필요하지 않다",
        "en": "The subject is stable and needs nothing further",
    }
    return replace(output, text=f"{output.text} {text[output.row['LANGUAGE']]}.")


@of_documents
def measurement_invented(output: Output, rng: random.Random) -> Output | None:
    value = rng.choice(["143.7", "86.31", "3971"])
    text = {"ko": f"검사값은 {value}였다", "en": f"The value was {value}"}
    return replace(output, text=f"{output.text} {text[output.row['LANGUAGE']]} [NOTE].")


@of_documents
def date_invented(output: Output, rng: random.Random) -> Output | None:
    text = {"ko": "2024년 11월 23일에 재입원하였다", "en": "The subject was admitted again on 23 November 2024"}
    return replace(output, text=f"{output.text} {text[output.row['LANGUAGE']]} [NOTE].")


@of_documents
def passage_invented_in_words(output: Output, rng: random.Random) -> Output | None:
    to = "[P:AE-EN-2/2.1]" if output.row["LANGUAGE"] == "en" else "[P:AE-2/5.1]"
    text = {"ko": "규정은 96시간 이내의 통지를 정한다", "en": "The procedure asks for notice within 96 hours"}
    return replace(output, text=f"{output.text} {text[output.row['LANGUAGE']]} {to}.")


@of_documents
def negation_flipped(output: Output, rng: random.Random) -> Output | None:
    turns = {
        "없었다": "있었다",
        "없다고": "있다고",
        "하지 않았다": "하였다",
        "바꾸지 않았다": "바꾸었다",
        "정상이": "이상이",
    }
    turns |= {"There was no": "There was a", "There were no": "There were", "No kit": "A kit", "does not list": "lists"}
    turns |= {"중대하지 않으므로": "중대하므로", "관련이 없다": "관련이 있다", "시작하지 않았다": "시작하였다"}
    return _edit(output, rng, "|".join(sorted(turns, key=len, reverse=True)), lambda f: turns[f[0]])


@of_documents
def comparison_flipped(output: Output, rng: random.Random) -> Output | None:
    turns = {
        "이내": "이후",
        "넘으면": "밑돌면",
        "이상 ": "미만 ",
        "까지 허용": "부터 허용",
        "within": "after",
        "up to": "from",
    }
    return _edit(output, rng, "|".join(turns), lambda f: turns[f[0]])


@of_documents
def event_renamed(output: Output, rng: random.Random) -> Output | None:
    turns = {"발진": "두드러기", "폐렴": "심근경색", "설사": "변비", "두통": "복통", "입원": "퇴원", "오심": "흉통"}
    turns |= {"nausea": "chest pain", "pneumonia": "stroke", "headache": "back pain", "Headache": "Back pain"}
    return _edit(output, rng, "|".join(turns), lambda f: turns[f[0]])


@of_documents
def action_contradicted(output: Output, rng: random.Random) -> Output | None:
    turns = {"중단되었다": "증량되었다", "바꾸지 않았다": "늘렸다", "감량한다": "증량한다", "interrupted": "increased"}
    turns |= {"계속되고 있다": "끝났다", "나아지고 있다": "나빠지고 있다", "reduced to": "raised to"}
    return _edit(output, rng, "|".join(turns), lambda f: turns[f[0]])


@of_documents
def sentence_without_facts_invented(output: Output, rng: random.Random) -> Output | None:
    text = {"ko": "시험자는 경과가 매우 좋다고 평가하였다", "en": "The investigator is pleased with the course"}
    return replace(output, text=f"{output.text} {text[output.row['LANGUAGE']]} [NOTE].")


@of_documents
def dates_of_the_case_swapped(output: Output, rng: random.Random) -> Output | None:
    days = list(dict.fromkeys(re.findall(r"\d+월 \d+일", output.text)))
    if len(days) < 2:
        return None
    first, second = days[:2]
    text = output.text.replace(first, "\0").replace(second, first).replace("\0", second)
    return replace(output, text=text)
