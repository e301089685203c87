"""Constrained decoding: no answer leaves its format, and a batch gives the answers of one by one."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENGLISH, make_tiny_model, run_here
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.inference.answering import Answerer
from toolkit.inference.chat import Chat
from toolkit.inference.constrained import Constrained, OneOfOptions
from toolkit.inference.open_model import open_model
from toolkit.inference.sampling import Sampling
from toolkit.runtime.errors import DataError, UsageError
from toolkit.tasks.choose import load_task
from toolkit.tasks.output import check_answer, is_answer
from toolkit.tasks.sample import Sample, ask

SCHEMA = {
    "type": "object",
    "properties": {
        "term": {"type": "string", "maxLength": 12},
        "severity": {"enum": ["mild", "심함"]},
        "serious": {"type": "boolean"},
        "grades": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 5}, "maxItems": 2},
    },
    "required": ["term", "severity", "serious", "grades"],
    "additionalProperties": False,
}
CHOICE = {"name": "choice", "columns": {"answer": "decision"}, "output": {"labels": ["yes", "no", "no idea", "모름"]}}
EXTRACT = {
    "name": "extract", "columns": {"note": "note", "answer": "answer"}, "prompt": "{{ note }}",
    "target": "{{ answer }}", "output": {"schema": SCHEMA},
}  # fmt: skip


def questions(count: int) -> list[dict[str, Any]]:
    """Of different lengths, so that a batch has padding."""
    return [{"question": "Is it good? " * (1 + number % 4) + str(number)} for number in range(count)]


def answerer_of(model: Path, **options: Any) -> Answerer:
    opened = open_model(str(model))
    return Answerer(opened.loaded, 512, options.pop("max_new_tokens", 8), constrains=True, **options)


def samples_of(task: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[tuple[int, Sample]]:
    reader = load_task(task)
    return [(number, reader.read(row, with_answer=False)) for number, row in enumerate(rows)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_are_labels_the_same_in_a_batch_and_alone(tiny_model: Path, temperature: float) -> None:
    samples = samples_of(CHOICE, questions(12))
    sampling = Sampling(temperature)
    together = dict(answerer_of(tiny_model, batch_size=5, sampling=sampling).in_order(samples))
    alone = dict(answerer_of(tiny_model, sampling=sampling).in_order(samples))
    assert together == alone
    assert len(together) == 12
    assert set(together.values()) <= set(CHOICE["output"]["labels"])  # type: ignore[index]
    free = toolkit.generate(tiny_model, [row["question"] for row in questions(2)], max_new_tokens=8)
    assert not set(free) & set(CHOICE["output"]["labels"])  # type: ignore[index]  # untrained, it says anything


def test_every_option_can_be_the_answer_also_one_that_begins_another(tiny_model: Path) -> None:
    """A model that prefers one option's tokens is led to it and ends there."""
    answerer = answerer_of(tiny_model)
    ((_, sample),) = samples_of(CHOICE, questions(1))
    encoder = answerer._encoder
    _, options = encoder.encode_answers(sample, sample.options)
    for wanted, ids in zip(sample.options, options, strict=True):
        constraint = OneOfOptions(options, encoder.stop_ids())
        given: list[int] = []
        while not set(given) & set(encoder.stop_ids()):
            liked = [*ids, *encoder.stop_ids()][len(given)]
            allowed = constraint.allowed(1000)
            assert allowed[liked]
            assert 1 <= int(allowed.sum()) <= len(options) + len(encoder.stop_ids())
            constraint.take(liked)
            given.append(liked)
        text = answerer.loaded.tokenizer.decode(given, skip_special_tokens=True)
        assert encoder.without_closing(text.strip()) == wanted


def test_options_of_each_row_are_its_own_and_are_not_cut(tiny_model: Path) -> None:
    rows = [
        {"question": f"Which {n}?", "options": [f"the long answer number {n}", f"a long answer {n}"]} for n in range(6)
    ]
    task = {"name": "choice", "target": "{{ label }}"}
    answers = dict(answerer_of(tiny_model, batch_size=4, max_new_tokens=1).in_order(samples_of(task, rows)))
    assert all(answers[number] in row["options"] for number, row in enumerate(rows))


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_answers_are_json_by_the_schema_the_same_in_a_batch_and_alone(tiny_model: Path, temperature: float) -> None:
    rows = [{"note": "headache, 두통 " * (1 + number % 3)} for number in range(6)]
    samples, task = samples_of(EXTRACT, rows), load_task(EXTRACT)
    options = {"sampling": Sampling(temperature), "max_new_tokens": 400}
    together = dict(answerer_of(tiny_model, batch_size=4, **options).in_order(samples))
    assert together == dict(answerer_of(tiny_model, **options).in_order(samples))
    assert all(is_answer(task.spec, str(answer)) for answer in together.values())
    assert all(set(json.loads(str(answer))) == set(SCHEMA["required"]) for answer in together.values())


