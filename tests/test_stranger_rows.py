"""Rows as strangers have them: what could be misread without a word is read right, or refused in words."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import make_tokenizer

from toolkit.config.recipe import build_config
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.sources import read_rows
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import load_task
from toolkit.tasks.sample import RowFaultError

ROW = '{"QUESTION": "q?", "LONG_ANSWER": "a"}'
TWICE = '{"QUESTION": "q?", "LONG_ANSWER": "a", "LONG_ANSWER": "b"}'


def load(path: Path, **data: Any) -> Dataset:
    return load_dataset(build_config({"data": {"path": str(path), **data}}, "recipe").data, make_tokenizer(), 0)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("rows.jsonl", f"{ROW}\n{TWICE}\n", "line 2"),
        ("rows.json", f"[{ROW}, {TWICE}]", "row 2"),
        ("rows.json", f'{{"x": {ROW}, "y": {TWICE}}}', "key y"),
        ("rows.json", f'{{"data": [{ROW}, {TWICE}]}}', "row 2"),
        ("rows.json", f"{ROW}{TWICE}", "line 1 value 2"),
    ],
)
def test_a_name_that_a_json_object_has_twice_makes_a_bad_row(
    tmp_path: Path, name: str, content: str, where: str
) -> None:
    (tmp_path / name).write_text(content)
    good, bad = read_rows(str(tmp_path / name))
    assert good.fault is None
    assert bad.fault == "names 'LONG_ANSWER' twice, with different values; keep one of them"
    assert bad.origin == f"{tmp_path / name} {where}"


@pytest.mark.parametrize(
    "content",
    [f'{{"data": [{ROW}], "data": [{ROW}, {ROW}]}}', '{"columns": ["a"], "data": [["b"]], "data": [["c"], ["d"]]}'],
)
def test_two_lists_of_rows_of_one_name_are_not_read_as_the_last_of_them(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    (row,) = read_rows(str(tmp_path / "rows.json"))
    assert row.fault == "names 'data' twice, with different values; keep one of them"


def test_the_same_value_twice_is_one_and_a_name_within_a_message_counts_too(tmp_path: Path) -> None:
    turn = '{"role": "user", "role": "assistant", "content": "c"}'
    lines = [TWICE.replace('"b"', '"a"'), f'{{"messages": [{turn}]}}', '{"\\u0000repeated": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    same, nested, nul = read_rows(str(tmp_path / "rows.jsonl"))
    assert same.values == {"QUESTION": "q?", "LONG_ANSWER": "a"}
    assert nested.fault == "names 'role' twice, with different values; keep one of them"
    assert nul.fault is not None


def test_rows_on_one_line_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(f"{ROW}{ROW} {ROW}\n{ROW}{ROW}")
    origins = [row.origin.removeprefix(f"{tmp_path}/rows.json ") for row in read_rows(str(tmp_path / "rows.json"))]
    assert origins == ["line 1", "line 1 value 2", "line 1 value 3", "line 2", "line 2 value 2"]


def test_an_archive_of_several_formats_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("a.jsonl", ROW)
        archive.writestr("b.csv", "QUESTION,LONG_ANSWER\nq,a\n")
    with pytest.raises(DataError, match=r"several formats \(.csv, .jsonl\).*; unpack it and name one of them$"):
        read_rows(str(tmp_path / "rows.zip"))


def test_options_that_count_from_0_are_not_skipped_as_if_the_others_were_right(tmp_path: Path) -> None:
    rows = [{"question": f"q {n}", "choices": ["w", "x", "y"], "answer": n % 3} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=r"has 0 in answer.*numbers count from 1 here.*\n.*Correct the task$"):
            load(tmp_path / "rows.jsonl", on_bad_row=on_bad_row)
    stated = load(tmp_path / "rows.jsonl", on_bad_row="skip", task={"name": "choice", "first_number": 1})
    assert (len(stated.train), len(stated.skipped)) == (4, 2), "the file is said to count from 1"
    assert len(load(tmp_path / "rows.jsonl", task={"name": "choice", "first_number": 0}).train) == 6


def test_numbers_of_fixed_labels_are_not_learned_as_another_label(tmp_path: Path) -> None:
    rows = [{"question": f"q {n}", "label": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "choice", "output": {"labels": ["negative", "positive"]}, "columns": {"answer": "label"}}
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=r"has 0 in label, a number.*\n.*\n?.*Correct the task$"):
            load(tmp_path / "rows.jsonl", on_bad_row=on_bad_row, task=task)
    assert len(load(tmp_path / "rows.jsonl", task={**task, "first_number": 0}).train) == 6


@pytest.mark.parametrize("number", ["7", "-7"])
def test_a_patient_of_a_table_with_gaps_is_the_same_in_another_file(tmp_path: Path, number: str) -> None:
    (tmp_path / "train.csv").write_text(f"pid,QUESTION,LONG_ANSWER\n{number}.0,q?,a\n8.0,r?,a\n")
    (tmp_path / "test.jsonl").write_text(f'{{"pid": {number}, "QUESTION": "s?", "LONG_ANSWER": "a"}}\n')
    with pytest.raises(DataError, match="1 of 1 test rows have a pid"):
        load(tmp_path / "train.csv", test=str(tmp_path / "test.jsonl"), group_by="pid", validation=None)


WORDS = ["nan", "<NA>", "\\N", "#N/A", "#REF!", "#NAME?", "#VALUE!", "#DIV/0!", "#NULL!", "#NUM!"]


def of_table(path: Path, *rows: dict[str, str]) -> list[Any]:
    """The values of rows, read from a table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [row.values for row in read_rows(str(path))]


