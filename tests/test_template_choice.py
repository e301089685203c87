"""The recipe's own chat template and its switches, plain text cut into examples, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import STYLES, space_tokenizer
from conversation_templates import FAMILIES
from helpers import make_tokenizer

from toolkit.checkpoint.state import CheckpointState, recipe_differences
from toolkit.config.schema import DataConfig, RunConfig
from toolkit.data.chat_rendering import Rendering, read_rendering
from toolkit.data.dataset import load_dataset
from toolkit.data.examples import Encoder
from toolkit.data.template_choice import rendering_of
from toolkit.runtime.errors import ConfigError, DataError, UsageError
from toolkit.tasks.choose import load_task
from toolkit.tasks.sample import RowFaultError, ask

CHATML = FAMILIES["chatml"]


def prompt_of(tokenizer: Any, **data: Any) -> str:
    rendering = rendering_of(DataConfig(**data), tokenizer)
    return str(tokenizer.decode(Encoder(tokenizer, 512, rendering=rendering).prompt_ids(ask("why?"))))


def test_a_template_of_the_recipe_takes_the_place_of_the_models(tmp_path: Path) -> None:
    chatml = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "own.jinja").write_text(CHATML.plain)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML.plain}))
    for given in ("chatml", str(tmp_path / "own.jinja"), str(tmp_path / "tokenizer_config.json")):
        assert prompt_of(make_tokenizer(CHATML.special), chat_template=given) == chatml
    plain = make_tokenizer()
    assert rendering_of(DataConfig(), plain) == Rendering()
    assert prompt_of(plain) == "<|user|>\nwhy?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("value", [False, "a 'b' \"c\"", 3, ["x", None], {"k": True}])
def test_switches_are_set_in_the_template_once_and_a_callers_own_go_first(value: Any) -> None:
    tokenizer = make_tokenizer(template="\n{{ own | tojson }}|" + make_tokenizer().chat_template)
    data = DataConfig(template_kwargs={"own": value})
    rendering = rendering_of(data, tokenizer)
    assert rendering_of(data, tokenizer) == rendering, "the second time changes nothing"
    messages = [{"role": "user", "content": "q"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown.startswith(f"\n{json.dumps(value)}|<|user|>")
    assert tokenizer.apply_chat_template(messages, tokenize=False, own=7).startswith("\n7|")


def test_thinking_is_switched_as_qwen3_does() -> None:
    style = STYLES["qwen3"]
    opened = prompt_of(style.tokenizer(), template_kwargs={"enable_thinking": False})
    assert opened.endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_template_goes_through_the_file_of_a_run(tmp_path: Path) -> None:
    rendering = Rendering(template="{{ x }}\n", parses_special=True, task="text")
    rendering.save(tmp_path)
    assert read_rendering(tmp_path) == rendering
    (tmp_path / "rendering.json").write_text('{"now": null, "reasons": true}')
    assert read_rendering(tmp_path) == Rendering(reasons=True), "as earlier versions wrote it"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.jinja", None, "which is not chatml, and no file that can be read"),
        ("broken.jinja", "{% for m in messages %}", "broken.jinja line 1: is no chat template"),
        ("odd.json", "{}", "holds no text at chat_template"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        rendering_of(DataConfig(chat_template=str(tmp_path / name)), make_tokenizer())
    assert message in str(error.value)


def test_a_switch_that_the_template_does_not_use_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for kwargs in ({"enable_think": False}, {"enable_thinking": False}):
        rendering_of(DataConfig(template_kwargs=kwargs), STYLES["qwen3"].tokenizer())
    assert caplog.messages == [
        "data.template_kwargs sets enable_think, which the chat template does not use; it has no effect"
    ]


def test_switches_need_names_and_a_template() -> None:
    plain = make_tokenizer()
    with pytest.raises(ConfigError, match="template_kwargs has 'no name'"):
        rendering_of(DataConfig(template_kwargs={"no name": 1}), plain)
    plain.chat_template = None
    with pytest.raises(ConfigError, match="the model has no chat template"):
        rendering_of(DataConfig(template_kwargs={"x": 1}), plain)
    with pytest.raises(ValueError, match="is no mapping"):
        DataConfig(template_kwargs="{x: [")
    with pytest.raises(ValueError, match="is no task; expected auto, a name"):
        DataConfig(task=3)


@pytest.mark.parametrize("make", [make_tokenizer, space_tokenizer])
def test_every_token_of_a_long_text_but_its_first_is_learned_once(make: Any) -> None:
    tokenizer = make()
    text = load_task("text").read({"text": "one two three <|end|> four " * 40 + "\n끝"})
    encoder, (whole,) = Encoder(tokenizer, 50), Encoder(tokenizer, 10_000).encode_all(text)
    parts = encoder.encode_all(text)
    assert len(parts) > 5
    assert all(len(part) <= 50 and part.spans == ((1, len(part)),) for part in parts)
    learned = [token for part in parts for token in part.token_ids[1:]]
    assert tuple(learned) == whole.token_ids[1:]
    assert whole.token_ids[-1] == tokenizer.eos_token_id
    assert whole.token_ids.count(tokenizer.eos_token_id) == 1, "a control token in the text is text"
    assert len(encoder.prompt_ids(text)) == 50
    with pytest.raises(RowFaultError, match=r"is a text of more than data\.max_length, 50 tokens"):
        encoder.encode(text)


def test_an_end_that_begins_the_next_turn_is_learned_with_every_answer() -> None:
    style = STYLES["glm"]
    tokenizer = style.tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    example = Encoder(tokenizer, 512, (0, end)).encode(load_task("messages").read({"messages": messages}))
    assert [example.token_ids[stop - 1] for _, stop in example.spans] == [end, end]


@pytest.mark.parametrize(
    ("value", "said_as"), [("text", "text, not as that token"), ("parse", "special_tokens: parse")]
)
def test_rows_with_control_tokens_and_in_separate_letters_are_counted(
    tmp_path: Path, said: list[str], value: str, said_as: str
) -> None:
    import unicodedata

    rows = [{"prompt": "왜?", "completion": "그래서"}, {"prompt": "x<|end|>", "completion": "y"}]
    rows.append({key: unicodedata.normalize("NFD", text) for key, text in rows[0].items()})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(path), special_tokens=value)
    tokenizer = make_tokenizer()
    dataset = load_dataset(data, tokenizer, 1, rendering=rendering_of(data, tokenizer))
    assert dataset.task == "prompt_completion"
    assert dataset.train[0] == dataset.train[2]
    assert [line for line in said if "1 row holds text in separate letters" in line and "line 3" in line]
    assert [line for line in said if "1 row holds the text of a control token" in line and said_as in line]


def test_the_same_fault_of_many_rows_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "completion": ""}\n' * 3)
    with pytest.raises(UsageError, match=r"line 1 has an empty completion; expected text \(and 2 more rows\)"):
        load_dataset(DataConfig(path=str(path)), make_tokenizer(), 1)


def test_a_run_goes_on_whatever_name_its_task_has_now() -> None:
    recipe = RunConfig().model_dump(mode="json")
    recipe["data"]["task"] = "pubmedqa"
    state = CheckpointState(
        step=1, total_steps=2, epoch=0, cursor=1, rows=2, order="", global_batch=1, schedule_step=1, engine="local",
        ranks=1, fingerprints={}, recipe=recipe,
    )  # fmt: skip
    assert recipe_differences(state, RunConfig(), 1) == ([], [])
