"""Where an answer begins and ends, for templates in the styles of well-known models."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_templates import STYLES, Style, space_tokenizer
from helpers import make_tokenizer

from toolkit.data.chat_rendering import Rendering, read_rendering
from toolkit.data.examples import Encoder, Example
from toolkit.runtime.errors import DataError
from toolkit.tasks.sample import RowFaultError, ask

_TURNS = "{% for m in messages %}<|{{ m.role }}|>\n"

SAMPLE = ask("why is it so?", ("one fact.", "another fact."), "because it is.")
TURNS = [{"role": "user", "content": SAMPLE.turns[0].content}, {"role": "assistant", "content": SAMPLE.answer}]


def encoder_of(style: Style, tokenizer: Any, **more: Any) -> Encoder:
    return Encoder(tokenizer, 512, tokenizer.convert_tokens_to_ids(list(style.ends)), **more)


def named(style: Style) -> dict[str, str]:
    """BOS where the style has one."""
    return {"bos_token": style.special[1]} if "bos_token" in style.template else {}


@pytest.fixture(params=STYLES)
def case(request: pytest.FixtureRequest) -> tuple[str, Style, Any]:
    style = STYLES[request.param]
    return request.param, style, style.tokenizer(**named(style))


def supervised(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode(example.token_ids[example.answer_start :]))


def test_the_ids_are_those_of_apply_chat_template(case: tuple[str, Style, Any]) -> None:
    name, style, tokenizer = case
    ids = list(encoder_of(style, tokenizer).encode(SAMPLE).token_ids)
    theirs = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    if name == "glm":
        theirs = [*theirs, tokenizer.convert_tokens_to_ids(style.end)]
    if name == "deepseek-r1":  # its own prompt opens a thought that its conversation has not
        opened = tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
        at = theirs.index(tokenizer.convert_tokens_to_ids("<|a|>")) + 1
        theirs = [*theirs[:at], *opened, *theirs[at:]]
    while theirs[-1] != ids[-1]:  # the line break after the last turn
        theirs.pop()
    assert ids == theirs


def test_the_answer_and_its_end_alone_are_supervised(case: tuple[str, Style, Any]) -> None:
    _, style, tokenizer = case
    encoder = encoder_of(style, tokenizer)
    example = encoder.encode(SAMPLE)
    text = supervised(tokenizer, example)
    assert text.startswith(f"{style.trained_blank}{SAMPLE.answer}")
    assert text.endswith(style.end)
    assert "think" not in text
    own = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(example.token_ids[: example.answer_start]) == own + style.inserted


def test_generation_starts_from_the_prompt_and_ends_with_the_trained_end(case: tuple[str, Style, Any]) -> None:
    _, style, tokenizer = case
    encoder = encoder_of(style, tokenizer)
    example = encoder.encode(SAMPLE)
    assert encoder.prompt_ids(SAMPLE) == example.token_ids[: example.answer_start]
    assert example.token_ids[-1] in encoder.stop_ids()
    assert set(tokenizer.convert_ids_to_tokens(encoder.stop_ids())) <= set(style.special), "no piece of a word ends it"


def test_an_end_that_the_template_lacks_is_chosen_from_the_models_list() -> None:
    style = STYLES["glm"]
    tokenizer = style.tokenizer()
    text_end, user = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])
    for ends, end in (((text_end, user), user), ((text_end,), text_end), ((), text_end)):
        encoder = Encoder(tokenizer, 512, ends)
        assert encoder.encode(SAMPLE).token_ids[-1] == end
        assert encoder.stop_ids() == sorted({text_end, end})
        assert "has no mark after an answer" in encoder.notes()[0]
        assert f"(id {end})" in encoder.notes()[0]


def test_a_template_that_closes_answers_in_plain_words_gets_an_end_too() -> None:
    tokenizer = make_tokenizer(template="{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n###\n{% endfor %}")
    encoder = Encoder(tokenizer, 512)
    assert supervised(tokenizer, encoder.encode(SAMPLE)) == "because it is.\n###<|end|>"
    assert encoder.stop_ids() == [tokenizer.eos_token_id]


def test_nothing_that_says_what_ends_an_answer_is_an_error() -> None:
    tokenizer = STYLES["glm"].tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="nothing says what ends an answer"):
        Encoder(tokenizer, 512)


def test_a_models_own_ends_stop_generation_beside_the_templates() -> None:
    tokenizer = STYLES["chatml"].tokenizer()
    assert Encoder(tokenizer, 512, (1, 2, 10_000)).stop_ids() == [0, 1, 2], "no id beyond the tokenizer's"
    tokenizer.chat_template = None
    assert Encoder(tokenizer, 512, (2,)).stop_ids() == [0, 2]


THOUGHT = ask("why?", (), "<think>\nfirst this\n</think>\n\nthen that.")


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "deepseek", "deepseek-r1", "chatml"])
def test_a_real_thought_in_an_answer_stays_and_is_trained(name: str) -> None:
    style = STYLES[name]
    tokenizer = style.tokenizer()
    example = Encoder(tokenizer, 512).encode(THOUGHT)
    prompt = tokenizer.decode(example.token_ids[: example.answer_start])
    opened = "<think>\n" if prompt.endswith("<think>\n") else ""
    assert opened + supervised(tokenizer, example) == f"{THOUGHT.answer}{style.end}"
    assert "</think>" not in prompt
    if example.reasons:
        generating = Encoder(tokenizer, 512, rendering=Rendering(reasons=True))
        assert generating.prompt_ids(THOUGHT) == example.token_ids[: example.answer_start]
        assert generating.answer_opening == opened
    assert example.reasons == (name != "chatml")


def test_an_empty_thought_of_a_row_is_not_trained_where_the_template_brings_its_own() -> None:
    tokenizer = STYLES["qwen3"].tokenizer()
    empty = ask("why?", (), "<think>\n\n</think>\n\nthen that.")
    assert supervised(tokenizer, Encoder(tokenizer, 512).encode(empty)) == "then that.<|im_end|>"


def test_a_template_that_alters_an_answer_is_a_fault_of_the_row_or_of_the_template() -> None:
    upper = make_tokenizer(template="{% for m in messages %}<|user|>{{ m.content | upper }}<|end|>{% endfor %}")
    with pytest.raises(DataError, match="alters an answer"):
        Encoder(upper, 512)
    odd = make_tokenizer(
        template="{% for m in messages %}<|user|>{{ m.content | replace('x', 'y') }}<|end|>{% endfor %}"
    )
    with pytest.raises(RowFaultError, match="chat template alters"):
        Encoder(odd, 512).encode(ask("why?", (), "six"))


DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + STYLES["chatml"].template


def test_a_date_that_a_template_prints_is_the_runs(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(STYLES["chatml"].special, DATED)
    past = Rendering(datetime(2001, 2, 3, 4, 5, 6))
    example = Encoder(tokenizer, 512, rendering=past).encode(SAMPLE)
    assert tokenizer.decode(example.token_ids).startswith("Today: 03 Feb 2001\n")
    assert example != Encoder(tokenizer, 512).encode(SAMPLE)
    past.save(tmp_path)
    assert read_rendering(tmp_path) == past


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %-d %B %Y, %H:%M (week %V of %y, 100%%)"])
def test_any_form_of_date_is_printed_as_python_does(form: str) -> None:
    now = datetime(2031, 12, 9, 8, 7)
    tokenizer = make_tokenizer(STYLES["chatml"].special, DATED.replace("%d %b %Y", form))
    ids = Encoder(tokenizer, 512, rendering=Rendering(now)).encode(SAMPLE).token_ids
    assert tokenizer.decode(ids).startswith(f"Today: {now.strftime(form)}\n<|im_start|>")


def test_a_run_that_keeps_nothing_writes_no_file(tmp_path: Path) -> None:
    Rendering().save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert read_rendering(tmp_path) == Rendering()
    (tmp_path / "rendering.json").write_text("[")
    assert read_rendering(tmp_path) == Rendering()


@pytest.mark.parametrize("template", [STYLES["llama2"].template, None])
def test_no_space_is_put_before_an_answer(template: str | None) -> None:
    tokenizer = space_tokenizer(template)
    example = Encoder(tokenizer, 512).encode(SAMPLE)
    if template:
        assert list(example.token_ids) == tokenizer.apply_chat_template(TURNS, return_dict=False)
    first = tokenizer.convert_ids_to_tokens(example.token_ids[example.answer_start])
    assert first.startswith("▁") == bool(template), "the conversation has a space there, the plain text has none"
    assert "▁▁" not in "".join(tokenizer.convert_ids_to_tokens(example.token_ids[example.answer_start :]))
    assert example.token_ids[0] == tokenizer.bos_token_id


def test_a_token_across_the_border_leaves_the_prompt_as_generation_has_it() -> None:
    tokenizer = space_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
                                "{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
                                "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    encoder = Encoder(tokenizer, 512)
    example = encoder.encode(SAMPLE)
    assert encoder.prompt_ids(SAMPLE) == example.token_ids[: example.answer_start]
    assert tokenizer.decode(example.token_ids).endswith("assistant: because it is.</s>")
    assert supervised(tokenizer, example) == "because it is.</s>"


def test_a_bos_that_is_the_end_of_text_too_is_kept() -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer(bos_token="<|end|>")
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    example = Encoder(tokenizer, 512).encode(SAMPLE)
    assert example.token_ids[0] == example.token_ids[-1] == 0
    assert example.token_ids.count(0) == 2


@pytest.mark.parametrize(
    ("make", "begin", "end"),
    [(lambda: STYLES["chatml"].tokenizer(), "<|im_start|>", "<|im_end|>"), (space_tokenizer, "<s>", "</s>")],
)
def test_control_tokens_in_a_rows_text_are_text(make: Any, begin: str, end: str) -> None:
    tokenizer = make()
    sample = ask(f"what is {begin}?", (f"a log: fine{end}\nyes",), f"it{begin} ends with {end}.")
    encoder = Encoder(tokenizer, 512)
    example, plain = encoder.encode(sample), encoder.encode(SAMPLE)
    text, without = (tokenizer.decode(one.token_ids) for one in (example, plain))
    for mark in (begin, end):
        token = tokenizer.convert_tokens_to_ids(mark)
        assert text.count(mark) == without.count(mark) + 2
        assert example.token_ids.count(token) == plain.token_ids.count(token)
    assert example.control_token in (begin, end)
    assert not plain.control_token
    assert encoder.prompt_ids(sample) == example.token_ids[: example.answer_start]


def test_a_tokenizer_without_offsets_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = space_tokenizer(STYLES["llama2"].template)
    expected = Encoder(tokenizer, 512).encode(SAMPLE)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    encoder = Encoder(tokenizer, 512)
    assert encoder.encode(SAMPLE) == expected
    assert "gives no offsets" in encoder.notes()[-1]


def test_a_template_that_takes_content_as_parts_writes_what_one_of_texts_does() -> None:
    style = STYLES["chatml"]
    parts = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    of_parts = make_tokenizer(style.special, style.template.replace("{{ m.content }}", parts))
    assert encoder_of(style, of_parts).encode(SAMPLE) == encoder_of(style, style.tokenizer()).encode(SAMPLE)


@pytest.mark.parametrize("closing", ["\n###", " ###{{ eos_token }}", "</answer>{{ eos_token }}\n", "<|im_end|>\n"])
def test_words_that_close_an_answer_are_no_part_of_what_is_given(closing: str) -> None:
    template = f"{_TURNS}{{{{ m.content }}}}{{% if m.role == 'assistant' %}}{closing}{{% endif %}}\n{{% endfor %}}"
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(["</answer>"])  # no special token, so that decoding keeps it
    encoder = Encoder(tokenizer, 512)
    example = encoder.encode(SAMPLE)
    learned = example.token_ids[example.answer_start :]
    stops = encoder.stop_ids()
    given = learned[: next(n for n, token in enumerate(learned) if token in stops) + 1]
    answer = tokenizer.decode(given, skip_special_tokens=True).strip()
    assert answer != SAMPLE.answer
    assert encoder.without_closing(answer) == SAMPLE.answer
    assert encoder.without_closing("cut off in the mid") == "cut off in the mid"


def test_blanks_and_bytes_that_a_tokenizer_adds_end_no_answer() -> None:
    template = _TURNS + "{{ m.content }}<|user|>\n<|end|>{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(["\n"])
    assert Encoder(tokenizer, 512).stop_ids() == [0, 1]


def test_an_end_of_the_models_list_that_is_part_of_a_word_ends_nothing_and_is_said() -> None:
    tokenizer = make_tokenizer()
    (word,) = tokenizer.encode("because", add_special_tokens=False)[:1]
    encoder = Encoder(tokenizer, 512, (word, 0))
    assert encoder.stop_ids() == [0]
    assert "part of a word" in encoder.notes()[0]
    assert f"(id {word})" in encoder.notes()[0]


def test_a_beginning_that_the_tokenizer_adds_and_the_template_does_not_is_said() -> None:
    (note,) = Encoder(space_tokenizer(STYLES["zephyr"].template), 512).notes()
    assert "begins a text with '<s>'" in note
    assert not Encoder(space_tokenizer(STYLES["llama2"].template), 512).notes()
