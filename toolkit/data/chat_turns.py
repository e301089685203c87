"""Render conversations by the chat template, and find where each answer begins and what ends it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_rendering import Rendering
from toolkit.data.chat_template import FAILS_ON_TURNS, ChatTemplate
from toolkit.runtime.errors import DataError
from toolkit.tasks.sample import ASSISTANT, USER, RowFaultError, Turn

_YES, _NO = "yes", "no"
"""Trial answers. Their first and last characters differ, so what surrounds both is the template's."""

_QUESTION = Turn(USER, "question")

_THOUGHT_NAME = r"(?:\w+:)?(?:think\w*|thought\w*|reason\w*)"
_THOUGHT_OPENING = re.compile(rf"\s*(?P<left>[<\[◁])(?P<name>{_THOUGHT_NAME})(?P<right>[>\]▷])\s*$", re.IGNORECASE)
_THOUGHT_CLOSING = re.compile(rf"[<\[◁]/{_THOUGHT_NAME}[>\]▷]", re.IGNORECASE)
_EMPTY_THOUGHT = re.compile(rf"\s*[<\[◁]{_THOUGHT_NAME}[>\]▷]\s*[<\[◁]/{_THOUGHT_NAME}[>\]▷]\s*", re.IGNORECASE)
_THOUGHT_AT_END = re.compile(rf"[<\[◁]{_THOUGHT_NAME}[>\]▷]\s*([<\[◁]/{_THOUGHT_NAME}[>\]▷]\s*)?\Z", re.IGNORECASE)


class Piece(NamedTuple):
    """A part of a rendered conversation, to be tokenised as what follows the parts before it."""

    text: str
    trained: bool = False


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: all that is before the last answer, in pieces, and that answer."""

    prompt: tuple[Piece, ...]
    """Text up to where the last answer begins; earlier answers are pieces of their own."""
    answer: Piece
    """Text of the last answer, and what closes the turn."""
    reasons: bool = False
    """True if that answer begins with a thought."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Return all pieces in order."""
        return (*self.prompt, self.answer)


def is_thought(mark: str) -> bool:
    """Return whether ``mark`` opens or closes a thought, such as ``<think>``."""
    return bool(_THOUGHT_OPENING.fullmatch(mark) or _THOUGHT_CLOSING.fullmatch(mark))


