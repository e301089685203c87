"""``launch/verify.py``: answers and records of every format, what it finds, and the tables that it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, run_here

NOTE = {
    "NOTE": "어제부터 두통. 구토는 없음",
    "NOTE_DATE": "2026-03-12",
    "STUDYID": "FROST-01",
    "USUBJID": "FROST-01-001",
}
EVENT = {"AETERM": "두통", "AELLT": "두통", "AESER": "N", "AESTDTC": "2026-03-11"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(path: Path, *events: object) -> Path:
    return write(path, [{**NOTE, "ANSWER": json.dumps(one, ensure_ascii=False)} for one in events])


def test_clean_answers_become_records_of_every_format(tmp_path: Path) -> None:
    file = answers(tmp_path / "answers.jsonl", [EVENT], [])
    for ending in ("csv", "xpt", "jsonl"):
        table = tmp_path / f"ae.{ending}"
        done = run_here("verify", file, "--dictionary", "toy", "--records", table)
        assert done.returncode == 0, done.stderr
        assert "2 rows, nothing found" in done.stdout
        assert "For research; not for care." in done.stdout
        again = run_here("verify", table, "--dictionary", "toy", "--notes", write(tmp_path / "notes.jsonl", [NOTE]))
        assert again.returncode == 0, again.stdout + again.stderr
    (record,) = csv.DictReader((tmp_path / "ae.csv").read_text(encoding="utf-8").splitlines())
    assert record["AEDECOD"] == "head pain"
    assert record["AELLTCD"] == "900031"
    assert list(record)[:5] == ["STUDYID", "DOMAIN", "USUBJID", "AESEQ", "AETERM"]


def test_xpt_has_names_labels_and_korean_as_the_library_reads_them(tmp_path: Path) -> None:
    pyreadstat = pytest.importorskip("pyreadstat")
    run_here("verify", answers(tmp_path / "a.jsonl", [EVENT]), "--dictionary", "toy", "--records", tmp_path / "ae.xpt")
    table, meta = pyreadstat.read_xport(str(tmp_path / "ae.xpt"), output_format="dict")
    assert meta.table_name == "AE"
    assert table["AETERM"] == ["두통"]
    assert table["AESEQ"] == [1.0]
    assert meta.column_names_to_labels["AESTDTC"] == "Start Date/Time of Adverse Event"


def test_each_violation_has_row_field_rule_and_value(tmp_path: Path) -> None:
    file = answers(tmp_path / "answers.jsonl", [EVENT], [EVENT | {"AETERM": "구토"}], "no list")
    done = run_here("verify", file, "--output", tmp_path / "found.jsonl")
    assert done.returncode == 1
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["row"], one["field"], one["rule"], one["value"]) for one in found] == [
        (2, "1.AETERM", "AE-NEGATED", "구토"), (3, "", "AE-JSON", '"no list"'),
    ]  # fmt: skip
    assert "row 2, 1.AETERM, AE-NEGATED: found '구토'" in done.stdout
    assert "codes are not checked" in done.stdout


def test_records_under_names_of_cdash_are_checked_and_empty_columns_count(tmp_path: Path) -> None:
    file = tmp_path / "form.csv"
    file.write_text(
        "USUBJID,AETERM,AESTDAT,AEENDAT,AESER,AESHOSP,AEOCCUR\n"
        "1,두통,05-MAR-2026,04-MAR-2026,No,N,\n2,발열,UN-MAR-2026,04-MAR-2026,No,Y,\n",
        encoding="utf-8",
    )
    done = run_here("verify", file)
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("row ")]
    assert [line.split(":")[0] for line in lines] == [
        "row 1, AEOCCUR, CG0040", "row 1, AEENDTC, FB3209", "row 2, AESER, CG0041",
    ]  # fmt: skip


def test_files_that_are_neither_are_refused_and_none_is_overwritten(tmp_path: Path) -> None:
    other = write(tmp_path / "rows.jsonl", [{"QUESTION": "?"}])
    done = run_here("verify", other)
    assert done.returncode == 2
    assert "neither answers nor a column AETERM; it has QUESTION" in done.stderr
    file = answers(tmp_path / "answers.jsonl", [EVENT])
    kept = write(tmp_path / "kept.csv", [])
    assert run_here("verify", file, "--records", kept).returncode == 2
    assert run_here("verify", file, "--records", tmp_path / "ae.sas").returncode == 2
    assert run_here("verify", file, "--records", kept, "--overwrite").returncode == 0
    assert run_here("verify", tmp_path / "nothing.xpt").returncode == 2


def test_the_sample_rows_can_be_verified_themselves() -> None:
    done = run_here("verify", ROOT / "examples/data/clinical/ae_coding.jsonl", "--answer-column", "EVENTS")
    assert done.returncode == 0, done.stdout
