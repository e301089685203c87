"""Run a tokenizer's chat template on turns, within a time limit and with the run's date."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_rendering import Rendering, date_parts, prints_date
from toolkit.tasks.sample import USER, RowFaultError, Turn

_RENDER_SECONDS = 10.0
"""Time limit for rendering one conversation, in wall-clock time; templates take a millisecond."""

FAILS_ON_TURNS = "has turns on which the tokenizer's chat template fails: "
"""What the message of a failure begins with."""

_DATE_MACRO = (
    "{% macro strftime_now(format) %}{% set own = namespace(text=format) %}{% for key, value in own_date.items() %}"
    "{% set own.text = own.text | replace(key, value) %}{% endfor %}{{ own.text }}{% endmacro %}{{ '' }}"
)
"""Macro that is put before a template that prints a date, to print ours: transformers takes data for templates but no
functions, and its own ``strftime_now`` prints today's. The final ``{{ '' }}`` keeps the template's first line break."""

_TRIAL_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "frostline_trial",
        "description": "a trial",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}},
    },
}
"""A function that shows whether a template prints functions at all."""


class ChatTemplate:
    """A tokenizer's chat template; false if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
        self._tokenizer, self._now = tokenizer, rendering.now
        self.text = str(tokenizer.chat_template or "")
        """The template itself."""
        self.takes_parts = False
        """True if it takes the content of a message as a list of parts alone."""

    def __bool__(self) -> bool:
        """Return whether there is a template."""
        return bool(self.text)

    def generation_prompt(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), **arguments: Any
    ) -> str:
        """Return the text that the answer to ``turns`` is generated from; raises as ``render``."""
        return self.render(turns, tools, add_generation_prompt=True, **arguments)

    def render(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = (), **arguments: Any) -> str:
        """Return ``turns`` as the template prints them, with the run's date.

        Raises:
            RowFaultError: the template fails on them, or takes too long.
        """
        if self._now is not None and prints_date(self._tokenizer):
            arguments |= {
                "chat_template": _DATE_MACRO + str(self._tokenizer.get_chat_template()),
                "own_date": date_parts(self._now),
            }
        if tools:
            arguments["tools"] = [dict(tool) for tool in tools]
        messages = [turn.message() for turn in turns]
        if self.takes_parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        try:
            with _time_limit():
                return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
        except Exception as error:  # a template is a program of the model's author; it can raise anything
            raise RowFaultError(f"{FAILS_ON_TURNS}{error}") from None

    def shows(self, tools: Sequence[Mapping[str, Any]], text: str) -> bool:
        """Return whether ``tools`` are in a rendered text, by their names."""
        functions = [tool.get("function", tool) for tool in tools]
        names = [str(function.get("name", "")) for function in functions if isinstance(function, Mapping)]
        return self._shows_tools and all(name in text for name in names)

    @cached_property
    def _shows_tools(self) -> bool:
        """Return whether the template prints functions; True if it refuses the trial."""
        if not self:
            return False
        try:
            return "frostline_trial" in self.generation_prompt([Turn(USER, "question")], [_TRIAL_TOOL])
        except RowFaultError:
            return True


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
