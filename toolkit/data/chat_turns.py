"""A question and its answer as the turns of a chat template: where the answer begins, and what ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_rendering import Rendering, date_parts, prints_date
from toolkit.data.time_limit import time_limit
from toolkit.runtime.errors import DataError
from toolkit.tasks.pubmedqa import RowFaultError

_MOST_SECONDS = 10.0
"""For one conversation; templates take a millisecond."""

_DATED = (
    "{% macro strftime_now(format) %}{% set own = namespace(text=format) %}{% for key, value in own_date.items() %}"
    "{% set own.text = own.text | replace(key, value) %}{% endfor %}{{ own.text }}{% endmacro %}{{ '' }}"
)
"""Put before a template that prints a date. transformers hands templates data, not functions, and its own is today's;
what it ends with keeps the template's first line break."""

_YES, _NO = "yes", "no"
"""Answers whose first and last characters differ, so that what surrounds both is the template's."""

_THOUGHT = r"(?:\w+:)?(?:think\w*|thought\w*|reason\w*)"
_OPENS = re.compile(rf"\s*(?P<left>[<\[◁])(?P<name>{_THOUGHT})(?P<right>[>\]▷])\s*$", re.IGNORECASE)
_CLOSES = re.compile(rf"[<\[◁]/{_THOUGHT}[>\]▷]", re.IGNORECASE)
_EMPTY = re.compile(rf"\s*[<\[◁]{_THOUGHT}[>\]▷]\s*[<\[◁]/{_THOUGHT}[>\]▷]\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """A user's turn and the assistant's."""

    prompt: str
    """Up to where the answer begins."""
    answer: str
    """With what closes the turn."""
    reasons: bool = False
    """The answer begins with a thought."""


def is_thought(mark: str) -> bool:
    """Return whether ``mark`` opens or closes a thought."""
    return bool(_OPENS.fullmatch(mark) or _CLOSES.fullmatch(mark))


class Turns:
    """Renders a question and its answer by a tokenizer's chat template, or as plain text where it has none.

    Args:
        tokenizer: with its template.
        rendering: the date to print, and if answers are to begin with a thought.

    Raises:
        DataError: the template cannot render a user turn, alters the prompt once an answer follows, or alters the
            answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
        self._tokenizer, self._rendering = tokenizer, rendering
        self._template = str(tokenizer.chat_template or "")
        self.opened, self.lead, self.closing = "", "", str(tokenizer.eos_token or "")
        self._between, self._before_answer, self._rest, self._reopens = "", "", "", False
        self._in_parts = False
        if self._template:
            self._find_form()

    def prompt(self, question: str) -> str:
        """Return the text that an answer to ``question`` is generated from."""
        if not self._template:
            return f"{question}\n\n"
        return self._opening(question) + ("" if self._rendering.reasons else self.lead)

    def conversation(self, question: str, answer: str) -> Conversation:
        """Render ``question`` and ``answer`` as the template has them.

        Raises:
            RowFaultError: the template alters the answer, which is no thought that it leaves out or lays out anew.
        """
        if not self._template:
            return Conversation(f"{question}\n\n", answer + self.closing)
        if self.lead.strip():
            answer = _EMPTY.sub("", answer, count=1) if _EMPTY.match(answer) else answer
        opening, whole = self._opening(question), self._render(question, answer)
        prompt = opening + self.lead
        base = self._unopened(opening) if self._reopens else opening + self._between
        if whole == base + answer + self._rest:
            return Conversation(prompt, self._before_answer + answer + self.closing)
        if not _CLOSES.search(answer):
            raise RowFaultError(
                "has an answer that the tokenizer's chat template alters; expected it to stand in the conversation "
                "as it is, between what the template puts around every answer"
            )
        own = whole[len(opening) :].rstrip() if whole.startswith(opening) else ""
        if _squeezed(self.opened + own) == _squeezed(answer + self.closing):
            return Conversation(opening, own, reasons=True)  # the thought as the template lays it out
        if self.opened.strip() and answer.startswith(self.opened.strip()):
            answer = answer.removeprefix(self.opened.strip()).lstrip()
        return Conversation(opening, answer + self.closing, reasons=True)  # the template would leave the thought out

    def next_turn(self) -> str:
        """Return what follows an answer where another question does; empty where the template does not say."""
        if not self._template:
            return ""
        turns = [self._turn("user", "question"), self._turn("assistant", _YES), self._turn("user", "question")]
        try:
            text = self._apply(turns)
        except DataError:
            return ""
        return text[text.rfind(_YES) + len(_YES) :]

    def _find_form(self) -> None:
        """Hand the template texts, or lists of parts where only those come through: a processor's template wants them.

        Raises:
            DataError: what is wrong with texts, where lists do no better.
        """
        try:
            self._probe()
        except DataError as fault:
            self._in_parts = True
            try:
                self._probe()
            except DataError:
                raise fault from None

    def _turn(self, role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": content}] if self._in_parts else content}

    def _probe(self) -> None:
        """Find out on two answers what the template puts around any."""
        opening = self._opening("question")
        yes, no = (self._render("question", answer) for answer in (_YES, _NO))
        opens = _OPENS.search(opening)
        self.opened = opening[opens.start("left") :] if opens else ""
        if yes.startswith(opening) and no.startswith(opening):
            self._between = _shared_start(yes[len(opening) :], no[len(opening) :])
            base = opening + self._between
        elif opens and yes.startswith(base := self._unopened(opening)) and no.startswith(base):
            self._reopens = True
            self._between = ("\n" if opening.endswith("\n") else "\n\n") + _closing_mark(opens) + "\n\n"
        else:
            raise DataError(
                "the tokenizer's chat template renders a prompt differently once its answer follows, so the answer's "
                "span is unknown; expected the prompt (add_generation_prompt=True) to begin the whole conversation"
            )
        self._rest = yes[len(base) + len(_YES) :]
        if (yes, no) != (base + _YES + self._rest, base + _NO + self._rest):
            raise DataError(
                "the tokenizer's chat template alters an answer; expected it to stand in the conversation as it is"
            )
        self.closing = self._rest.rstrip()
        self._divide(opening)

    def _divide(self, opening: str) -> None:
        """Divide what stands between the generation prompt and an answer: marks to the prompt, blanks to the answer."""
        between = self._between
        self.lead = between.rstrip(" ") if between.strip() else ""
        if between.strip() and "enable_thinking" in self._template:  # its own prompt for answers without a thought
            without = self._apply([self._turn("user", "question")], generation=True, enable_thinking=False)
            if without.startswith(opening) and without != opening and between.startswith(without[len(opening) :]):
                self.lead = without[len(opening) :]
        self._before_answer = between[len(self.lead) :]

    def _unopened(self, opening: str) -> str:
        """Return the generation prompt without the thought that it opens."""
        opens = _OPENS.search(opening)
        return opening[: opens.start()] if opens else opening

    def _opening(self, question: str) -> str:
        return self._apply([self._turn("user", question)], generation=True)

    def _render(self, question: str, answer: str) -> str:
        return self._apply([self._turn("user", question), self._turn("assistant", answer)])

    def _apply(self, turns: Sequence[dict[str, Any]], generation: bool = False, **more: Any) -> str:
        now = self._rendering.now
        if now is not None and prints_date(self._tokenizer):
            more |= {"chat_template": _DATED + str(self._tokenizer.get_chat_template()), "own_date": date_parts(now)}
        try:
            with time_limit(_MOST_SECONDS, "it takes longer than any conversation needs"):
                return str(
                    self._tokenizer.apply_chat_template(
                        list(turns), tokenize=False, add_generation_prompt=generation, **more
                    )
                )
        except Exception as error:  # a template is a program of the model's author; it can raise anything
            raise DataError(f"the tokenizer's chat template fails on a user and an assistant turn: {error}") from None


def _shared_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _closing_mark(opens: re.Match[str]) -> str:
    return f"{opens['left']}/{opens['name']}{opens['right']}"


def _squeezed(text: str) -> str:
    return "".join(text.split())