OPEN = {
    "type": "object",
    "properties": {
        "증상": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "onset": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
        "grade": {"enum": ["가벼움", "심함"]},
        "count": {"type": ["integer", "null"], "minimum": 10},
        "note": {"type": "object", "properties": {"text": {"type": "string", "minLength": 9}}, "required": ["text"]},
    },
    "required": ["증상", "onset", "grade", "count"],
    "additionalProperties": False,
}
"""Nothing of it is bounded: a model that never ends a text is made to."""


@pytest.mark.parametrize(("schema", "temperature"), [(SCHEMA, 0.0), (OPEN, 0.0), (OPEN, 2.0)])
def test_a_hundred_answers_are_whole_at_any_limit_of_tokens(
    tiny_model: Path, schema: dict[str, Any], temperature: float
) -> None:
    drawn = random.Random(0)
    task = {**EXTRACT, "output": {"schema": schema}}
    rows = [
        {"note": "n" + "".join(drawn.choices('두통 fever 열 \n{}"0', k=drawn.randrange(1, 30)))} for _ in range(100)
    ]
    samples, spec = samples_of(task, rows), load_task(task).spec
    loaded = open_model(str(tiny_model)).loaded
    whole, shortest = 0, 0
    for part, more in enumerate((0, 1, 2, 5, 30)):
        answerer = Answerer(loaded, 512, 400, 20, Sampling(temperature), constrains=True)
        shortest = len(answerer.prompt(samples[0][1], 0).constraint.ending or ())  # type: ignore[union-attr]
        answerer.max_new_tokens, given = shortest + more, list[int]()
        answerer.on_token = given.append
        for _, answer in answerer.in_order(samples[part * 20 : part * 20 + 20]):
            check_answer(spec, str(answer))
            whole += 1
        assert max(given) <= shortest + more
    assert whole == 100
    assert 20 < shortest < 60


def test_a_limit_that_no_answer_fits_is_said_before_any_is_given(tiny_model: Path) -> None:
    samples = samples_of(EXTRACT, [{"note": "one"}])
    with pytest.raises(UsageError, match=r"the task's JSON schema takes \d+ tokens, and --max-new-tokens is 3; allow"):
        list(answerer_of(tiny_model, max_new_tokens=3).in_order(samples))
    long = samples_of(EXTRACT, [{"note": "why " * 230}])
    answerer = Answerer(open_model(str(tiny_model)).loaded, 600, 64, constrains=True)
    with pytest.raises(
        DataError, match=r"question 1, .* has no answer: its prompt leaves \d+ of the model's positions"
    ):
        list(answerer.in_order(long))


def test_an_answer_with_room_is_what_it_was_without_a_limit(tiny_model: Path) -> None:
    """The end that is kept in mind changes no token while there is room."""
    samples = samples_of(EXTRACT, [{"note": "one"}, {"note": "이틀 전"}])
    roomy = dict(answerer_of(tiny_model, max_new_tokens=200).in_order(samples))
    assert roomy == dict(answerer_of(tiny_model, max_new_tokens=400).in_order(samples))


def test_settings_of_the_model_that_forbid_the_end_do_not_break_the_format(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    (model / "generation_config.json").write_text(json.dumps({**settings, "min_new_tokens": 7}), encoding="utf-8")
    ((_, answer),) = answerer_of(model).in_order(samples_of(CHOICE, questions(1)))
    assert answer in CHOICE["output"]["labels"]  # type: ignore[index]


def test_the_closing_of_a_template_ends_an_option(tmp_path: Path) -> None:
    """Its answers end in words, not in a mark; what ends the text then does."""
    model = make_tiny_model(tmp_path / "model")
    opened = open_model(str(model))
    opened.loaded.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} ###\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    answerer = Answerer(opened.loaded, 512, 8, constrains=True)
    ((_, answer),) = answerer.in_order(samples_of(CHOICE, questions(1)))
    assert answer in CHOICE["output"]["labels"]  # type: ignore[index]


def test_padding_after_an_answer_is_no_part_of_it() -> None:
    processor = Constrained([OneOfOptions([(5,)], [0]), OneOfOptions([(6, 7, 8)], [0])], [0])
    allowed = []
    for tokens in ([5, 6], [0, 7], [3, 8], [3, 0]):
        allowed.append(processor(torch.zeros(2, 1), torch.zeros(2, 10)).isfinite())  # type: ignore[arg-type]
        processor.take(torch.tensor(tokens))
    assert [line[1].nonzero().flatten().tolist() for line in allowed] == [[6], [7], [8], [0]]
    assert [int(line[0].sum()) for line in allowed] == [1, 1, 10, 10]


