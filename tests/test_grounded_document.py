"""Grounded documents from rows to files: train, evaluate, generate with passages, write; and rows from case files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, run_here, tiny_flags, train

from toolkit.clinical.case_files import read_case, soap_sections
from toolkit.commands import document
from toolkit.retrieval.passages import passages_of
from toolkit.runtime.errors import DataError, UsageError

SAMPLES = ROOT / "examples" / "data" / "clinical" / "grounded_document_en.jsonl"
CORPUS = ROOT / "examples" / "data" / "corpus"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An English corpus, and rows that are short enough for the tiny model."""
    folder = tmp_path_factory.mktemp("grounded")
    (folder / "corpus").mkdir()
    for name in ("ae_reporting_en.md", "deviation_en.md"):
        shutil.copy(CORPUS / name, folder / "corpus")
    lines = sorted(SAMPLES.read_text(encoding="utf-8").splitlines(), key=len)[:6]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_run_from_rows_to_documents(folder: Path, tiny_model: Path) -> None:
    run, answers = folder / "run", folder / "answers.jsonl"
    retrieval = f"{{corpus: {folder / 'corpus'}, passages: 1, as_of: NOTE_DATE}}"
    train(*tiny_flags(
        tiny_model, run, "--data.path", folder / "rows.jsonl", "--data.task", "grounded_document",
        "--data.retrieval", retrieval, "--data.max_length", 512, "--train.max_steps", 2, "--data.validation", "0.34",
    ))  # fmt: skip
    evaluated = run_here("evaluate.py", run, "--output", folder / "scores.json")
    assert evaluated.returncode == 0, evaluated.stderr
    answered = run_here(
        "generate.py", run, "--input", folder / "rows.jsonl", "--output", answers, "--max-new-tokens", 8, "--limit", 2
    )
    assert answered.returncode == 0, answered.stderr
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [len(passages_of(row["PASSAGES"])) for row in rows] == [1, 1]
    written = run_here("document.py", answers, "--output", folder / "documents")
    assert written.returncode == 0, written.stderr
    assert "citations beside the references': precision" in written.stdout
    assert "For research; not for care." in written.stdout
    assert sorted(path.name for path in (folder / "documents").iterdir()) == [
        "document-1.docx", "document-1.md", "document-2.docx", "document-2.md",
    ]  # fmt: skip
    again = run_here("document.py", answers, "--output", folder / "documents")
    assert again.returncode == 2
    assert "exists; name another place, or --overwrite" in again.stderr
    (folder / "corpus" / "deviation_en.md").unlink()
    shutil.rmtree(folder / "corpus")
    gone = run_here("generate.py", run, "--input", folder / "rows.jsonl", "--limit", 1)
    assert gone.returncode == 2
    assert "data.retrieval.corpus is" in gone.stderr


def test_rows_without_passages_need_retrieval(folder: Path, tiny_model: Path) -> None:
    flags = tiny_flags(
        tiny_model, folder / "no", "--data.path", folder / "rows.jsonl", "--data.task", "grounded_document"
    )
    refused = run_here("train.py", *flags)
    assert refused.returncode == 2
    assert "task grounded_document needs the column PASSAGES" in refused.stderr
    assert "data.retrieval adds passages, as in data.retrieval: {corpus: DIR}" in refused.stderr


SOAP = "S: 속이 울렁거림\n어제부터\nO: 혈압 120/80\nA) 오심\nP. 경과 관찰"


def test_a_note_is_read_with_its_soap_sections(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SOAP)
    row = read_case(tmp_path / "a.txt")
    assert row["NOTE"] == SOAP
    assert (row["SUBJECTIVE"], row["OBJECTIVE"]) == ("속이 울렁거림\n어제부터", "혈압 120/80")
    assert (row["ASSESSMENT"], row["PLAN"]) == ("오심", "경과 관찰")
    assert soap_sections("그냥 적은 기록") == {}


BUNDLE = {
    "resourceType": "Bundle",
    "type": "collection",
    "entry": [
        {"resource": {"resourceType": "Patient", "name": [{"family": "Kim"}], "birthDate": "1960-01-01"}},
        {"resource": {
            "resourceType": "Condition", "code": {"text": "hypertension"}, "subject": {"reference": "Patient/1"},
            "clinicalStatus": {"coding": [{"code": "active"}]}, "onsetDateTime": "2020-05-01"}},
        {"resource": {
            "resourceType": "Observation", "status": "final", "code": {"text": "ALT"},
            "effectiveDateTime": "2026-04-02", "valueQuantity": {"value": 168, "unit": "U/L"}}},
        {"resource": {
            "resourceType": "AdverseEvent", "status": "completed", "actuality": "actual", "code": {"text": "nausea"},
            "subject": {"reference": "Patient/1"}, "occurrenceDateTime": "2026-04-01",
            "seriousness": {"text": "Non-serious"}}},
    ],
}  # fmt: skip


def test_a_fhir_bundle_becomes_a_row_without_the_patient(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(BUNDLE))
    row = read_case(tmp_path / "b.json")
    assert "Kim" not in row["NOTE"]
    assert "1960" not in row["NOTE"]
    assert "Observation: ALT; 2026-04-02; 168 U/L" in row["NOTE"].replace("168.0", "168")
    assert row["AE"] == [{"AETERM": "nausea", "AESTDTC": "2026-04-01", "AESER": "N"}]
    assert row["NOTE_DATE"] == "2026-04-02"
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match="is no FHIR bundle"):
        read_case(tmp_path / "c.json")
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_case(tmp_path / "d.txt")


def test_case_files_become_rows(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.txt").write_text(SOAP)
    words = [str(tmp_path / "a.txt"), "--rows", str(tmp_path / "rows.jsonl")]
    assert document.main([*words, "--type", "site_letter"]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert (row["LANGUAGE"], row["DOCUMENT_TYPE"], row["PLAN"]) == ("ko", "site_letter", "경과 관찰")
    assert "1 rows" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exists; name another place"):
        document.main(words)
    with pytest.raises(SystemExit):
        document.main([*words, "--format", "md"])
