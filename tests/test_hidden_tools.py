"""Tools that a row declares and the chat template does not show are said, once, with the number of such rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import CHAT_TEMPLATE, make_tokenizer

import toolkit
from toolkit.config.schema import DataConfig
from toolkit.data.dataset import load_dataset

SHOWS = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHAT_TEMPLATE
SHOWS_ONE = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + CHAT_TEMPLATE
REFUSES = (
    "{% for tool in tools or [] %}{% if tool.function.name == 'frostline_trial' %}"
    "{{ raise_exception('unknown') }}{% endif %}{{ tool.function.name }}{% endfor %}" + CHAT_TEMPLATE
)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("dose", "fever")]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three rows with tools, whose names stand in the question as well, and one without."""
    turns = [{"role": "user", "content": "dose or fever?"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": turns, "tools": tools} for tools in (None, TOOLS, json.dumps(TOOLS), TOOLS[:1])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def load(rows: Path, template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return load_dataset(DataConfig(path=str(rows)), tokenizer, 0)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_rows_whose_tools_are_not_shown_are_counted_at_every_start(
    rows: Path, template: str | None, said: list[str]
) -> None:
    for _ in ("tokenised", "found in the store"):
        said.clear()
        load(rows, template)
        (warning,) = [line for line in said if "tools that" in line]
        assert warning == (
            f"3 rows declare tools that the chat template does not show (first: {rows} line 2); they have no effect. "
            "Name in data.chat_template one that shows tools, or leave the column out"
        )


def test_a_tool_that_is_left_out_is_said_and_tools_that_are_shown_are_not(rows: Path, said: list[str]) -> None:
    for template in (SHOWS, REFUSES):
        load(rows, template)
    assert not [line for line in said if "tools that" in line]
    turns = [{"role": "user", "content": "how much?"}, {"role": "assistant", "content": "a"}]
    rows.write_text(json.dumps({"messages": turns, "tools": TOOLS}) + "\n")
    load(rows, SHOWS_ONE)
    assert [line for line in said if line.startswith("1 row declares tools that the chat template does not show")]


def test_the_check_of_data_and_answers_say_it_too(rows: Path, tiny_model: Path, said: list[str]) -> None:
    report = toolkit.data_check(None, {"model.name_or_path": str(tiny_model), "data.path": str(rows)})
    assert [note for note in report.notes if note.startswith("3 rows declare tools")]
    questions = [{"messages": [{"role": "user", "content": "why?"}], "tools": TOOLS}] * 2
    said.clear()
    assert len(toolkit.generate(tiny_model, questions, max_new_tokens=1)) == 2
    assert len([line for line in said if "does not show the tools of question 'why?'" in line]) == 1


def test_a_model_without_a_chat_template_is_said(rows: Path, said: list[str]) -> None:
    for template, times in ((None, 1), (CHAT_TEMPLATE, 0)):
        said.clear()
        load(rows, template)
        assert len([line for line in said if "the model has no chat template: turns are joined" in line]) == times
