"""Rows of every shipped task, files of one's own, and what is said where rows and task do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from toolkit.config.schema import DataConfig
from toolkit.data.questions import questions_of
from toolkit.data.sources import Row
from toolkit.runtime.errors import ConfigError, DataError
from toolkit.tasks.choose import SHIPPED, choose_task, columns_of, load_task, recognise_task, task_for_questions
from toolkit.tasks.sample import RowFaultError, Sample

QA = {"QUESTION": "왜 열이 나는가?", "CONTEXTS": ["감염은 열을 낸다.", "둘째."], "LONG_ANSWER": "감염 때문이다."}
NESTED = {"pubid": 1, "question": QA["QUESTION"], "context": {"contexts": QA["CONTEXTS"], "labels": ["A"]},
          "long_answer": QA["LONG_ANSWER"], "final_decision": "yes"}  # fmt: skip
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
KORMED = {
    "subject": "doctor",
    "year": 2022,
    "question": "무엇인가?",
    "A": "가",
    "B": "나",
    "C": "다",
    "answer": 2,
    "cot": "",
}


def read(row: dict[str, Any], task: Any = "auto", **data: Any) -> Sample:
    return choose_task(DataConfig(task=task, **data), list(row)).read(row)


def said(sample: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in sample.turns]


ASKED = "감염은 열을 낸다.\n\n둘째.\n\n왜 열이 나는가?"
FORMS: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "PubMedQA": ("long_answer", QA, [("user", ASKED), ("assistant", QA["LONG_ANSWER"])]),
    "qiaojin/PubMedQA": ("long_answer", NESTED, [("user", ASKED), ("assistant", QA["LONG_ANSWER"])]),
    "question and answer": ("long_answer", {"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
    "openai": ("messages", {"messages": MESSAGES}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
    "openai in a table": ("messages", {"messages": json.dumps(MESSAGES)},
                          [("system", "s"), ("user", "q"), ("assistant", "a")]),
    "openai with its system prompt apart": ("messages", {"messages": MESSAGES[1:], "system": "s"},
                                            [("system", "s"), ("user", "q"), ("assistant", "a")]),
    "sharegpt": ("sharegpt", {"conversations": SHARE, "system": "s"},
                 [("system", "s"), ("user", "q"), ("assistant", "a")]),
    "exchanges of ms-swift": ("sharegpt", {"conversation": [{"human": "q", "assistant": "a"}], "system": "s"},
                              [("system", "s"), ("user", "q"), ("assistant", "a")]),
    "alpaca": ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, [("user", "i\nx"), ("assistant", "o")]),
    "alpaca without input": ("alpaca", {"instruction": "i", "input": "", "output": "o"},
                             [("user", "i"), ("assistant", "o")]),
    "alpaca with history": ("alpaca", {"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]},
                            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "i"), ("assistant", "o")]),
    "prompt and completion": ("prompt_completion", {"prompt": "p", "completion": "c"},
                              [("user", "p"), ("assistant", "c")]),
    "text": ("text", {"text": " as it is\n"}, [("text", " as it is\n")]),
    "KorMedMCQA": ("choice", KORMED, [("user", "무엇인가?\n\nA. 가\nB. 나\nC. 다"), ("assistant", "B")]),
    "options in a list": ("choice", {"question": "q", "choices": ["x", "y"], "answer": "B"},
                          [("user", "q\n\nA. x\nB. y"), ("assistant", "B")]),
    "options by letter": ("choice", {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y"},
                          [("user", "q\n\nA. x\nB. y"), ("assistant", "B")]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_recognised_by_their_columns_and_read(form: str) -> None:
    name, row, expected = FORMS[form]
    assert recognise_task(list(row)).name == name
    sample = read(row)
    assert said(sample) == expected
    assert [turn.trained for turn in sample.turns] == [turn.role in ("assistant", "text") for turn in sample.turns]


def test_every_shipped_task_is_among_them_and_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    assert {name for name, _, _ in FORMS.values()} == set(SHIPPED)
    with caplog.at_level("INFO", "frostline"):
        choose_task(DataConfig(), ["conversations", "novel column"])
    assert "data.task: auto takes sharegpt (a conversation" in caplog.text


@pytest.mark.parametrize("names", [("question", "contexts", "long_answer"), (" QUESTION ", " CONTEXTS ", "long answer"),
                                   ("Question", "CONTEXT", "Long-Answer")])  # fmt: skip
def test_names_match_without_case_blanks_and_plural_and_it_is_said(
    names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    row = dict(zip(names, QA.values(), strict=True))
    with caplog.at_level("INFO", "frostline"):
        assert read(row, "pubmedqa") == read(QA)
    assert f"{names[0]!r} as QUESTION" in caplog.text


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_names_match_in_either_form_of_unicode_and_without_marks_that_show_nothing(form: str, asked: str) -> None:
    row = {"\u200b질문": "q", "문맥": ["c", "d"], "정답\ufeff": "a"}
    columns = {"question": "질문", "contexts": "문맥", "answer": normalize(asked, "정답")}
    sample = read(
        {normalize(form, name): value for name, value in row.items()}, {"name": "long_answer", "columns": columns}
    )
    assert (sample.contexts, said(sample)[-1]) == (("c", "d"), ("assistant", "a"))


def test_two_columns_of_one_name_are_refused_unless_one_is_exact() -> None:
    assert read({**QA, "question": "other"}).question == QA["QUESTION"]
    with pytest.raises(RowFaultError, match="has 'question' and 'Question', which may both be QUESTION"):
        load_task("long_answer").read({"question": "a", "Question": "b", "LONG_ANSWER": "c"})


@pytest.mark.parametrize("contexts", [None, float("nan"), [], "", "nan"])
def test_missing_contexts_are_none(contexts: Any) -> None:
    assert read({**QA, "CONTEXTS": contexts}).contexts == ()
    assert read({"QUESTION": "q", "LONG_ANSWER": "a"}).contexts == ()


def test_columns_are_mapped_inline_by_nested_paths_of_lists_too() -> None:
    row = {"id": 1, "q": {"text": "왜?"}, "passages": [{"text": "a"}, {"text": "b"}], "final": ["x", "y"]}
    columns = {"question": "q.text", "contexts": "passages[].text", "answer": "final.1"}
    sample = read(row, {"name": "long_answer", "columns": columns})
    assert said(sample) == [("user", "a\n\nb\n\n왜?"), ("assistant", "y")]


def test_labels_come_from_a_fixed_list() -> None:
    task = {"name": "choice", "output": {"labels": ["yes", "no", "maybe"]},
            "columns": {"answer": "final_decision", "contexts": "context.contexts"}}  # fmt: skip
    sample = read(NESTED, task)
    assert said(sample) == [("user", ASKED), ("assistant", "yes")]
    assert (sample.label, sample.options) == ("yes", ("yes", "no", "maybe"))
    with pytest.raises(RowFaultError, match="has 'perhaps' in final_decision; expected a number, a letter or the text"):
        read({**NESTED, "final_decision": "perhaps"}, task)


@pytest.mark.parametrize(
    ("answer", "first", "letter"),
    [
        (1, 1, "A"),
        ("3", 1, "C"),
        (0, 0, "A"),
        (2.0, 1, "B"),
        ("b", 1, "B"),
        ("(C)", 1, "C"),
        ("나", 1, "B"),
        ("2.0", 1, "B"),
        ("③", 1, "C"),
        ("(2)", 1, "B"),
        ("Ｂ", 1, "B"),
    ],
)
def test_an_answer_is_a_number_a_letter_or_the_text_of_an_option(answer: Any, first: int, letter: str) -> None:
    sample = read({**KORMED, "answer": answer}, {"name": "choice", "first_number": first})
    assert (sample.label, sample.options) == (letter, ("A", "B", "C"))


def test_an_answer_may_be_given_as_number_or_text_and_none_of_the_options_is_a_fault() -> None:
    assert read(KORMED, {"name": "choice", "target": "{{ number }}"}).answer == "2"
    assert read(KORMED, {"name": "choice", "target": "{{ label }}"}).answer == "나"
    with pytest.raises(RowFaultError, match="has 0 in answer, and 3 options; numbers count from 1 here"):
        read({**KORMED, "answer": 0})


@pytest.mark.parametrize("printed", ['[{"text": "a"}, {"text": "b"}]', "[{'text': 'a'}, {'text': 'b'}]"])
def test_a_path_leads_into_what_a_table_holds_printed(printed: str) -> None:
    row = {"QUESTION": "q", "LONG_ANSWER": "x"}
    of_list = {"name": "long_answer", "columns": {"contexts": "CONTEXTS[].text"}}
    assert read({**row, "CONTEXTS": printed}, of_list).contexts == ("a", "b")
    of_object = {"name": "long_answer", "columns": {"contexts": "context.contexts"}}
    assert read({**row, "context": f"{{'contexts': {['a', 'b']}}}"}, of_object).contexts == ("a", "b")


def test_an_answer_that_is_no_json_of_the_schema_is_a_fault(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["grade"], "properties": {"grade": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for given in (schema, str(tmp_path / "schema.json")):
        task = {"columns": {"note": "note", "code": {"path": "code", "kind": "any"}}, "prompt": "{{ note }}",
                "target": "{{ code if code is string else code | tojson }}", "output": {"schema": given}}  # fmt: skip
        assert read({"note": "구토", "code": {"grade": 3, "n": "<구토>"}}, task).answer == '{"grade": 3, "n": "<구토>"}'
        with pytest.raises(RowFaultError, match="breaks the task's schema at grade: 'three' is not of type 'integer'"):
            read({"note": "구토", "code": {"grade": "three"}}, task)
        with pytest.raises(RowFaultError, match="has an answer that is not JSON"):
            read({"note": "구토", "code": "grade 3"}, task)


def test_turns_of_a_file_of_ones_own_are_templates(tmp_path: Path) -> None:
    """Also in a file that is called as a task that comes with Frostline, which it does not extend."""
    path = tmp_path / "triage.yaml"
    path.write_text(
        "columns:\n  note: {path: record.note}\n  level: level\nturns:\n- {role: system, content: Be brief.}\n"
        "- {role: user, content: 'Note: {{ note }}'}\n- {role: assistant, content: seen, train: false}\n"
        "- {role: user, content: 'Level?'}\n- {role: assistant, content: '{{ level | upper }}'}\n"
    )
    sample = read({"record": {"note": "열"}, "level": "high"}, str(path))
    assert said(sample)[1:3] == [("user", "Note: 열"), ("assistant", "seen")]
    assert [turn.trained for turn in sample.turns] == [False, False, False, False, True]
    assert read({"level": "low", "n": "x"}, {"extends": str(path), "columns": {"note": "n"}}).answer == "LOW"


WRONG = {
    "unknown key": ("columns: {q: q}\nprompt: '{{ q }}'\ntarget: x\ntemplte: y\n", "line 4: templte: unknown key"),
    "unknown variable": ("columns:\n  question: q\nprompt: '{{ questoin }}'\ntarget: x\n",
                         "line 3: prompt uses questoin, which is no column; expected one of question (did you mean"),
    "broken template": ("columns: {q: q}\ntarget: x\nprompt: '{{ q '\n", "line 3: prompt is no valid template"),
    "no columns": ("prompt: a\ntarget: b\n", "columns is missing"),
    "no target": ("columns: {q: q}\nprompt: '{{ q }}'\n", "expected prompt and target together"),
    "wrong kind": ("columns:\n  q: q\n  c:\n    path: c\n    kind: list\nprompt: x\ntarget: y\n",
                   'line 5: columns.c.kind is "list"; expected'),
    "cut of no texts": ("columns: {q: q}\nprompt: '{{ q }}'\ntarget: y\ncut: q\n",
                        "line 4: cut is q, of kind text; expected kind texts"),
    "not yaml": ("columns: [\n", "line 2"),
    "a list": ("- a\n", "line 1: expected a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_task_file_is_refused_with_its_line(fault: str, tmp_path: Path) -> None:
    text, message = WRONG[fault]
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_task(str(tmp_path / "own.yaml"))
    assert message in str(error.value)
    assert "own.yaml" in str(error.value)


def test_a_template_reaches_nothing_outside_its_sandbox() -> None:
    for attack in ("{{ q.__class__.__mro__ }}", "{% for i in range(10**9) %}{% endfor %}", "{{ [].append(q) }}"):
        task = {"columns": {"q": "q"}, "prompt": attack + "{{ q }}", "target": "x"}
        with pytest.raises(RowFaultError, match="cannot be rendered by the task's turn 1"):
            read({"q": "q"}, task)


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("auto", ["prompt", "chosen", "rejected"], "preference pairs (chosen, rejected), which are not for supervised"),
        ("auto", ["prompt", "completion", "label"], "judged answers (label beside prompt and completion"),
        ("auto", ["id", "prompt", "completion", "Label", "source"], "name the task: data.task: prompt_completion"),
        ("auto", ["prompt", "completion", "rejected"], "judged answers (rejected), which are not for supervised"),
        ("auto", ["messages", "rejected_response"], "name the task: data.task: messages"),
        ("auto", ["messages", "rejected_messages"], "judged answers (rejected_messages)"),
        ("auto", ["instruction", "input", "output", "kto_tag"], "name the task: data.task: alpaca"),
        ("auto", ["title", "body"], "auto knows no task for rows with the columns title, body; expected those of one"),
        ("auto", ["QUESTION", "ANSWR"], "needs the column LONG_ANSWER or answer; the rows have QUESTION, ANSWR"),
        ("long_answer", ["QUESTIONS_KO", "LONG_ANSWER"],
         "QUESTIONS_KO is named most like it: data.task: {name: long_answer, columns: {question: QUESTIONS_KO}}"),
        ("long_answer", ["instruction", "output"], "data.task: alpaca would fit them"),
        ("mesages", ["x"], "which is no task and no file; expected auto, messages"),
        ("mesages", ["x"], "(did you mean messages?)"),
        ("nowhere/own.yaml", ["x"], "data.task is nowhere/own.yaml, which cannot be read"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_say_what_would(task: str, columns: list[str], message: str) -> None:
    with pytest.raises(DataError) as error:
        choose_task(DataConfig(task=task), columns)
    assert message in str(error.value)


@pytest.mark.parametrize("label", [True, False, "True", "false "])
def test_a_label_of_true_or_false_is_a_judgement_of_the_answer_unless_the_task_is_named(label: Any) -> None:
    """As LLaMA-Factory and ms-swift have it for KTO; a label that is anything else is a column like others."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": messages}, {"instruction": "q", "output": "a"}, {"QUESTION": "q", "LONG_ANSWER": "a"}):
        with pytest.raises(RowFaultError, match=r"beside its answer, as judged answers have, .* name the task"):
            read({**row, "label": label}, "auto")
        named = choose_task(DataConfig(), list(row)).name
        assert read({**row, "label": label}, named).answer == read({**row, "label": "a"}, "auto").answer == "a"
    assert read({"question": "q", "choices": ["false", "true"], "label": "true"}, "auto").answer == "B"


