"""Encode samples as token ids with a supervised span; long samples lose context, never question or answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_rendering import Rendering
from toolkit.data.chat_turns import Turns
from toolkit.data.tokenization import Pieces
from toolkit.runtime.errors import DataError
from toolkit.tasks.pubmedqa import RowFaultError, Sample


@dataclass(frozen=True)
class Example:
    """Token ids of one sample: prompt, then answer and end-of-turn token."""

    token_ids: tuple[int, ...]
    answer_start: int
    """Index of the first supervised token; all later ones are supervised too."""
    shortened: bool = False
    """True if context was cut to fit ``max_length``."""
    origin: str = field(default="", compare=False)
    """File and row, for messages: ``answers.jsonl line 12``."""
    reasons: bool = field(default=False, compare=False)
    """True if the answer begins with a thought."""
    control_token: str = field(default="", compare=False)
    """First control token whose text the row contains, encoded as plain text; empty if there is none."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ids)

    @property
    def supervised_tokens(self) -> int:
        """Return the number of tokens that the loss is taken over."""
        return len(self) - self.answer_start


class Encoder:
    """Turns samples into token ids with the tokenizer's chat template, or as plain text where it has none.

    The ids of the prompt are those that generation starts from, so the supervised span is exact: it begins where the
    answer does and ends with the token that ends an answer. See docs/data.md. ``max_length`` is in tokens; ``ends`` are
    the end-of-text tokens that the model's config files name (``SourceFiles.end_tokens``).

    Raises:
        DataError: the chat template cannot render a user turn, or alters the prompt once an answer follows; or
            neither it nor the model says what ends an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, ends: Sequence[int] = (),
        rendering: Rendering = Rendering(),
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.rendering = rendering
        self.turns = Turns(tokenizer, rendering)
        self._pieces = Pieces(tokenizer)
        known = dict.fromkeys(end for end in ends if 0 <= end < len(tokenizer))
        self._word_ends = tuple(end for end in known if self._pieces.is_word(end))
        self._ends = tuple(end for end in known if end not in self._word_ends)
        marks = {*self._ends, tokenizer.eos_token_id}  # tokens that are special or end a text, not pieces of a word
        closing = self._pieces.encode(self.turns.closing)
        self._closing_marks = tuple(token for token in closing if token in marks or self._pieces.is_mark(token))
        self._appended_end = () if self._closing_marks else (self._choose_end(),)

    def prompt_ids(self, sample: Sample) -> tuple[int, ...]:
        """Encode the prompt up to where the answer begins, with its context cut like an example's.

        Raises:
            RowFaultError: the question alone exceeds ``max_length``.
        """
        return self._fit_to_max_length(sample, self._encode_prompt).token_ids

    def stop_ids(self) -> list[int]:
        """Return the tokens that end an answer: those that close a turn, and the ends of tokenizer and model."""
        eos = self.tokenizer.eos_token_id
        return sorted({*self._closing_marks, *self._appended_end, *self._ends, *([] if eos is None else [int(eos)])})

    def without_closing(self, answer: str) -> str:
        """Strip from a generated answer the words that close one in the template (``###``) and are learned with it."""
        ids, stops = self._pieces.encode(self.turns.closing), set(self.stop_ids())
        at = next((n for n, token in enumerate(ids) if token in stops), len(ids))
        words = str(self.tokenizer.decode(list(ids[: at + 1]), skip_special_tokens=True)).strip()
        return answer.removesuffix(words).rstrip() if words else answer

    def encode(self, sample: Sample) -> Example:
        """Encode a sample that has an answer.

        Raises:
            RowFaultError: question and answer alone exceed ``max_length``, the answer has no tokens, or the chat
                template alters it.
        """
        return self._fit_to_max_length(sample, self._encode_conversation)

    @property
    def answer_opening(self) -> str:
        """Return the part of an answer that the prompt already holds: the opening mark of a thought, or nothing."""
        return self.turns.thought_opening if self.rendering.reasons else ""

    def notes(self) -> list[str]:
        """Return a line for the log on each thing that a user of the chat template would not expect."""
        turns, lines = self.turns, []
        if self._appended_end and self.tokenizer.chat_template:
            (end,) = self._appended_end
            lines.append(
                f"the chat template has no mark after an answer; {self._show(end)}, which "
                f"{'the model' if end in self._ends else 'the tokenizer'} lists as an end, is appended and trained"
            )
        if turns.lead and not self.rendering.reasons:
            lines.append(
                f"the chat template puts {turns.lead!r} before answers: it belongs to the prompt, in training and "
                "generation, and is not trained"
            )
        if self.tokenizer.chat_template and (bos := self._pieces.bos_ids(turns.prompt("question"))):
            lines.append(
                f"the tokenizer begins a text with {self._show(bos[0])} and the chat template does not: it begins "
                "every row, in training and generation; apply_chat_template alone leaves it out"
            )
        if self._word_ends:
            lines.append(
                f"the model lists {', '.join(map(self._show, self._word_ends))} as an end of its texts, which in this "
                "tokenizer is part of a word: answers do not end there, and exports do not list it"
            )
        if not self.tokenizer.is_fast:
            lines.append(
                "this tokenizer gives no offsets: where a token lies on both sides of an answer's beginning, the whole "
                "answer is tokenised as what follows its prompt"
            )
        return lines

    def _fit_to_max_length(self, sample: Sample, encode: Callable[[Sample], Example]) -> Example:
        """Encode ``sample`` with as much of its context, from the start, as fits; RowFaultError if none does."""
        example = encode(sample)
        if len(example) <= self.max_length:
            return example
        bare = encode(replace(sample, contexts=()))
        if len(bare) > self.max_length:
            raise RowFaultError(
                f"needs {len(bare)} tokens without any context; data.max_length is {self.max_length}, "
                "so nothing could be supervised without cutting question or answer"
            )
        context_tokens = len(self._pieces.encode("\n\n".join(sample.contexts)))
        while len(example) > self.max_length and context_tokens > 0:
            context_tokens -= len(example) - self.max_length
            contexts = _cut_contexts(self.tokenizer, sample.contexts, max(context_tokens, 0))
            example = encode(replace(sample, contexts=contexts))
        return replace(example if len(example) <= self.max_length else bare, shortened=True)

    def _encode_prompt(self, sample: Sample) -> Example:
        """Encode the prompt alone, with nothing supervised, for generation."""
        (question,), _ = self._pieces.escape_control_tokens(sample.prompt())
        ids = self._pieces.encode_with_bos(self.turns.prompt(question))
        return Example(ids, len(ids))

    def _encode_conversation(self, sample: Sample) -> Example:
        """Encode prompt and answer; the answer and what closes its turn are supervised."""
        assert sample.answer is not None
        (question, answer), control = self._pieces.escape_control_tokens(sample.prompt(), sample.answer)
        conversation = self.turns.conversation(question, answer)
        prompt = self._pieces.encode_with_bos(conversation.prompt)
        answer_ids = self._pieces.encode_after(conversation.prompt, conversation.answer) + self._appended_end
        if len(answer_ids) == len(self._appended_end):
            raise RowFaultError("has an answer without tokens; expected text that the tokenizer knows")
        return Example(prompt + answer_ids, len(prompt), reasons=conversation.reasons, control_token=control)

    def _choose_end(self) -> int:
        """Choose the token to append to an answer if the template closes it with no mark.

        It is that one of the model's ends with which the template begins the next turn; else the tokenizer's end of
        text if the model lists it or lists none; else the first that the model lists. DataError if there is none.
        """
        eos = self.tokenizer.eos_token_id
        following = self._pieces.encode(self.turns.next_turn().lstrip())[:1]
        for end in (*following, eos):
            if end in self._ends:
                return int(end)
        if not self._ends and eos is None:
            raise DataError(
                "nothing says what ends an answer: the chat template has no mark after it, and neither the model's "
                "generation_config.json nor its config.json nor the tokenizer names an eos_token_id; expected one"
            )
        return self._ends[0] if self._ends else int(eos)

    def _show(self, token: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token)!r} (id {token})"


def _cut_contexts(tokenizer: PreTrainedTokenizerBase, contexts: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Cut the contexts to ``count`` tokens in all; a character whose tokens are cut apart is dropped."""
    kept: list[str] = []
    for context in contexts:
        ids = tokenizer(context, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > count:
            cut = tokenizer.decode(ids[:count], skip_special_tokens=False).rstrip("\ufffd").strip()
            return (*kept, cut) if cut else tuple(kept)
        kept.append(context)
        count -= len(ids)
    return tuple(kept)
