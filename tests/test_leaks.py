"""Columns that give the outcome away are not asked with: leaks of a task file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toolkit.runtime.errors import ConfigError
from toolkit.tasks.choose import load_task
from toolkit.tasks.leaks import leak_in_path
from toolkit.tasks.sample import RowFaultError

LEAKS = ["LONG_ANSWER", "reasoning_*_pred", "stay.disposition"]
TASK: dict[str, Any] = {
    "columns": {"note": "NOTE", "grade": "GRADE"},
    "prompt": "{{ note }}",
    "target": "{{ grade }}",
    "leaks": LEAKS,
}


@pytest.mark.parametrize(
    ("path", "leak"),
    [
        ("LONG_ANSWER", "LONG_ANSWER"),
        (" long answers ", "LONG_ANSWER"),
        ("record.Long-Answer.text", "LONG_ANSWER"),
        ("question, long_answer", "LONG_ANSWER"),
        ("context.reasoning_free_pred", "reasoning_*_pred"),
        ("REASONING_REQUIRED_PREDS", "reasoning_*_pred"),
        ("visits[].stay.disposition", "stay.disposition"),
        ("stay", "stay.disposition"),
        ("LONG_ANSWERED", None),
        ("disposition", None),
        ("stay.days", None),
        ("reasoning", None),
    ],
)
def test_names_match_as_columns_do(path: str, leak: str | None) -> None:
    assert leak_in_path(path, LEAKS) == leak


def changed(**values: Any) -> dict[str, Any]:
    return {**TASK, **values}


ANSWER = {"path": "long answer", "default": ""}
MORE = {**TASK["columns"], "more": ANSWER}
USES: dict[str, tuple[dict[str, Any], str]] = {
    "path": (changed(columns={"note": "LONG_ANSWER", "grade": "GRADE"}), "columns.note reads LONG_ANSWER"),
    "prompt": (changed(columns=MORE, prompt="{{ note }} {{ more }}"), "columns.more reads long answer.*prompt uses"),
    "system": (changed(columns=MORE, system="{{ more }}"), "and system uses it"),
    "turns": (
        {
            "columns": MORE,
            "turns": [
                {"role": "user", "content": "{{ note }}"},
                {"role": "assistant", "content": "{{ more }}"},
                {"role": "user", "content": "grade?"},
                {"role": "assistant", "content": "{{ grade }}"},
            ],
            "leaks": LEAKS,
        },
        r"and turns\.1\.content uses it",
    ),
    "cut": (changed(columns={**MORE, "more": {**ANSWER, "kind": "texts"}}, cut="more"), "and cut uses it"),
    "options": (
        changed(
            columns={**MORE, "more": {**ANSWER, "kind": "options"}, "grade": {"path": "GRADE", "kind": "choice"}},
            prompt="{{ note }}",
        ),
        "and the list of options uses it",
    ),
    "conversation": (
        {"columns": {"talk": {"path": "long_answer", "kind": "messages"}}, "conversation": "talk", "leaks": LEAKS},
        "and conversation uses it",
    ),
    "one of several paths": (
        changed(columns={"note": ["NOTE", "stay.disposition"], "grade": "GRADE"}),
        "columns.note reads stay.disposition",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", USES)
def test_a_task_that_asks_with_a_leaking_column_is_refused_by_name(case: str) -> None:
    values, message = USES[case]
    with pytest.raises(ConfigError, match=message):
        load_task(values)


def test_a_leaking_column_may_be_the_answer() -> None:
    task = load_task(changed(columns={"note": "NOTE", "grade": "LONG_ANSWER"}))
    assert task.read({"NOTE": "n", "LONG_ANSWER": "a"}).answer == "a"


def test_a_mapping_of_the_user_is_refused_and_a_file_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "grade.yaml"
    file.write_text("columns:\n  note: NOTE\n  grade: GRADE\nprompt: '{{ note }}'\ntarget: '{{ grade }}'\n"
                    "leaks: [outcome]\n")  # fmt: skip
    assert load_task(str(file)).spec.leaks == ["outcome"]
    with pytest.raises(ConfigError, match=r"reads Outcomes, which gives the outcome away \(leaks has it as outcome\)"):
        load_task({"extends": str(file), "columns": {"note": "Outcomes"}})
    assert load_task({"extends": str(file), "columns": {"note": "Outcomes"}, "leaks": []}).spec.leaks == []
    file.write_text(file.read_text().replace("note: NOTE", "note: day.outcome"))
    with pytest.raises(ConfigError, match=r"line 2: columns\.note reads day\.outcome"):
        load_task(str(file))


def test_an_object_that_holds_a_leaking_column_is_a_bad_row() -> None:
    columns = {"note": {"path": "record", "kind": "any"}, "grade": "GRADE"}
    task = load_task(changed(columns=columns, prompt="{{ note | tojson }}"))
    assert task.read({"record": {"text": "n"}, "GRADE": "2"}).question == '{"text": "n"}'
    for record in ({"long_answer": "a"}, {"days": [{"reasoning_free_pred": "yes"}]}, {"stay": {"Disposition": "home"}}):
        with pytest.raises(RowFaultError, match=r"has record\..*, which gives the outcome away .leaks of the task"):
            task.read({"record": record, "GRADE": "2"})