def test_a_message_that_says_two_things_says_which() -> None:
    question = {"role": "user", "content": "q"}
    for answer, named in (
        ({"content": "a", "value": "b"}, "content and value"),
        ({"content": "a", "reasoning": "x", "thinking": "y"}, "reasoning and thinking"),
    ):
        with pytest.raises(RowFaultError, match=f"has different values as {named} of messages 2; keep one of them"):
            read({"messages": [question, {"role": "assistant", **answer}]}, "messages")
    same = {"role": "assistant", "content": "a", "value": "a", "reasoning": "", "thinking": "y"}
    assert read({"messages": [question, same]}, "messages").answer == "<think>\ny\n</think>\n\na"


@pytest.mark.parametrize("task", ["auto", "long_answer"])
def test_one_column_that_may_be_several_says_what_separates_them(task: str) -> None:
    for column in ("질문/정답", "진료 질문 2024년"):
        with pytest.raises(DataError, match=r"If that one column is several, data\.separator names the character"):
            choose_task(DataConfig(task=task), [column])
    with pytest.raises(DataError) as error:
        choose_task(DataConfig(task=task), ["output"])
    assert "data.separator" not in str(error.value)


def test_texts_in_separate_letters_are_composed_and_noted_unless_it_is_off() -> None:
    import unicodedata

    decomposed = {
        key: unicodedata.normalize("NFD", value) if isinstance(value, str) else value for key, value in QA.items()
    }
    assert read(decomposed) == read(QA)
    assert read(decomposed).normalised
    assert not read(QA).normalised
    assert read(decomposed, normalize="off").answer == decomposed["LONG_ANSWER"]


