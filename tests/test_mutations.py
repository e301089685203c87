"""What the checks of records and documents find in outputs with one planted fault, and that right ones pass.

The faults (``mutations.py``) and the hard right outputs were written by somebody who had not read the rules. Of those
that the docs promise to find, none may be missed; what is outside of the promise is counted too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from helpers import ROOT, run_here
from mutations import MUTATIONS, Mutation, Output, chosen, hard_clean, sample_outputs

from toolkit.clinical.dictionary import open_dictionary
from toolkit.clinical.verification import Violation, find_check
from toolkit.retrieval.corpus import Corpus

OUTSIDE = {
    # of records
    "start_off_by_a_day", "event_dropped", "seriousness_flipped_with_its_flags", "outcome_of_another_event",
    "another_term_coded_right", "denied_event_added", "field_that_does_not_exist", "relation_that_is_no_term",
    "grade_that_is_no_term", "seriousness_that_is_no_term", "flag_that_is_no_term",
    # of documents
    "citations_of_a_sentence_missing", "citation_moved_to_another_passage", "number_in_words_changed",
    "number_ten_times", "document_of_another_patient", "sentence_without_a_source_added", "negation_flipped",
    "comparison_flipped", "event_renamed", "action_contradicted", "sentence_without_facts_invented",
    "dates_of_the_case_swapped",
}  # fmt: skip
"""Operators of which the docs promise nothing, or not all: docs/coding.md and docs/grounded-documents.md say why."""
MOST = 12
"""Outputs that an operator is tried on in the first tier; ``slow`` tries all."""


@cache
def passages() -> list[str]:
    """All passages of the sample corpus."""
    return [one.text_in_prompt() for one in Corpus.open(str(ROOT / "examples" / "data" / "corpus")).passages()]


def check(output: Output) -> list[Violation]:
    """What the check of the output's task finds."""
    if output.text:
        return find_check("grounded_document")(output.text, {**output.row, "PASSAGES": passages()})
    answer = json.dumps(output.records, ensure_ascii=False)
    return find_check("sdtm_ae", open_dictionary("toy"))(answer, output.row)


def tried(mutation: Mutation, outputs: list[Output], most: int | None = None) -> tuple[int, list[str]]:
    """How many outputs an operator altered, and those of them in which nothing was found."""
    changes = (mutation.apply(output) for output in outputs)
    altered = list(islice((one for one in changes if one is not None), most))
    return len(altered), [one.text or json.dumps(one.records, ensure_ascii=False) for one in altered if not check(one)]


def test_nothing_is_found_in_hard_right_outputs() -> None:
    outputs = hard_clean()
    assert len(outputs) == 100
    assert {one.name: [str(fault) for fault in check(one)] for one in outputs if check(one)} == {}


def test_nothing_is_found_in_the_references_of_the_samples() -> None:
    outputs = sample_outputs()
    assert len(outputs) == 162
    assert {one.name: [str(fault) for fault in check(one)] for one in outputs if check(one)} == {}


def test_each_planted_fault_that_the_docs_promise_to_find_is_found(summarise: Callable[[str], None]) -> None:
    outputs, missed, lines = chosen(), {}, []
    assert len(outputs) == 100
    for mutation in MUTATIONS:
        count, unseen = tried(mutation, outputs, MOST)
        assert count >= 2, mutation.name
        is_promised = mutation.name not in OUTSIDE
        lines.append(f"{mutation.name}: {count - len(unseen)} of {count}{'' if is_promised else ', not promised'}")
        if is_promised and unseen:
            missed[mutation.name] = unseen
    summarise("\n".join(lines))
    assert missed == {}


@pytest.mark.slow
def test_each_planted_fault_is_found_in_all_right_outputs(summarise: Callable[[str], None]) -> None:
    outputs, missed, lines = sample_outputs() + hard_clean(), {}, []
    for mutation in MUTATIONS:
        count, unseen = tried(mutation, outputs)
        lines.append(f"{mutation.name}: {count - len(unseen)} of {count}")
        if mutation.name not in OUTSIDE and unseen:
            missed[mutation.name] = unseen
    summarise("\n".join(lines))
    assert missed == {}


def test_an_operator_plants_the_same_fault_for_the_same_seed() -> None:
    output = next(one for one in sample_outputs() if one.text)
    changes = [mutation.apply(output, seed) for mutation in MUTATIONS for seed in (0, 0, 1)]
    assert changes[::3] == changes[1::3]
    assert changes[::3] != changes[2::3]
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert {mutation.name for mutation in MUTATIONS} >= OUTSIDE


def test_the_command_finds_a_planted_fault_in_its_row_and_nothing_in_the_others(tmp_path: Path) -> None:
    outputs = [one for one in hard_clean() if one.records][:9]
    mutation = next(one for one in MUTATIONS if one.name == "wrong_llt_code")
    changed = mutation.apply(outputs[4])
    assert changed is not None
    rows = [{**one.row, "ANSWER": one.records} for one in [*outputs[:4], changed, *outputs[5:]]]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    done = run_here("verify", file, "--dictionary", "toy", "--output", tmp_path / "found.jsonl")
    assert done.returncode == 1
    (found,) = map(json.loads, (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines())
    assert (found["row"], found["field"], found["rule"]) == (5, "1.AELLTCD", "AE-LLTCD")


def test_the_command_finds_a_number_that_two_records_of_a_subject_share(tmp_path: Path) -> None:
    outputs = [one for one in hard_clean() if len(one.records) > 1]
    records = [{**record, "AESEQ": 1} if one is outputs[0] else record for one in outputs for record in one.records]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records), encoding="utf-8")
    done = run_here("verify", file, "--dictionary", "toy", "--output", tmp_path / "found.jsonl")
    assert done.returncode == 1
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["row"], one["rule"]) for one in found] == [(2, "AE-SEQ")]
