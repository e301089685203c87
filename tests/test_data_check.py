"""What is planted in 60 Korean rows is found, nothing in the clean sample, and no report shows an identifier."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import CHAT_TEMPLATE, ENGLISH, KOREAN, ROOT, run_here

import toolkit
from toolkit.data.check.page import page
from toolkit.data.check.report import CheckReport
from toolkit.data.check.table import table
from toolkit.data.check.translation import marks_of, translations

PLANTED = ROOT / "tests" / "planted_ko.jsonl"
TEST_SET = ROOT / "tests" / "planted_test_set.json"


def check(
    model: Path, path: Path | list[Any], *, against: tuple[Path, ...] = (), ids: Path | None = None, **data: Any
) -> CheckReport:
    named = path if isinstance(path, list) else str(path)
    values = {"model.name_or_path": str(model), "data.path": named, "data.validation": None}
    values |= {f"data.{key}": value for key, value in data.items()}
    return toolkit.data_check(None, values, against=against, test_ids=ids)


def line(origin: str) -> int:
    return int(origin.split()[-1])


@pytest.fixture(scope="module")
def report(tiny_model: Path) -> CheckReport:
    return check(tiny_model, PLANTED, against=(TEST_SET,), identifier_patterns=[r"SNU-Q\d{4}"])


def test_every_planted_duplicate_is_found_and_no_other(report: CheckReport) -> None:
    assert {(line(match.row), line(match.other), match.kind) for match in report.duplicates} == {
        (25, 3, "same row"), (26, 2, "same row"), (27, 16, "near-duplicate"),
    }  # fmt: skip


def test_every_planted_leak_is_found_and_no_other(report: CheckReport) -> None:
    assert {(line(match.row), line(match.other), match.kind) for match in report.leaks} == {
        (51, 103, "same question"), (52, 104, "near-duplicate"), (53, 100, "translation"),
    }  # fmt: skip
    (overlap,) = report.comparisons
    assert overlap.verdict == "3 of 5 rows are in the data: no score on this set may be called official"


def test_every_planted_identifier_is_found_and_no_other(report: CheckReport) -> None:
    assert Counter((line(place.row), place.kind) for place in report.identifiers) == Counter(
        [
            (28, "RESIDENT_NUMBER"), (29, "RESIDENT_NUMBER"), (30, "FOREIGN_NUMBER"), (31, "PASSPORT"),
            (32, "PASSPORT"), (33, "DRIVING_LICENCE"), (34, "PHONE"), (35, "PHONE"), (35, "PHONE"), (36, "PHONE"),
            (36, "PHONE"), (37, "EMAIL"), (38, "CARD"), (39, "ACCOUNT"), (40, "HOSPITAL_NUMBER"), (41, "IDENTIFIER"),
            (42, "PHONE"),
        ]
    )  # fmt: skip
    first = report.identifiers[0]
    row = json.loads(PLANTED.read_text(encoding="utf-8").splitlines()[27])
    assert (first.column, row["CONTEXTS"][0][first.start : first.end]) == ("CONTEXTS.0", "000101-3000000")


def test_every_planted_odd_answer_is_found_and_no_other(report: CheckReport) -> None:
    assert {line(odd.row): odd.what for odd in report.odd_answers} == {
        43: "is a placeholder", 44: "refuses, or speaks as an AI model", 45: "repeats the question",
        47: "holds HTML", 48: "repeats itself three times over",
        49: "holds characters of a wrong decoding",
    }  # fmt: skip
    assert [(line(bad.row), "invisible" in bad.what or bad.what) for bad in report.bad_rows] == [(46, True)]
    assert [line(row) for row in report.not_nfc] == [50]


def test_the_clean_sample_has_no_finding(tiny_model: Path) -> None:
    clean = check(tiny_model, KOREAN, validation=0.2, test=0.2, against=(TEST_SET, ENGLISH))
    found = (
        clean.duplicates,
        clean.leaks,
        clean.odd_answers,
        clean.identifiers,
        clean.not_nfc,
        clean.bad_rows,
        clean.cut,
    )
    assert not any(found)
    assert clean.rows == {"train": 38, "validation": 13, "test": 13}
    assert clean.languages is not None
    assert set(clean.languages["answers"]) == {"ko"}
    assert "none of 5 rows was found" in clean.comparisons[0].verdict


def test_test_ids_choose_the_rows_of_the_set(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text('{"101": "yes", "102": "no", "100": "no"}')
    report = check(tiny_model, PLANTED, against=(TEST_SET,), ids=tmp_path / "ids.json")
    assert (report.comparisons[0].rows, [match.kind for match in report.leaks]) == (3, ["translation"])
    (tmp_path / "other.json").write_text('["7"]')
    refused = run_here("data_check.py", "--against", TEST_SET, "--test-ids", tmp_path / "other.json")
    assert (refused.returncode, "has no row with a key of" in refused.stderr) == (2, True)


def test_of_many_copies_each_is_paired_with_the_first(tiny_model: Path, tmp_path: Path) -> None:
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "copies.jsonl").write_text("\n".join(rows * 5))
    pairs = [(line(match.row), line(match.other)) for match in check(tiny_model, tmp_path / "copies.jsonl").duplicates]
    assert sorted(pairs) == [(copy, (copy - 1) % 3 + 1) for copy in range(4, 16)]


def test_leaks_between_the_parts_of_one_file_are_found(tiny_model: Path, tmp_path: Path) -> None:
    rows = KOREAN.read_text(encoding="utf-8").splitlines()
    (tmp_path / "validation.jsonl").write_text("\n".join([rows[4], *ENGLISH.read_text(encoding="utf-8").splitlines()]))
    report = check(tiny_model, KOREAN, validation=str(tmp_path / "validation.jsonl"))
    (leak,) = report.leaks
    assert (leak.kind, leak.part, line(leak.row), leak.other_part, line(leak.other)) == (
        "same row", "validation", 1, "train", 5,
    )  # fmt: skip


def test_a_split_that_is_impossible_and_bad_rows_are_part_of_the_report(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ENGLISH.read_text(encoding="utf-8") + '{"QUESTION": "no answer"}\n')
    report = check(tiny_model, tmp_path / "rows.jsonl", validation=0.2, group_by="patient")
    assert [line(bad.row) for bad in report.bad_rows] == [21]
    assert "the rows cannot be divided: data.group_by is 'patient', and 20 of 20 rows" in report.notes[0]


def test_rows_none_of_which_can_be_used_are_all_listed(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "A": "x", "B": "y", "answer": "없음"}) + "\n")
    done = run_here("launch/data_check.py", "--model.name_or_path", tiny_model, "--data.path", path,
                    "--data.validation", "none", "--html", tmp_path / "check.html")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "none; 1 cannot be used" in done.stdout
    assert "has '없음' in answer; expected a number" in done.stdout
    assert "example" not in done.stdout


def test_each_source_is_read_by_its_own_task_as_in_training(tiny_model: Path, tmp_path: Path) -> None:
    texts, questions, turns = (tmp_path / name for name in ("texts.jsonl", "questions.jsonl", "turns.jsonl"))
    texts.write_text('{"text": "The lung has five lobes."}\n')
    questions.write_text('{"QUESTION": "왜?", "LONG_ANSWER": "그래서."}\n')
    turns.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    values = {"model.name_or_path": str(tiny_model), "data.path": [str(texts), str(questions)],
              "data.validation": str(turns)}  # fmt: skip
    report = toolkit.data_check(None, values)
    assert (report.bad_rows, report.rows["train"], report.rows["validation"]) == ([], 2, 1)


def test_plain_text_and_tool_calls_are_no_empty_answers(tiny_model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The lung has five lobes."}\n{"text": "..."}\n')
    (odd,) = check(tiny_model, texts).odd_answers
    assert (line(odd.row), odd.what) == (2, "has no letter and no digit")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    path, template = tmp_path / "calls.jsonl", tmp_path / "template.jinja"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, call]}) + "\n")
    shown = "{{ m['content'] }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    template.write_text(CHAT_TEMPLATE.replace("{{ m['content'] }}", shown))
    report = check(tiny_model, path, chat_template=str(template))
    assert (report.bad_rows, report.odd_answers) == ([], [])


def test_no_report_shows_an_identifier(report: CheckReport) -> None:
    texts = table(report), page(report), json.dumps(report.as_dict(), ensure_ascii=False)
    for text in texts:
        for secret in ("000101-", "000A", "010-0000", "nobody@", "4000-0000", "SNU-Q0"):
            assert secret not in text
        assert "names and addresses are not found" in text or text is texts[2]


def test_no_report_shows_a_key_or_column_that_identifies_somebody(tiny_model: Path, tmp_path: Path) -> None:
    row = {"QUESTION": "why?", "CONTEXTS": [], "LONG_ANSWER": "because of it", "by": {"010-0000-0000": "A0000"}}
    keyed = {"000101-3000000": row, "SNU-Q0000": row, "000102-3000000": {"QUESTION": "why?", "LONG_ANSWER": ""}}
    path = tmp_path / "keyed.json"
    path.write_text(json.dumps(keyed))
    found = check(tiny_model, path, against=(path,), identifier_patterns=[r"SNU-Q\d{4}", r"A\d{4}"])
    assert (len(found.duplicates), len(found.bad_rows), len(found.identifiers)) == (1, 1, 2)
    for text in (json.dumps(found.as_dict(), ensure_ascii=False), page(found), "\n".join(table(found))):
        assert "0000" not in text.replace(str(tmp_path), "")


def test_the_rendered_example_is_masked_and_marks_what_is_supervised(tiny_model: Path, tmp_path: Path) -> None:
    row = json.loads(PLANTED.read_text(encoding="utf-8").splitlines()[33])
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    report = check(tiny_model, tmp_path / "row.jsonl")
    assert "[PHONE]" in "".join(text for text, _ in report.example)
    supervised = "".join(text for text, on in report.example if on)
    assert supervised == row["LONG_ANSWER"] + "<|end|>"
    assert f"«{row['LONG_ANSWER']}" in table(report)


def test_the_example_is_rendered_by_the_template_switches_and_control_tokens_of_the_recipe(
    tiny_model: Path, tmp_path: Path
) -> None:
    path, template = tmp_path / "rows.jsonl", tmp_path / "template.jinja"
    path.write_text(json.dumps({"QUESTION": "왜<|end|>?", "LONG_ANSWER": "그래서"}) + "\n")
    own_roles = CHAT_TEMPLATE.replace("m['role'] }}|>", "m['role'] }}|>:").replace("<|assistant|>", "<|assistant|>:")
    template.write_text("{% if brief is defined %}[{{ brief }}]{% endif %}" + own_roles)
    plain, own = check(tiny_model, path), check(tiny_model, path, chat_template=str(template))
    switched = check(tiny_model, path, chat_template=str(template), template_kwargs={"brief": "yes"})
    shown = ["".join(text for text, _ in report.example) for report in (plain, own, switched)]
    assert "<|assistant|>:" not in shown[0]
    assert "<|assistant|>:" in shown[1]
    assert shown[2] == "[yes]" + shown[1]
    parsed = check(tiny_model, path, special_tokens="parse")
    assert parsed.lengths["train"].longest < plain.lengths["train"].longest  # the mark is one token


def test_the_page_is_whole_and_needs_nothing_else(report: CheckReport) -> None:
    text, opened = page(report), []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "link"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Tags().feed(text)
    assert opened == []
    for outside in ("<script", "http:", "https:", "<link", "src=", "url("):
        assert outside not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_text_of_a_row_cannot_become_markup_of_the_page(tiny_model: Path, tmp_path: Path) -> None:
    row = {"QUESTION": "<script>alert(1)</script>?", "CONTEXTS": [], "LONG_ANSWER": "</div><b>no</b>"}
    (tmp_path / "<b>.jsonl").write_text(json.dumps(row))
    text = page(check(tiny_model, tmp_path / "<b>.jsonl"))
    assert "<script" not in text
    assert "<b>no" not in text


def test_the_command_writes_json_and_html_and_leaves_the_data_alone(tiny_model: Path, tmp_path: Path) -> None:
    before = PLANTED.read_bytes()
    words = ("--data.path", PLANTED, "--data.validation", "none", "--model.name_or_path", tiny_model)
    done = run_here(
        "data_check.py", *words, "--json", tmp_path / "new" / "a.json", "--html", tmp_path / "new" / "a.html"
    )
    assert done.returncode == 0, done.stderr
    assert "personal  16 identifiers: 2 RESIDENT_NUMBER" in done.stdout
    assert json.loads((tmp_path / "new" / "a.json").read_text())["rows"]["train"] == 59
    assert (tmp_path / "new" / "a.html").read_text().startswith("<!doctype html>")
    assert PLANTED.read_bytes() == before
    assert run_here("data_check.py", "--test-ids", "x.json").returncode == 2


def test_without_py3langid_the_report_says_that_languages_were_not_looked_at(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.data.check.check.can_tell_languages", lambda: False)
    assert "pip install 'frostline[check]'" in table(check(tiny_model, ENGLISH))
    assert "pip install &#x27;frostline[check]&#x27;" in page(check(tiny_model, ENGLISH))


def test_marks_survive_a_translation_in_one_spelling() -> None:
    english = marks_of("In 1,234 adults HbA1c fell by 0.5% (95% CI 0.2-0.8) with 20 mg; MRIs and IL-6 (p = 0.03).")
    korean = marks_of(
        "성인 1234명에서 HbA1c가 0.5 % 낮아졌고(95% CI 0.2~0.8) 20mg을 썼으며, MRI와 IL6를 보았다 (p=0.03)."
    )
    assert english == korean
    assert "20mg" in english


def test_texts_with_few_marks_are_not_taken_for_translations() -> None:
    assert list(translations(["CT 한 번"] * 3, ["one CT", "two MRI", "no"])) == []


def test_the_script_prints_help_as_a_file() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "data_check.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--against FILE [FILE ...]" in done.stdout