def test_questions_need_no_answer_and_a_question_alone_is_asked_by_every_task() -> None:
    for row, name in (({"question": "q"}, "long_answer"), ({"prompt": "q"}, "prompt_completion"), (KORMED, "choice")):
        task = task_for_questions(DataConfig(), [row])
        assert task.name == name
        assert task.has_answer(row) == ("answer" in row)
    for name in set(SHIPPED) - {"choice"}:
        assert load_task(name).ask("why?", ("c",)).question.endswith("why?")
    assert said(load_task("long_answer").ask("why?", ("c",))) == [("user", "c\n\nwhy?")]
    labels = {"name": "choice", "output": {"labels": ["yes", "no"]}}
    assert said(load_task(labels).ask("why?", ("c",))) == [("user", "c\n\nwhy?")]
    assert columns_of([None, {"a": 1}, {"b": 2, "a": 3}]) == ["a", "b"]


def test_a_conversation_that_ends_with_a_question_is_asked_that_one() -> None:
    earlier = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
    rows = [Row(f"row {number}", {"messages": messages}) for number, messages in enumerate([
        earlier, earlier[:1], [*earlier, {"role": "user", "content": "q2"}],
        [*earlier, {"role": "tool", "content": "result"}],
    ])]  # fmt: skip
    samples = questions_of(rows, DataConfig())
    assert [sample.answer for sample in samples] == ["a1", None, None, None]
    assert [sample.to_answer().turns[-1].content for sample in samples] == ["q1", "q1", "q2", "result"]
    with pytest.raises(DataError, match="row 9 has no question in messages; expected a turn of the user"):
        questions_of([Row("row 9", {"messages": [{"role": "system", "content": "s"}]})], DataConfig())


def test_openais_earlier_form_of_a_call_is_a_tool_call() -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    sample = read({"messages": [{"role": "user", "content": "q"}, called]})
    assert sample.turns[-1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},)
