"""What is wrong with a row, a mapping or an entry, each said in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import make_tokenizer

from toolkit.config.schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.dataset import load_dataset
from toolkit.data.questions import from_prompt, questions_of
from toolkit.data.sources import Row
from toolkit.runtime.errors import DataError, UsageError
from toolkit.tasks.choose import load_task
from toolkit.tasks.sample import RowFaultError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(**function: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]


ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "call of no name": ("messages", {"messages": call(arguments={})}, "has a tool call without a name in messages 2"),
    "arguments of a call": ("messages", {"messages": call(name="f", arguments="{")}, "that are not JSON"),
    "function_call": ("sharegpt", {"conversations": [{"from": "human", "value": "q"},
                      {"from": "function_call", "value": "f(x)"}]}, "has a function_call in .* that is not"),
    "content": ("messages", {"messages": [{"role": "user", "content": 3}, ANSWER]}, "has a int as content of"),
    "no role": ("messages", {"messages": [{"content": "q"}]}, "has no role or from in messages 1; it has content"),
    "no message": ("messages", {"messages": ["q"]}, "has a str as messages 1; expected a message"),
    "function_call of no name": ("messages", {"messages": [USER, {**ANSWER, "function_call": {"arguments": "{}"}}]},
                                 "has a tool call without a name in messages 2"),
    "no list": ("messages", {"messages": "hello"}, "has a str in messages; expected a list of messages"),
    "cut off": ("messages", {"messages": "[{'role': 'user', 'content': 'q'}, {'role"}, "list that .* was cut"),
    "empty turn": ("messages", {"messages": [{"role": "user", "content": " "}, ANSWER]}, "has an empty content"),
    "tools": ("messages", {"messages": [USER, ANSWER], "tools": "f"}, "has no list of functions in tools"),
    "pairs": ("alpaca", {"instruction": "i", "output": "o", "history": [["a"]]}, "has no pairs in history"),
    "one option": ("choice", {"question": "q", "choices": ["x"], "answer": 1}, "has 1 options; expected two or more"),
    "options": ("choice", {"question": "q", "options": 3, "answer": 1}, "has a int in options; expected a list"),
    "a gap": ("choice", {"question": "q", "A": "x", "B": None, "C": "y", "answer": "C"}, "no option B, and has C"),
    "a gap of letters": ("choice", {"question": "q", "options": {"A": "x", "C": "y"}, "answer": 1},
                         r"no option options\.B, and has options\.C after it"),
    "objects": ("choice", {"question": "q", "options": [{"key": "A", "value": "x"}], "answer": 1},
                r"has objects in options; name .* as in options\[\]\.text"),
    "number or text": ("choice", {"question": "q", "choices": ["2", "1"], "answer": "1"},
                       "has 1 in answer, which is the number of one option and the text of another; state first_n"),
    "letter or text": ("choice", {"question": "q", "choices": ["O", "A", "B"], "answer": "B"},
                       "has B in answer, which is the letter of one option and the text of another"),
    "twice": ("choice", {"question": "q", "choices": ["x", "x", "y"], "answer": "x"}, "is the text of 2 options"),
    "messages as prompt": ("alpaca", {"instruction": [USER], "output": [ANSWER]},
                           "has messages in instruction; expected text. Join all of a row's messages"),
    "no answer": ("choice", {"question": "q", "choices": ["x", "y"], "answer": None}, "has no answer in answer"),
    "empty target": ({"columns": {"a": "a", "b": {"path": "b", "optional": True}}, "prompt": "{{ a }}",
                      "target": "{{ b }}"}, {"a": "q"}, "has an empty answer"),
    "label": ({"columns": {"a": "a", "b": "b"}, "prompt": "{{ a }}", "target": "{{ b }}",
               "output": {"labels": ["x", "y"]}}, {"a": "q", "b": "z"}, "has the answer 'z'; expected one of x, y"),
}  # fmt: skip


CONTEXTS = {"name": "long_answer", "columns": {"contexts": "passages[].text"}}
for name, passages, message in (
    (
        "key within a list",
        [{"body": "c"}],
        r"has nothing at passages\[\].text: passages has an object with body; correct",
    ),
    ("text for a list", "c", r"has nothing at passages\[\].text: passages has a str; correct the path"),
):
    ROWS[name] = (CONTEXTS, {"QUESTION": "q", "LONG_ANSWER": "a", "passages": passages}, message)
ROWS["key within an object"] = (
    {"name": "long_answer", "columns": {"contexts": "context.texts"}},
    {"QUESTION": "q", "LONG_ANSWER": "a", "context": {"contexts": ["c"]}},
    "has nothing at context.texts: context has an object with contexts; correct the path",
)


@pytest.mark.parametrize("fault", ROWS)
def test_a_row_that_cannot_be_used_says_why(fault: str) -> None:
    task, row, message = ROWS[fault]
    with pytest.raises(RowFaultError, match=message):
        load_task(task).read(row)


SETTINGS: dict[str, tuple[Any, str]] = {
    "an unknown name": ({"name": "longanswer"}, r"name is longanswer, which is no task \(did you mean long_answer\?\)"),
    "a column of no use": (
        {"name": "long_answer", "columns": {"question": "q", "context": "c"}},
        r"columns has context, which the task does not use \(did you mean contexts\?\); it uses",
    ),
    "labels of YAML": (
        {"name": "choice", "output": {"labels": [True, "maybe"]}},
        r"1 fault in the data.task of the recipe:\s+- output.labels.0 is true, as YAML reads yes, no, on and off; put",
    ),
    "columns": ({"name": "alpaca", "columns": ["q"]}, r"columns is \['q'\]; expected names with their paths"),
    "extends": ({"extends": 3, "columns": {}}, "extends is 3; expected the name of a task, or its file"),
    "labels": ({"name": "choice", "output": {"labels": ["x"]}}, "the same one twice, or fewer than two"),
    "output": ({"name": "choice", "output": {}}, "expected labels"),
    "two forms": (
        {"columns": {"a": "a"}, "text": "{{ a }}", "prompt": "{{ a }}", "target": "x"},
        "it has text and prompt",
    ),
    "last turn": ({"columns": {"a": "a"}, "turns": [{"role": "user", "content": "x"}]}, "expected the answer last"),
    "no column": ({"columns": {"a": "a"}, "text": "{{ a }}", "cut": "b"}, "cut is b, which is no column"),
    "schema": (
        {"name": "alpaca", "output": {"schema": "nowhere.json"}},
        "schema is nowhere.json, which cannot be read",
    ),
    "dataset_info": (
        {"dataset_info": "nowhere.json", "name": "x"},
        "data.task names nowhere.json, which cannot be read",
    ),
    "more keys": ({"dataset_info": "x", "columns": {}}, "has dataset_info and columns; expected dataset_info and name"),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_a_setting_that_cannot_be_used_says_why(fault: str) -> None:
    task, message = SETTINGS[fault]
    with pytest.raises(UsageError, match=message):
        load_task(task)


@pytest.mark.parametrize(("content", "message"), [("[1]", "holds a list"), ('{"x": 3}', "the entry x is no mapping")])
def test_an_odd_dataset_info_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_task({"dataset_info": str(tmp_path / "info.json"), "name": "x"})
    (tmp_path / "info.json").write_text("[1]")
    with pytest.raises(DataError, match="holds a list; expected a JSON schema"):
        load_task({"name": "alpaca", "output": {"schema": str(tmp_path / "info.json")}})
    (tmp_path / "info.json").write_text('{"type": "nothing"}')
    task = load_task({"name": "alpaca", "output": {"schema": str(tmp_path / "info.json")}})
    with pytest.raises(UsageError, match="the task's schema is no JSON schema"):
        task.read({"instruction": "i", "output": "{}"})


def test_a_question_alone_that_a_task_cannot_ask_is_refused_and_so_are_rows_of_none() -> None:
    data = DataConfig(task="choice")
    with pytest.raises(DataError, match=r"a question alone has 0 options.* \(task choice\); give rows with --input"):
        from_prompt("why?", [], data, Rendering())
    with pytest.raises(DataError, match="1 rows cannot be answered:\n  - question 1 has an empty prompt"):
        questions_of([Row("question 1", {"prompt": ""})], DataConfig())
    assert from_prompt("why?", [], DataConfig(), Rendering(task="text")).is_text


def test_rows_and_held_out_rows_may_be_of_different_tasks(tmp_path: Path) -> None:
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    pairs.write_text(json.dumps({"prompt": "other", "completion": "x"}) + "\n")
    dataset = load_dataset(DataConfig(path=str(chats), validation=str(pairs)), make_tokenizer(), 1)
    assert (len(dataset.train), len(dataset.validation), dataset.task) == (1, 1, "messages")


def test_each_source_that_is_read_by_another_task_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts, turns, asked = (tmp_path / f"{name}.jsonl" for name in ("texts", "turns", "asked"))
    texts.write_text('{"text": "The lung has five lobes."}\n')
    turns.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    asked.write_text('{"QUESTION": "why", "LONG_ANSWER": "a"}\n')
    data = DataConfig(path=[str(texts), str(turns)], validation=str(asked))
    with caplog.at_level("INFO", "frostline"):
        assert len(load_dataset(data, make_tokenizer(), 0).train) == 2
    said = [line for line in caplog.messages if line.startswith("data.task: auto takes")]
    assert [line.split("; ")[-1] for line in said] == [
        "columns: text", "columns: messages", "columns: QUESTION, LONG_ANSWER",
    ]  # fmt: skip
    assert f"auto takes long_answer for {asked}" in said[2]


@pytest.mark.parametrize("row", [{}, {"passages": []}, {"passages": None}, {"passages": ""}])
def test_contexts_within_a_list_may_be_missing_with_the_list(row: dict[str, Any]) -> None:
    assert load_task(CONTEXTS).read({"QUESTION": "q", "LONG_ANSWER": "a", **row}).contexts == ()


def test_plain_text_that_is_no_question_to_a_model_of_conversations_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Row("q.txt line 1", {"text": "What is flu?"})]
    for task in ("messages", "text", None):
        assert questions_of(rows, DataConfig(), Rendering(task=task))[0].is_text
    assert [record.levelname for record in caplog.records].count("WARNING") == 2
    assert "the rows have text alone, which is continued as it is" in caplog.text