class Turns:
    """Renders conversations by a tokenizer's chat template, or as plain text where it has none.

    Raises:
        DataError: the template cannot render a user turn, alters the prompt once an answer follows, or alters the
            answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
        self._tokenizer, self._rendering = tokenizer, rendering
        self.template = ChatTemplate(tokenizer, rendering)
        self.thought_opening = ""
        """Mark at the end of the generation prompt that opens a thought."""
        self.lead = ""
        """Text that the template puts between generation prompt and answer; part of the prompt."""
        self.closing = str(tokenizer.eos_token or "")
        """Text that ends the last answer's turn."""
        self._closing_within = self.closing  # of an answer that another turn follows
        self._before_any_answer, self.before_answer, self._after_answer, self._reopens = "", "", "", False
        if self.template:
            try:
                self._find_affixes()
            except DataError as fault:  # a processor's template expects content as a list of parts
                self.template.takes_parts = True
                try:
                    self._find_affixes()
                except DataError:
                    raise fault from None
            self._closing_within = self._find_closing_within()

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[Piece, ...]:
        """Return the text that the answer to ``turns`` is generated from, in pieces.

        Raises:
            RowFaultError: the template refuses these turns.
        """
        if not self.template:
            return self._plain_text(turns)
        text = self.template.generation_prompt(turns, tools) + ("" if self._rendering.reasons else self.lead)
        return self._parted(text, turns, tools, must_find=False)

    def conversation(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """Render ``turns``, of which the last is an answer.

        Raises:
            RowFaultError: the template refuses these turns, or alters an answer that is trained, and not just a
                thought in the last one.
        """
        *asked, last = turns
        if not self.template:
            return Conversation(self._plain_text(asked), Piece(_without_calls(last) + self.closing, last.trained))
        answer = last.content
        if self.lead.strip() and not last.tool_calls:
            answer = _EMPTY_THOUGHT.sub("", answer, count=1) if _EMPTY_THOUGHT.match(answer) else answer
        opening = self.template.generation_prompt(asked, tools)
        rendered = self.template.render([*asked, replace(last, content=answer)], tools)
        found = self._last_answer(opening, rendered, replace(last, content=answer))
        return replace(found, prompt=self._parted(found.prompt[0].text, asked, tools, must_find=True))

    def _last_answer(self, opening: str, rendered: str, last: Turn) -> Conversation:
        """Return the last answer as the template lays it out, and the whole prompt before it as one piece."""
        prompt = (Piece(opening + self.lead),)
        answer_prefix = _THOUGHT_OPENING.sub("", opening) if self._reopens else opening + self._before_any_answer
        answer = last.content
        if last.tool_calls:
            within = rendered.startswith(answer_prefix) and rendered.endswith(self._after_answer)
            answer = rendered[len(answer_prefix) : len(rendered) - len(self._after_answer)] if within else ""
            if not within or not all(str(call["function"]["name"]) in answer for call in last.tool_calls):
                raise RowFaultError(
                    "has a tool call that the chat template does not show; expected one that renders it"
                )
        for text in (answer, answer.strip()):  # some templates strip what they are given
            if rendered == answer_prefix + text + self._after_answer:
                return Conversation(prompt, Piece(self.before_answer + text + self.closing, last.trained))
        if not _THOUGHT_CLOSING.search(answer):
            if not rendered.startswith(answer_prefix):
                raise RowFaultError(
                    "has turns that the chat template renders differently once their answer follows, so where that "
                    "begins is unknown; expected the prompt (add_generation_prompt=True) to begin the conversation"
                )
            raise RowFaultError(
                "has an answer that the tokenizer's chat template alters; expected it to stand in the conversation "
                "as it is, between what the template puts around every answer"
            )
        prompt = (Piece(opening),)
        rendered_answer = rendered[len(opening) :].rstrip() if rendered.startswith(opening) else ""
        if _without_whitespace(self.thought_opening + rendered_answer) == _without_whitespace(answer + self.closing):
            return Conversation(prompt, Piece(rendered_answer, last.trained), reasons=True)  # as the template has it
        if self.thought_opening.strip() and answer.startswith(self.thought_opening.strip()):
            answer = answer.removeprefix(self.thought_opening.strip()).lstrip()
        return Conversation(prompt, Piece(answer + self.closing, last.trained), reasons=True)  # the template drops it

    def _parted(
        self, text: str, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], must_find: bool
    ) -> tuple[Piece, ...]:
        """Divide the text of ``turns`` at the answers among them, each after the prompt that it was generated from.

        ``must_find`` refuses a trained answer that does not stand in the text as it is; another is no piece then.
        """
        pieces: list[Piece] = []
        done = 0
        for number, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            opening = self.template.generation_prompt(turns[:number], tools)
            bare = _THOUGHT_AT_END.sub("", opening)  # earlier answers stand without the thought that a prompt opens
            start = next((len(one) for one in (opening, bare) if text.startswith(one) and len(one) >= done), None)
            found = (
                None if start is None else self._answer_within(text[start:], turn, turns[: number + 1], tools, opening)
            )
            if start is None or found is None:
                if must_find and turn.trained:
                    raise RowFaultError(self._why_not_found(turn, number, is_prompt_kept=start is not None))
                continue
            skipped, answer = found
            pieces += [Piece(text[done : start + skipped]), Piece(answer, turn.trained)]
            done = start + skipped + len(answer)
        return (*pieces, Piece(text[done:]))

    def _answer_within(
        self, text: str, turn: Turn, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], opening: str
    ) -> tuple[int, str] | None:
        """Return how much of ``text`` is still the prompt of an answer that turns follow, and the answer in it."""
        contents = [turn.content, turn.content.strip()]
        if turn.tool_calls:
            through = self.template.render(turns, tools).removesuffix(self._after_answer)
            named = all(str(call["function"]["name"]) in through[len(opening) :] for call in turn.tool_calls)
            body = through[len(opening) :] if through.startswith(opening) and named else None
            contents = [] if body is None else [body.removeprefix(self._before_any_answer), body]
        for before, lead in ((self._before_any_answer, self.lead), ("", "")):
            for content in contents:
                if text.startswith(before + content + self._closing_within):
                    return len(lead), before[len(lead) :] + content + self._closing_within
        return None

    @staticmethod
    def _why_not_found(turn: Turn, number: int, is_prompt_kept: bool) -> str:
        """Say why an answer before the last cannot be learned."""
        remedy = "set data.train_on: last, or name in data.chat_template one that leaves it as it is"
        if _THOUGHT_CLOSING.search(turn.content):
            return (
                f"has a thought in turn {number + 1}, which the chat template drops once other turns follow; {remedy}"
            )
        if turn.tool_calls and is_prompt_kept:
            return f"has a tool call in turn {number + 1} that the chat template does not show as it was made; {remedy}"
        what = "that turn" if is_prompt_kept else "what is before it"
        return (
            f"has an answer in turn {number + 1}, and the chat template alters {what} once other turns follow; {remedy}"
        )

    def _plain_text(self, turns: Sequence[Turn]) -> tuple[Piece, ...]:
        """Return turns as texts with blank lines between, each answer ended by the end-of-text token."""
        pieces, text = [], ""
        for turn in turns:
            if turn.role == ASSISTANT:
                pieces += [Piece(text), Piece(_without_calls(turn) + self.closing, turn.trained)]
                text = ""
            else:
                text += f"{turn.content}\n\n"
        return (*pieces, Piece(text))

    def next_turn(self) -> str:
        """Return the text from an answer's end up to the next question; empty if the template refuses a second one."""
        if not self.template:
            return ""
        try:
            text = self.template.render([_QUESTION, Turn(ASSISTANT, _YES), _QUESTION])
        except RowFaultError:
            return ""
        return text[text.rfind(_YES) + len(_YES) :]

    def _find_affixes(self) -> None:
        """Find what the template puts around any answer, by two trial answers; DataError if it alters them."""
        try:
            opening = self.template.generation_prompt([_QUESTION])
            yes, no = (self.template.render([_QUESTION, Turn(ASSISTANT, answer)]) for answer in (_YES, _NO))
        except RowFaultError as fault:
            reason = str(fault).removeprefix(FAILS_ON_TURNS)
            raise DataError(f"the tokenizer's chat template fails on a user and an assistant turn: {reason}") from None
        opens = _THOUGHT_OPENING.search(opening)
        self.thought_opening = opening[opens.start("left") :] if opens else ""
        if yes.startswith(opening) and no.startswith(opening):
            self._before_any_answer = _common_prefix(yes[len(opening) :], no[len(opening) :])
            base = opening + self._before_any_answer
        elif opens and yes.startswith(base := _THOUGHT_OPENING.sub("", opening)) and no.startswith(base):
            self._reopens = True
            closing_mark = f"{opens['left']}/{opens['name']}{opens['right']}"
            self._before_any_answer = ("\n" if opening.endswith("\n") else "\n\n") + closing_mark + "\n\n"
        else:
            raise DataError(
                "the tokenizer's chat template renders a prompt differently once its answer follows, so the answer's "
                "span is unknown; expected the prompt (add_generation_prompt=True) to begin the whole conversation"
            )
        self._after_answer = yes[len(base) + len(_YES) :]
        if (yes, no) != (base + _YES + self._after_answer, base + _NO + self._after_answer):
            raise DataError(
                "the tokenizer's chat template alters an answer; expected it to stand in the conversation as it is"
            )
        self.closing = self._after_answer.rstrip()
        self._divide_lead(opening)

    def _divide_lead(self, opening: str) -> None:
        """Divide the text between generation prompt and answer: marks go to the prompt, blanks to the answer."""
        between = self._before_any_answer
        self.lead = between.rstrip(" ") if between.strip() else ""
        if between.strip() and "enable_thinking" in self.template.text:  # its own prompt for answers without a thought
            without_thought = self.template.generation_prompt([_QUESTION], enable_thinking=False)
            own_lead = without_thought.removeprefix(opening)
            if without_thought.startswith(opening) and own_lead and between.startswith(own_lead):
                self.lead = own_lead
        self.before_answer = between[len(self.lead) :]

    def _find_closing_within(self) -> str:
        """Find what ends an answer that another turn follows: what the template puts there and at the end alike."""
        following = self.next_turn()
        if not following or following.startswith(self.closing):
            return self.closing
        common = _common_prefix(self._after_answer, following)
        ends = [
            at + len(mark.content)
            for mark in self._tokenizer.added_tokens_decoder.values()
            if (at := common.rfind(mark.content)) >= 0 and mark.content.strip()
        ]
        return common[: max(ends)] if ends else common.rstrip()


def _without_calls(turn: Turn) -> str:
    """Return the text of an answer; RowFaultError if it calls tools, which only a chat template can show."""
    if turn.tool_calls:
        raise RowFaultError(
            "has a tool call, and the model has no chat template to show it; name one in data.chat_template"
        )
    return turn.content


def _common_prefix(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _without_whitespace(text: str) -> str:
    return "".join(text.split())
