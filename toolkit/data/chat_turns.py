"""Render question and answer by the chat template, and find where the answer begins and what ends it."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_rendering import Rendering, date_parts, prints_date
from toolkit.runtime.errors import DataError
from toolkit.tasks.pubmedqa import RowFaultError

_RENDER_SECONDS = 10.0
"""Time limit for rendering one conversation, in wall-clock time; templates take a millisecond."""

_DATE_MACRO = (
    "{% macro strftime_now(format) %}{% set own = namespace(text=format) %}{% for key, value in own_date.items() %}"
    "{% set own.text = own.text | replace(key, value) %}{% endfor %}{{ own.text }}{% endmacro %}{{ '' }}"
)
"""Macro that is put before a template that prints a date, to print ours: transformers takes data for templates but no
functions, and its own ``strftime_now`` prints today's. The final ``{{ '' }}`` keeps the template's first line break."""

_YES, _NO = "yes", "no"
"""Trial answers. Their first and last characters differ, so whatever text surrounds both is the template's."""

_THOUGHT_NAME = r"(?:\w+:)?(?:think\w*|thought\w*|reason\w*)"
_THOUGHT_OPENING = re.compile(rf"\s*(?P<left>[<\[◁])(?P<name>{_THOUGHT_NAME})(?P<right>[>\]▷])\s*$", re.IGNORECASE)
_THOUGHT_CLOSING = re.compile(rf"[<\[◁]/{_THOUGHT_NAME}[>\]▷]", re.IGNORECASE)
_EMPTY_THOUGHT = re.compile(rf"\s*[<\[◁]{_THOUGHT_NAME}[>\]▷]\s*[<\[◁]/{_THOUGHT_NAME}[>\]▷]\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """A user's turn and the assistant's, as text to tokenise."""

    prompt: str
    """Text up to where the answer begins."""
    answer: str
    """Text of the answer, and what closes the turn."""
    reasons: bool = False
    """True if the answer begins with a thought."""


def is_thought(mark: str) -> bool:
    """Return whether ``mark`` opens or closes a thought, such as ``<think>``."""
    return bool(_THOUGHT_OPENING.fullmatch(mark) or _THOUGHT_CLOSING.fullmatch(mark))


class Turns:
    """Renders a question and its answer by a tokenizer's chat template, or as plain text where it has none.

    Raises:
        DataError: the template cannot render a user turn, alters the prompt once an answer follows, or alters the
            answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
        self._tokenizer, self._rendering = tokenizer, rendering
        self._template = str(tokenizer.chat_template or "")
        self.thought_opening = ""
        """Mark at the end of the generation prompt that opens a thought."""
        self.lead = ""
        """Text that the template puts between generation prompt and answer; part of the prompt."""
        self.closing = str(tokenizer.eos_token or "")
        """Text that ends the answer's turn."""
        self._before_any_answer, self._before_answer, self._after_answer, self._reopens = "", "", "", False
        self._as_parts = False
        if self._template:
            try:
                self._find_affixes()
            except DataError as fault:  # a processor's template expects content as a list of parts
                self._as_parts = True
                try:
                    self._find_affixes()
                except DataError:
                    raise fault from None

    def prompt(self, question: str) -> str:
        """Return the text that an answer to ``question`` is generated from."""
        if not self._template:
            return f"{question}\n\n"
        return self._generation_prompt(question) + ("" if self._rendering.reasons else self.lead)

    def conversation(self, question: str, answer: str) -> Conversation:
        """Render ``question`` and ``answer``.

        Raises:
            RowFaultError: the template alters the answer, and not just a thought in it.
        """
        if not self._template:
            return Conversation(f"{question}\n\n", answer + self.closing)
        if self.lead.strip():
            answer = _EMPTY_THOUGHT.sub("", answer, count=1) if _EMPTY_THOUGHT.match(answer) else answer
        opening, rendered = self._generation_prompt(question), self._render_both(question, answer)
        prompt = opening + self.lead
        answer_prefix = _THOUGHT_OPENING.sub("", opening) if self._reopens else opening + self._before_any_answer
        if rendered == answer_prefix + answer + self._after_answer:
            return Conversation(prompt, self._before_answer + answer + self.closing)
        if not _THOUGHT_CLOSING.search(answer):
            raise RowFaultError(
                "has an answer that the tokenizer's chat template alters; expected it to stand in the conversation "
                "as it is, between what the template puts around every answer"
            )
        rendered_answer = rendered[len(opening) :].rstrip() if rendered.startswith(opening) else ""
        if _without_whitespace(self.thought_opening + rendered_answer) == _without_whitespace(answer + self.closing):
            return Conversation(opening, rendered_answer, reasons=True)  # the thought as the template lays it out
        if self.thought_opening.strip() and answer.startswith(self.thought_opening.strip()):
            answer = answer.removeprefix(self.thought_opening.strip()).lstrip()
        return Conversation(opening, answer + self.closing, reasons=True)  # the template would leave the thought out

    def next_turn(self) -> str:
        """Return the text from an answer's end up to the next question; empty if the template refuses a second one."""
        if not self._template:
            return ""
        turns = [self._turn("user", "question"), self._turn("assistant", _YES), self._turn("user", "question")]
        try:
            text = self._apply_template(turns)
        except DataError:
            return ""
        return text[text.rfind(_YES) + len(_YES) :]

    def _turn(self, role: str, content: str) -> dict[str, Any]:
        """Return a message for ``apply_chat_template``."""
        return {"role": role, "content": [{"type": "text", "text": content}] if self._as_parts else content}

    def _find_affixes(self) -> None:
        """Find what the template puts around any answer, by two trial answers; DataError if it alters them."""
        opening = self._generation_prompt("question")
        yes, no = (self._render_both("question", answer) for answer in (_YES, _NO))
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
        if between.strip() and "enable_thinking" in self._template:  # its own prompt for answers without a thought
            without_thought = self._apply_template(
                [self._turn("user", "question")], generation=True, enable_thinking=False
            )
            own_lead = without_thought.removeprefix(opening)
            if without_thought.startswith(opening) and own_lead and between.startswith(own_lead):
                self.lead = own_lead
        self._before_answer = between[len(self.lead) :]

    def _generation_prompt(self, question: str) -> str:
        return self._apply_template([self._turn("user", question)], generation=True)

    def _render_both(self, question: str, answer: str) -> str:
        return self._apply_template([self._turn("user", question), self._turn("assistant", answer)])

    def _apply_template(
        self, turns: Sequence[dict[str, Any]], generation: bool = False, **template_arguments: Any
    ) -> str:
        """Run the chat template on ``turns`` with the rendering's date; DataError if it fails or takes too long."""
        now = self._rendering.now
        if now is not None and prints_date(self._tokenizer):
            template_arguments |= {
                "chat_template": _DATE_MACRO + str(self._tokenizer.get_chat_template()),
                "own_date": date_parts(now),
            }
        try:
            with _time_limit():
                return str(
                    self._tokenizer.apply_chat_template(
                        list(turns), tokenize=False, add_generation_prompt=generation, **template_arguments
                    )
                )
        except Exception as error:  # a template is a program of the model's author; it can raise anything
            raise DataError(f"the tokenizer's chat template fails on a user and an assistant turn: {error}") from None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in the body after ``_RENDER_SECONDS`` of wall-clock time.

    Works on the main thread of systems with SIGALRM, if nothing else uses that signal; otherwise it sets no limit. A
    single call into C, such as the product of a text and a huge number, is not cut short.
    """
    can_use_alarm = (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    )
    if not can_use_alarm:
        yield
        return

    def raise_timeout(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than any conversation needs ({_RENDER_SECONDS:g} s)")

    signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, _RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _common_prefix(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _without_whitespace(text: str) -> str:
    return "".join(text.split())
