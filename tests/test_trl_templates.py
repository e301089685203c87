"""Supervised ids against the marks of templates that others wrote: TRL's for training, read from its package.

Of the twelve templates of `conversation_templates.py`, TRL has those of Qwen 2.5, Qwen 3 with and without thinking,
Llama 3, Gemma 3, DeepSeek-R1 (distilled) and one that forbids system prompts (Gemma). For Mistral, Phi-4, SmolLM2,
EXAONE 3.5, ChatML and plain text TRL has none; there the marks are our own, in `test_multi_turn.py`. Phi-3, Cohere and
LFM2 are tried beside. The encoder gets the template as the model has it. TRL marks more than the answer and the token
that ends it: what stands before it in the prompt that generation starts from, and the line break after it. These are
the differences that the tests state, and there is no other.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from conversation_templates import Family
from test_multi_turn import conversation, mask, read, theirs

from toolkit.data.examples import Encoder

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GEMMA = ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Theirs:
    """A template's control tokens, and what TRL marks beside each answer and its end."""

    special: tuple[str, ...]
    has_bos: bool = False
    takes_system: bool = True
    before: str = ""
    after: str = "\n"
    after_last: str = "\n"


TEMPLATES = {
    "qwen2_5": Theirs(_IM, before="\n"),
    "qwen3_instruct_2507": Theirs(_IM),
    "llama3": Theirs(
        ("<|text_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), True, after="",
        after_last="",
    ),
    "gemma3": Theirs(_GEMMA, has_bos=True),
    "gemma": Theirs(_GEMMA, has_bos=True, takes_system=False),
    "phi3": Theirs(("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), after_last=""),
    "cohere": Theirs(
        ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
         "<|SYSTEM_TOKEN|>"), True, after="", after_last="",
    ),
    "lfm2": Theirs(("<|im_end|>", "<|startoftext|>", "<|im_start|>"), has_bos=True),
}  # fmt: skip
"""Those whose ids are the same in TRL's version."""
QWEN3 = Theirs(_IM)
DEEPSEEK = Theirs(("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"), has_bos=True)


def template(name: str) -> str:
    """A template of TRL's, without importing it."""
    found = find_spec("trl")
    if found is None or not found.submodule_search_locations:
        assert "FROSTLINE_REQUIRE_TRL" not in os.environ, "TRL is not installed"
        pytest.skip("TRL is not installed (pip install --no-deps trl==1.16.0): its templates are not compared")
    return (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name: str, own: Theirs, kind: str) -> Any:
    """A tokenizer with the template of a model."""
    return Family(template(name), own.special, own.has_bos).tokenizer(kind)


def trl(name: str, tokenizer: Any, messages: Any) -> tuple[list[int], list[int]]:
    """Ids of a conversation in TRL's version of a template, and which of them it marks."""
    return theirs(Family(template(f"{name}_training"), ()), tokenizer, messages)


def ours(encoder: Encoder, messages: Any, first: int) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and which of them are supervised; without a BOS, unless ``first`` is the first id."""
    example = encoder.encode(read(messages))
    start = int(example.token_ids[0] != first)  # the tokenizer's BOS, which the template does not print
    return list(example.token_ids)[start:], mask(example)[start:]


def runs(marks: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each run of marked ids."""
    groups = [(key, [at for at, _ in group]) for key, group in groupby(enumerate(marks), key=lambda pair: pair[1])]
    return [(ats[0], ats[-1] + 1) for key, ats in groups if key]


def assert_marks(
    tokenizer: Any, ids: list[int], own: list[int], marked: list[int], beside: Sequence[tuple[str, str]]
) -> None:
    """Each answer is marked by both, and by TRL with so much before and after it."""
    found = []
    for (start, end), (first, last) in zip(runs(own), runs(marked), strict=True):
        assert first <= start < end <= last
        found.append((tokenizer.decode(ids[first:start]), tokenizer.decode(ids[end:last])))
    assert found == list(beside)


def conversations(name: str, kind: str, takes_system: bool, count: int = 20) -> list[list[dict[str, Any]]]:
    rng = random.Random(f"{name} {kind}")
    return [conversation(rng, with_system=takes_system and number % 2 == 0) for number in range(count)]


def answers(messages: list[dict[str, Any]]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


# Where a space is put before texts, a line break after a mark is two tokens, of which TRL's marks get the first, a
# blank that decodes to nothing; with Phi-3, whose answer ends two marks later, they fall apart there.
KINDS = [(name, kind) for name in TEMPLATES for kind in ("bytes", "space") if (name, kind) != ("phi3", "space")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_supervised_ids_are_those_that_trl_marks_without_what_the_template_puts_around_them(
    name: str, kind: str
) -> None:
    own = TEMPLATES[name]
    tokenizer = tokenizer_of(name, own, kind)
    encoder = Encoder(tokenizer, 4096)
    for messages in conversations(name, kind, own.takes_system):
        ids, marked = trl(name, tokenizer, messages)
        given, supervised = ours(encoder, messages, ids[0])
        assert given == ids[: len(given)]
        assert not tokenizer.decode(ids[len(given) :]).strip()
        after = [own.after] * (answers(messages) - 1) + [own.after_last]
        beside = [(own.before, one if kind == "bytes" else "") for one in after]
        assert_marks(tokenizer, ids, supervised, marked, beside)


@pytest.mark.parametrize("kind", ["bytes", "space"])
def test_qwen3_shows_an_empty_thought_before_the_last_answer_alone_which_trl_shows_and_marks_before_each(
    kind: str,
) -> None:
    tokenizer = tokenizer_of("qwen3", QWEN3, kind)
    encoder = Encoder(tokenizer, 4096)
    for messages in conversations("qwen3", kind, takes_system=True):
        ids, marked = trl("qwen3", tokenizer, messages)
        given, supervised = ours(encoder, messages, ids[0])
        ends = "\n" if kind == "bytes" else ""
        for start, end in runs(marked)[-2::-1]:  # of all answers but the last
            size = next(n for n in range(1, end) if tokenizer.decode(ids[start : start + n]) == _THOUGHT)
            del ids[start : start + size], marked[start : start + size]
        assert given == ids[: len(given)]
        beside = [("", ends)] * (answers(messages) - 1) + [(_THOUGHT, ends)]
        assert_marks(tokenizer, ids, supervised, marked, beside)


def with_thought(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with a thought in its last answer."""
    return [*messages[:-1], {**messages[-1], "content": "<think>\nfirst this\n</think>\n\n" + messages[-1]["content"]}]


@pytest.mark.parametrize("kind", ["bytes", "space"])
def test_a_thought_of_qwen3_and_deepseek_r1_is_supervised_as_trl_marks_it(kind: str) -> None:
    for name, own, before, ends in (
        ("qwen3", QWEN3, "", "\n"),
        ("deepseek_r1_distill", DEEPSEEK, "<｜Assistant｜><think>\n", ""),
    ):
        tokenizer = tokenizer_of(name, own, kind)
        encoder = Encoder(tokenizer, 4096)
        for messages in conversations(name, kind, takes_system=True):
            messages = with_thought(messages[:3] if messages[0]["role"] == "system" else messages[:2])
            ids, marked = trl(name, tokenizer, messages)
            given, supervised = ours(encoder, messages, ids[0])
            assert given == ids[: len(given)]
            beside = (before, ends) if kind == "bytes" else (before.replace("><", "> <"), "")
            assert_marks(tokenizer, ids, supervised, marked, [beside])


def test_deepseek_r1_closes_an_empty_thought_before_the_last_answer_which_trl_does_not_show() -> None:
    tokenizer = tokenizer_of("deepseek_r1_distill", DEEPSEEK, "bytes")
    encoder = Encoder(tokenizer, 4096)
    for messages in conversations("deepseek", "bytes", takes_system=True):
        ids, marked = trl("deepseek_r1_distill", tokenizer, messages)
        given, supervised = ours(encoder, messages, ids[0])
        start, _ = runs(supervised)[-1]
        size = next(n for n in range(1, start) if tokenizer.decode(given[start - n : start]) == _THOUGHT)
        del given[start - size : start], supervised[start - size : start]
        assert given == ids
        assert_marks(tokenizer, ids, supervised, marked, [("<｜Assistant｜>", "")] * answers(messages))
