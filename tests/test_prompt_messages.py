"""A prompt and its completion as two lists of messages, as TRL has them: what is learned, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conversation_templates import FAMILIES
from helpers import make_tokenizer
from test_multi_turn import CALL, TOOLS, conversation

from toolkit.config.schema import DataConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.examples import Encoder
from toolkit.data.questions import questions_of
from toolkit.data.sources import Row
from toolkit.tasks.choose import load_task, recognise_task
from toolkit.tasks.sample import RowFaultError, Sample

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def read(row: dict[str, Any], **more: Any) -> Sample:
    return load_task({"name": "prompt_completion", **more}).read(row)


def said(sample: Sample) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.content, turn.trained) for turn in sample.turns]


@pytest.mark.parametrize("kind", ["bytes", "space"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_whole_conversation_and_answers_of_the_completion_alone_are_learned(
    name: str, kind: str
) -> None:
    family = FAMILIES[name]
    tokenizer, rng = family.tokenizer(kind), random.Random(f"{name} {kind} prompt")
    encoder = Encoder(tokenizer, 4096)
    for number in range(12):
        messages = conversation(rng, with_system=family.takes_system and number % 2 == 0)
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        cut = rng.choice(answers)
        row = {"prompt": messages[:cut], "completion": messages[cut:]}
        whole = encoder.encode(load_task("messages").read({"messages": messages}))
        example = encoder.encode(read(row))
        assert example.token_ids == whole.token_ids
        assert example.spans == whole.spans[answers.index(cut) :]
        last = encoder.encode(read(row, train_on="last"))
        assert (last.token_ids, last.spans) == (whole.token_ids, whole.spans[-1:])
        asked = load_task("prompt_completion").read({"prompt": messages[:cut]}, with_answer=False)
        assert encoder.prompt_ids(asked) == encoder.prompt_ids(
            load_task("messages").read({"messages": messages[: cut + 1]})
        )


def test_rows_may_be_messages_or_texts_and_tables_print_the_former(tmp_path: Path) -> None:
    rows = [
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"prompt": json.dumps([SYSTEM, USER]), "completion": str([ANSWER])},
        {"prompt": [USER], "completion": [ANSWER], "system": "s"},
    ]
    for row in rows:
        assert recognise_task(list(row)).name == "prompt_completion"
        assert said(read(row)) == [("system", "s", False), ("user", "q", False), ("assistant", "a", True)]
    texts = {"prompt": json.dumps([USER]), "completion": "two"}
    assert said(read(texts))[-1] == ("assistant", "two", True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:1], texts]))
    assert len(load_dataset(DataConfig(path=str(tmp_path / "rows.jsonl")), make_tokenizer(), 0).train) == 2


def test_keys_of_printed_messages_stand_in_any_order_and_other_json_is_text() -> None:
    row = {"prompt": str([{"name": "n", **USER}]), "completion": json.dumps([{"weight": 1, **ANSWER}])}
    assert said(read(row)) == [("user", "q", False), ("assistant", "a", True)]
    texts = {"prompt": json.dumps([{"who": {"role": "x"}}]), "completion": json.dumps([{"to": {"role": "y"}}])}
    assert [turn[1] for turn in said(read(texts))] == list(texts.values())


def test_answers_of_the_prompt_are_not_learned_whatever_they_hold() -> None:
    thought = {"role": "assistant", "content": "<think>\nso\n</think>\n\na"}
    tokenizer = FAMILIES["qwen3"].tokenizer("bytes")
    sample = read({"prompt": [USER, thought, USER], "completion": [ANSWER]})
    (span,) = Encoder(tokenizer, 512).encode(sample).spans
    assert tokenizer.decode(Encoder(tokenizer, 512).encode(sample).token_ids[slice(*span)]) == "a<|im_end|>"
    more = [ANSWER, USER, {**ANSWER, "train": False}]
    assert [turn[2] for turn in said(read({"prompt": [USER], "completion": more}))] == [False, True]


def test_tools_are_those_of_a_row_of_messages_and_other_rows_go_without() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    row = {"prompt": [USER], "completion": [call, {"role": "tool", "content": "5"}, ANSWER], "tools": TOOLS}
    tokenizer = FAMILIES["qwen2.5"].tokenizer("bytes")
    encoder = Encoder(tokenizer, 2048)
    whole = load_task("messages").read({"messages": [*row["prompt"], *row["completion"]], "tools": TOOLS})
    assert encoder.encode(read(row)) == encoder.encode(whole)
    assert len(encoder.encode(whole).spans) == 2
    assert read({"prompt": "q", "completion": "a", "tools": "hammer"}).tools == ()


def test_a_prompt_of_messages_is_asked_and_its_completion_is_the_reference() -> None:
    alone, answered = questions_of(
        [
            Row("row 1", {"prompt": [USER], "completion": None}),
            Row("row 2", {"prompt": [USER], "completion": [ANSWER]}),
        ],
        DataConfig(),
    )
    assert (alone.answer, answered.answer) == (None, "a")
    assert answered.to_answer().turns == alone.turns


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"completion": "a"}, "has messages in prompt and text in completion; expected messages in both, or text in"),
        ({"prompt": "q"}, "has text in prompt and messages in completion; expected messages in both"),
        ({"completion": []}, "has messages in prompt and an empty list in completion"),
        ({"completion": None}, "has messages in prompt and null in completion"),
        ({"completion": 3}, "has messages in prompt and a int in completion"),
        ({"completion": [USER]}, "has no answer in its completion; expected one of the assistant"),
        ({"completion": [{**ANSWER, "train": False}]}, "has no answer that is to be learned"),
        ({"prompt": [ANSWER]}, "has an answer before any question in prompt"),
        ({"prompt": [{"content": "q"}]}, "has no role or from in prompt 1; it has content"),
        ({"history": [["a", "b"]]}, "has messages in prompt and turns in history; put these into the messages"),
    ],
)
def test_a_row_that_is_not_messages_on_both_sides_is_refused_in_words(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowFaultError, match=fault):
        read({"prompt": [USER], "completion": [ANSWER], **row})


def test_a_row_without_a_completion_is_refused_in_words() -> None:
    with pytest.raises(RowFaultError, match="has messages in prompt and nothing in completion"):
        read({"prompt": [USER]})


def test_a_template_that_adds_to_the_prompt_takes_texts_alone() -> None:
    with pytest.raises(RowFaultError, match="has messages in prompt; expected text"):
        read({"prompt": [USER], "completion": [ANSWER]}, prompt="Q: {{ prompt }}", target="{{ completion }}")
    own = {"columns": {"ask": "ask", "say": "say"}, "prompt": "{{ ask }}", "target": "{{ say }}"}
    assert said(load_task(own).read({"ask": [USER], "say": [ANSWER]}))[-1] == ("assistant", "a", True)