def test_options_are_never_said_to_be_cut_nor_is_whole_json(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One option begins another here, so that the closing of the turn is among their tokens."""
    list(answerer_of(tiny_model, batch_size=3).in_order(samples_of(CHOICE, questions(6))))
    answerer = answerer_of(tiny_model, max_new_tokens=400)
    ((_, answer),) = answerer.in_order(samples_of(EXTRACT, [{"note": "one"}]))
    counted: list[int] = []
    answerer.on_token = counted.append
    list(answerer.in_order(samples_of(EXTRACT, [{"note": "one"}])))
    exact = answerer_of(tiny_model, max_new_tokens=len(counted) - 1)  # all but the token that ends it
    assert list(exact.in_order(samples_of(EXTRACT, [{"note": "one"}]))) == [(0, answer)]
    assert "answers ended" not in caplog.text


def test_free_text_is_refused_before_the_model_loads(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="answers of this one are free text; leave --constrain out"):
        list(answerer_of(tiny_model).in_order([(0, ask("Why?"))]))
    done = run_here("generate", tiny_model, "--question", "Why?", "--constrain")
    assert done.returncode == 2
    assert "free text" in done.stderr

    def fail(*given: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert run_here("generate", tiny_model, "--question", "Why?", "--constrain").returncode == 2


def test_a_schema_that_cannot_be_kept_to_and_a_missing_library_are_one_message(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    samples = samples_of({**EXTRACT, "output": {"schema": unknown}}, [{"note": "one"}])
    with pytest.raises(UsageError, match=r"cannot hold an answer to .*uniqueItems.* or leave --constrain out"):
        list(answerer_of(tiny_model).in_order(samples))
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(UsageError, match="pip install"):
        list(answerer_of(tiny_model).in_order(samples_of(EXTRACT, [{"note": "one"}])))
    assert list(answerer_of(tiny_model).in_order(samples_of(CHOICE, questions(1))))  # labels need none


def test_a_conversation_is_constrained_at_every_message(tiny_model: Path) -> None:
    opened = open_model(str(tiny_model))
    config = opened.config.data.model_copy(update={"task": CHOICE})
    chat = Chat(Answerer(opened.loaded, 512, 8, constrains=True), config)
    assert {chat.reply("Is it?"), chat.reply("Is it really?")} <= set(CHOICE["output"]["labels"])  # type: ignore[index]


def test_evaluation_tells_format_and_knowledge_apart(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "decision": "no"} for row in questions(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    comparison = toolkit.evaluate(
        tiny_model, path, task=CHOICE, answers=6, max_new_tokens=6, batch_size=4, constrain=True
    )
    scores = comparison.models[0].scores
    assert (scores["generated/valid"].value, scores["constrained/valid"].value) == (0, 1)
    given = dict(answerer_of(tiny_model).in_order(samples_of(CHOICE, rows[:6])))
    assert scores["constrained/accuracy"].value == pytest.approx(list(given.values()).count("no") / 6)


def test_json_is_scored_free_and_constrained(tiny_model: Path, tmp_path: Path) -> None:
    answer = json.dumps({"term": "pain", "severity": "mild", "serious": False, "grades": [1]})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"note": "pain", "answer": answer}) + "\n", encoding="utf-8")
    done = run_here(
        "evaluate", tiny_model, "--data.path", tmp_path / "rows.jsonl", "--data.task", json.dumps(EXTRACT),
        "--answers", "all", "--max-new-tokens", "400", "--constrain",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["models"][0]["scores"]
    assert (scores["valid"]["value"], scores["constrained/valid"]["value"]) == (0, 1)
    assert {"constrained/fields", "constrained/field/term"} <= set(scores)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--constrain",), "--constrain goes with --answers"),
        (("--constrain", "--answers", "2"), "free text; leave --constrain out"),
    ],
)
def test_evaluation_refuses_what_would_do_nothing(tiny_model: Path, flags: tuple[str, ...], message: str) -> None:
    done = run_here("evaluate", tiny_model, "--data.path", ENGLISH, "--data.task", "long_answer", *flags)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_file_of_questions_is_answered_within_their_options(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "Which?", "options": ["a", "b"]}\n', encoding="utf-8")
    command = ["generate", tiny_model, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"]
    done = run_here(*command, "--constrain", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["ANSWER"] in "AB"


def test_the_tokens_of_a_batch_are_counted_as_they_come(tiny_model: Path) -> None:
    answerer, counted = answerer_of(tiny_model, batch_size=2), list[int]()
    answerer.on_token = counted.append
    list(answerer.in_order(samples_of(CHOICE, questions(4))))
    starts = [at for at, count in enumerate(counted) if count == 1]
    assert len(starts) == 2
    assert counted == [*range(1, starts[1] + 1), *range(1, len(counted) - starts[1] + 1)]


@pytest.mark.parametrize(("ref", "message"), [("#/$defs/nope", "leads nowhere"), ("#", "leads back to itself")])
def test_a_reference_that_cannot_be_followed_is_one_message(ref: str, message: str) -> None:
    task = {**EXTRACT, "output": {"schema": {"$ref": ref}}}
    with pytest.raises(UsageError, match=message):
        load_task(task).read({"note": "one", "answer": "{}"})


def test_after_an_option_that_is_explained_anything_may_follow() -> None:
    constraint = OneOfOptions([(1, 2), (3, 4)], [9], explained=True)
    assert constraint.allowed(10).nonzero().flatten().tolist() == [1, 3]
    constraint.take(1)
    assert constraint.allowed(10).nonzero().flatten().tolist() == [2]
    for token in (2, 7, 9):
        constraint.take(token)
        assert constraint.allowed(10).all()
    plain = OneOfOptions([(1, 2), (3, 4)], [9])
    for token in (1, 2):
        plain.take(token)
    assert plain.allowed(10).nonzero().flatten().tolist() == [9]
