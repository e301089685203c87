"""Encode samples as token ids with supervised spans; long ones lose contexts and early turns, never the last answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_rendering import Rendering
from toolkit.data.chat_turns import Piece, Turns
from toolkit.data.shortening import fit_to_length
from toolkit.data.tokenization import Pieces
from toolkit.runtime.errors import DataError
from toolkit.tasks.sample import USER, RowFaultError, Sample, Turn


@dataclass(frozen=True)
class Example:
    """Token ids of one sample: prompt, then answer and end-of-turn token; or a conversation of several turns."""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """Supervised tokens, as (start, end) of each run of them, in order; the first token of a sample is in none."""
    shortened: bool = False
    """True if contexts or early turns were cut to fit ``max_length``."""
    origin: str = field(default="", compare=False)
    """File and row, for messages: ``answers.jsonl line 12``."""
    reasons: bool = field(default=False, compare=False)
    """True if the answer begins with a thought."""
    control_token: str = field(default="", compare=False)
    """First control token whose text the row contains; empty if there is none."""
    normalised: bool = field(default=False, compare=False)
    """True if a text of the row was brought into Unicode's composed form."""
    hides_tools: bool = field(default=False, compare=False)
    """True if the row declares tools that its tokens do not show."""

    @classmethod
    def with_answer(cls, token_ids: tuple[int, ...], answer_start: int) -> Example:
        """Make an example whose tokens from index ``answer_start`` on are supervised, to the end."""
        return cls(token_ids, ((answer_start, len(token_ids)),))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ids)

    @property
    def supervised_tokens(self) -> int:
        """Return the number of tokens that the loss is taken over."""
        return sum(end - start for start, end in self.spans)

    @property
    def answer_start(self) -> int:
        """Return the index at which the last supervised answer begins; what is before it is the prompt."""
        return self.spans[-1][0]

    @property
    def content(self) -> bytes:
        """Return token ids and supervised spans as bytes, from which fingerprints are taken."""
        start, end = self.spans[0]
        spans = start if len(self.spans) == 1 and end == len(self) else self.spans
        return f"{spans} {self.token_ids}".encode()


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
        self.ends = tuple(ends)
        self.rendering = rendering
        self.turns = Turns(tokenizer, rendering)
        self._pieces = Pieces(tokenizer, rendering.parses_special)
        known = dict.fromkeys(end for end in ends if 0 <= end < len(tokenizer))
        self._word_ends = tuple(end for end in known if self._pieces.is_word(end))
        self._ends = tuple(end for end in known if end not in self._word_ends)
        marks = {*self._ends, tokenizer.eos_token_id}  # tokens that are special or end a text, not pieces of a word
        closing = self._pieces.encode(self.turns.closing)
        self._closing_marks = tuple(token for token in closing if token in marks or self._pieces.is_mark(token))
        self._appended_end = () if self._closing_marks else (self._choose_end(),)

    def prompt_ids(self, sample: Sample) -> tuple[int, ...]:
        """Encode the prompt up to where the answer begins, with contexts and early turns cut like an example's.

        Raises:
            RowFaultError: the last question alone exceeds ``max_length``, or the chat template refuses the turns.
        """
        if sample.is_text:  # which goes on where it ends
            return self._encode_prompt(sample).token_ids[-self.max_length :]
        return self._fit(sample.to_answer(), self._encode_prompt).token_ids

    def control_token(self, sample: Sample) -> str:
        """Return the first control token whose text is in a sample; an empty string if there is none."""
        return self._escaped(sample)[2]

    def encode_answers(self, sample: Sample, answers: Sequence[str]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Encode the prompt of a question, and each of some answers to it as it goes on from there.

        What closes a turn follows an answer only if the tokens of one of them begin those of another, which no model
        could tell apart otherwise; then it follows all.

        Raises:
            RowFaultError: the question alone exceeds ``max_length`` with one of the answers, the chat template refuses
                the turns, or an answer has no tokens or those of another.
        """
        longest = max(len(self._pieces.encode(answer)) for answer in answers)
        length = self.max_length - longest
        fitting, prompt = fit_to_length(sample.to_answer(), self._encode_prompt, length, self.tokenizer)
        before = "".join(piece.text for piece in self.turns.prompt(*self._escaped(fitting)[:2]))
        for closing in ("", self.turns.closing):
            texts = [f"{self.turns.before_answer}{answer}{closing}" for answer in answers]
            ids = [self._pieces.encode_after(before, text) for text in texts]
            if not closing and any(len(one) == 0 for one in ids):
                raise RowFaultError(f"has an option without tokens among {', '.join(map(repr, answers))}")
            begins = [one for one in ids for other in ids if one is not other and one == other[: len(one)]]
            if not begins:
                return prompt.token_ids, ids
        raise RowFaultError(f"has options that are the same tokens: {', '.join(map(repr, answers))}")

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
            RowFaultError: the last question and answer alone exceed ``max_length``, as does a plain text, which
                ``encode_all`` cuts; an answer has no tokens, or the chat template alters it or refuses the turns.
        """
        if not sample.is_text:
            return replace(self._fit(sample, self._encode_turns), normalised=sample.normalised)
        first, *more = self.encode_all(sample)
        if more:
            raise RowFaultError(f"is a text of more than data.max_length, {self.max_length} tokens")
        return first

    def encode_all(self, sample: Sample) -> list[Example]:
        """Encode a sample that has an answer; a plain text that is longer than ``max_length`` becomes several examples.

        Each begins with the last token of the one before, so that every token but the text's first is learned once.

        Raises:
            RowFaultError: as ``encode``.
        """
        if not sample.is_text:
            return [self.encode(sample)]
        (text,), control = self._pieces.escape_control_tokens(sample.turns[0].content)
        end = self._appended_end or (self.tokenizer.eos_token_id,)
        ids = self._pieces.encode_with_bos(text) + tuple(token for token in end if token is not None)
        if len(ids) < 2:
            raise RowFaultError("is a text without tokens; expected text that the tokenizer knows")
        starts = range(0, len(ids) - 1, self.max_length - 1)
        parts = [ids[start : start + self.max_length] for start in starts]
        return [Example(part, ((1, len(part)),), control_token=control, normalised=sample.normalised) for part in parts]

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
        if self.tokenizer.chat_template and (
            bos := self._pieces.bos_ids(turns.prompt([Turn(USER, "question")])[0].text)
        ):
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

    def _fit(self, sample: Sample, encode: Callable[[Sample], Example]) -> Example:
        """Encode ``sample`` with as much of its contexts and turns as fits."""
        fitting, example = fit_to_length(sample, encode, self.max_length, self.tokenizer)
        return example if fitting is sample else replace(example, shortened=True)

    def _encode_prompt(self, sample: Sample) -> Example:
        """Encode the prompt alone, with nothing supervised, for generation."""
        if sample.is_text:
            (text,), _ = self._pieces.escape_control_tokens(sample.turns[0].content)
            return Example(self._pieces.encode_with_bos(text), ())
        turns, tools, _ = self._escaped(sample)
        return Example(self._encode_pieces(self.turns.prompt(turns, tools))[0], ())

    def _encode_turns(self, sample: Sample) -> Example:
        """Encode a conversation; its trained answers and what closes their turns are supervised."""
        turns, tools, control = self._escaped(sample)
        conversation = self.turns.conversation(turns, tools)
        ids, spans = self._encode_pieces(conversation.pieces)
        if self._appended_end:
            ids += self._appended_end
            if conversation.answer.trained:
                spans[-1] = (spans[-1][0], len(ids))
        if any(end - start == 0 for start, end in spans) or (
            spans and spans[-1][1] - spans[-1][0] == len(self._appended_end)
        ):
            raise RowFaultError("has an answer without tokens; expected text that the tokenizer knows")
        text = "".join(piece.text for piece in conversation.pieces) if sample.tools else ""
        hides_tools = bool(sample.tools) and not self.turns.template.shows(tools, text)
        return Example(ids, tuple(spans), reasons=conversation.reasons, control_token=control, hides_tools=hides_tools)

    def _encode_pieces(self, pieces: Sequence[Piece]) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Encode the pieces of a conversation, and return the spans of those that are trained."""
        text = pieces[0].text
        ids, spans = self._pieces.encode_with_bos(text), []
        for before, piece in pairwise(pieces):
            start = len(ids)
            ids += self._pieces.encode_after(text, piece.text)
            text += piece.text
            if piece.trained:
                spans.append((start, len(ids)))
            elif before.trained and self._appended_end == ids[start : start + 1]:
                spans[-1] = (spans[-1][0], start + 1)  # the next turn begins with the mark that ends an answer
        return ids, spans

    def _escaped(self, sample: Sample) -> tuple[list[Turn], list[Mapping[str, Any]], str]:
        """Return turns and tools with the control tokens in their texts split, and the first of these tokens."""
        marks: list[str] = []

        def escape(value: Any) -> Any:
            if isinstance(value, str):
                (text,), mark = self._pieces.escape_control_tokens(value)
                marks.append(mark)
                return text
            if isinstance(value, Mapping):
                return {escape(key): escape(one) for key, one in value.items()}
            return type(value)(map(escape, value)) if isinstance(value, list | tuple) else value

        turns = [
            replace(turn, **{name: escape(getattr(turn, name)) for name in ("content", "tool_calls", "extra")})
            for turn in sample.turns
        ]
        return turns, [escape(tool) for tool in sample.tools], next((mark for mark in marks if mark), "")

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