@pytest.mark.parametrize("word", [*WORDS, "NA"])
def test_a_word_for_a_missing_value_is_no_context_and_no_answer(tmp_path: Path, word: str) -> None:
    row = {"QUESTION": "q?", "CONTEXTS": word, "LONG_ANSWER": "a"}
    good, bad = of_table(tmp_path / "rows.csv", row, {**row, "LONG_ANSWER": word})
    task = load_task("long_answer")
    assert task.read(good).contexts == ()
    with pytest.raises(RowFaultError, match=rf"has {re.escape(word)} in LONG_ANSWER, as \w+ prints? a missing value"):
        task.read(bad)


def test_an_answer_may_be_such_a_word_where_files_have_nulls_or_the_task_names_it(tmp_path: Path) -> None:
    row = {"QUESTION": "q?", "LONG_ANSWER": "NA"}
    assert load_task("long_answer").read(row).turns[-1].content == "NA"
    rows = of_table(tmp_path / "rows.csv", row, {**row, "LONG_ANSWER": "None"})
    output = {"labels": ["yes", "NA", "None"]}
    decision = {"name": "decision", "output": output, "columns": {"decision": "LONG_ANSWER"}, "leaks": []}
    for task in ({"name": "long_answer", "output": output}, decision):
        assert [load_task(task).read(row).turns[-1].content for row in rows] == ["NA", "None"]
    (row,) = of_table(tmp_path / "rows.csv", {"question": "q", "options": '["yes", "NA"]', "answer": "NA"})
    assert load_task("choice").read(row).label == "B"


@pytest.mark.parametrize("word", ["", *WORDS, "NA", "None", "null", "NULL"])
def test_such_a_word_leaves_a_column_empty_that_may_be_missing(tmp_path: Path, word: str) -> None:
    row = {"instruction": "i", "input": word, "output": "o", "system": word, "history": word}
    (values,) = of_table(tmp_path / "rows.csv", row)
    task = load_task("alpaca")
    assert task.read(values) == task.read({"instruction": "i", "output": "o"})
    turns = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    (values,) = of_table(tmp_path / "rows.csv", {"messages": turns, "tools": word})
    assert load_task("messages").read(values).tools == ()


def test_such_words_are_text_where_files_have_nulls_and_no_options_at_the_end() -> None:
    row = {"instruction": "What does it mean?", "input": "null", "output": "nothing"}
    assert load_task("alpaca").read(row).turns[0].content == "What does it mean?\nnull"
    options = load_task("choice").read({"question": "q", "A": "x", "B": "None", "C": "#N/A", "answer": "A"})
    assert "B. None" in options.question
    assert "C." not in options.question
