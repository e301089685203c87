"""Samples become token ids with a supervised span; long samples lose context, never question or answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from toolkit.data.tasks import RowFaultError, Sample
from toolkit.data.time_limit import time_limit
from toolkit.errors import DataError

_MOST_SECONDS = 10.0
"""For one conversation; templates take a millisecond."""


@dataclass(frozen=True)
class Example:
    """Token ids of one sample: prompt, then answer and end-of-turn token."""

    token_ids: tuple[int, ...]
    answer_start: int
    """Index of the first supervised token; all later ones are supervised too."""
    shortened: bool = False
    """Context was cut to fit."""
    origin: str = field(default="", compare=False)
    """File and row it was made of, as a person would look it up."""

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss is taken over."""
        return len(self.token_ids) - self.answer_start


class Encoder:
    """Turns samples into token ids with the tokenizer's chat template, or as plain text where it has none.

    Prompt and answer are tokenised apart, so the ids of the prompt are those that generation starts from, and the
    supervised span is exact.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """
        Args:
            tokenizer: needs an end-of-text token.
            max_length: longest example in tokens.

        Raises:
            DataError: the chat template cannot render a user turn, or alters the prompt once an answer follows.
        """  # noqa: D205, D212
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._leading = tuple(i for i in tokenizer("").input_ids if i != tokenizer.eos_token_id)
        self._render("question", "answer")

    def prompt_ids(self, sample: Sample) -> tuple[int, ...]:
        """Token ids up to where the answer begins, shortened like an example's.

        Raises:
            RowFaultError: the question alone exceeds ``max_length``.
        """
        return self._fit(sample, self._encode_prompt).token_ids

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the end of the text, and what the chat template closes a turn with."""
        _, answer = self._render("question", "answer")
        return sorted({int(self.tokenizer.eos_token_id), self._text_ids(answer)[-1]})

    def encode(self, sample: Sample) -> Example:
        """The example of a sample that has an answer.

        Raises:
            RowFaultError: question and answer alone exceed ``max_length``, or the answer has no tokens.
        """
        return self._fit(sample, self._encode)

    def _fit(self, sample: Sample, encode: Callable[[Sample], Example]) -> Example:
        """Encode ``sample`` with as much of its context, from the start, as ``max_length`` has room for."""
        example = encode(sample)
        if len(example.token_ids) <= self.max_length:
            return example
        bare = encode(replace(sample, contexts=()))
        if len(bare.token_ids) > self.max_length:
            raise RowFaultError(
                f"needs {len(bare.token_ids)} tokens without any context; data.max_length is {self.max_length}, "
                "so nothing could be supervised without cutting question or answer"
            )
        keep = len(self._text_ids("\n\n".join(sample.contexts)))
        while len(example.token_ids) > self.max_length and keep > 0:
            keep -= len(example.token_ids) - self.max_length
            contexts = _first_tokens(self.tokenizer, sample.contexts, max(keep, 0))
            example = encode(replace(sample, contexts=contexts))
        return replace(example if len(example.token_ids) <= self.max_length else bare, shortened=True)

    def _encode_prompt(self, sample: Sample) -> Example:
        prompt, _ = self._render(sample.prompt(), None)
        ids = self._ids(prompt)
        return Example(ids, len(ids))

    def _encode(self, sample: Sample) -> Example:
        assert sample.answer is not None
        prompt, answer = self._render(sample.prompt(), sample.answer)
        prompt_ids, answer_ids = self._ids(prompt), self._text_ids(answer)
        if not answer_ids:
            raise RowFaultError("has an answer without tokens; expected text that the tokenizer knows")
        return Example(prompt_ids + answer_ids, len(prompt_ids))

    def _render(self, prompt: str, answer: str | None) -> tuple[str, str]:
        """The text before the answer, and the answer with its end-of-turn mark."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            return f"{prompt}\n\n", f"{answer}{tokenizer.eos_token}"
        turns = [{"role": "user", "content": prompt}]
        try:
            with time_limit(_MOST_SECONDS, "it takes longer than any conversation needs"):
                before = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                if answer is None:
                    return before, ""
                turns.append({"role": "assistant", "content": answer})
                whole = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template is a program of the model's author; it can raise anything
            raise DataError(f"the tokenizer's chat template fails on a user and an assistant turn: {error}") from None
        if not whole.startswith(before) or answer.strip() not in whole[len(before) :]:
            raise DataError(
                "the tokenizer's chat template renders a prompt differently once its answer follows, so the answer's "
                "span is unknown; expected the prompt (add_generation_prompt=True) to begin the whole conversation"
            )
        return before, whole[len(before) :].rstrip()

    def _ids(self, prompt: str) -> tuple[int, ...]:
        ids = self._text_ids(prompt)
        if self._leading and ids[: len(self._leading)] != self._leading:  # most templates write the BOS themselves
            ids = self._leading + ids
        return ids

    def _text_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, contexts: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The contexts up to ``count`` tokens, cut at a character, not inside one."""
    kept: list[str] = []
    for context in contexts:
        ids = tokenizer(context, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > count:
            cut = tokenizer.decode(ids[:count], skip_special_tokens=False).rstrip("\ufffd").strip()
            return (*kept, cut) if cut else tuple(kept)
        kept.append(context)
        count -= len(ids)
    return tuple(kept)
