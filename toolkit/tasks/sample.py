"""What a task makes of a row: turns of a conversation, or plain text, and what of it may be shortened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from toolkit.runtime.printable import one_line

SYSTEM, USER, ASSISTANT, TOOL, TEXT = "system", "user", "assistant", "tool", "text"
"""Roles of turns. A turn of the role ``text`` stands alone: it is plain text, which no chat template renders."""


class RowFaultError(Exception):
    """A row cannot be used; the message is a predicate that follows the row's name, as 'has no column QUESTION'.

    It may quote the row, so what would move a terminal's cursor or begin a line in a log is escaped.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    trained: bool = False
    """True if the model is to learn this turn, which must be the assistant's, or plain text."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of an assistant, each with ``function: {name, arguments}``."""
    extra: tuple[tuple[str, str], ...] = ()
    """More keys of a tool's message for the chat template: ``name``, ``tool_call_id``."""

    def message(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        calls = {"tool_calls": [dict(call) for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": self.content, **calls, **dict(self.extra)}


@dataclass(frozen=True)
class Sample:
    """A conversation whose trained turns are learned, or whose next turn the model is to generate; or plain text."""

    turns: tuple[Turn, ...]
    contexts: tuple[str, ...] = ()
    """Texts within the turns that are cut where the sample is too long."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant may call, as JSON schemas, for the chat template."""
    label: str | None = None
    """The one of ``options`` that the answer is, or begins with."""
    allowed: Callable[[], tuple[str, ...]] = field(default=tuple, compare=False, repr=False)
    """Returns ``options``."""
    explained: bool = False
    """True if answers go on after their option, as with a reason in the lines below it."""
    schema: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """JSON schema that the answer keeps to; None if the task has none."""
    normalised: bool = field(default=False, compare=False)
    """True if a text of the row was not in Unicode's composed form (NFC) and was brought into it."""
    arrange: Callable[[tuple[str, ...]], tuple[Turn, ...]] | None = field(default=None, compare=False, repr=False)
    """Returns the turns with other contexts; None if nothing may be cut."""

    @property
    def options(self) -> tuple[str, ...]:
        """Return all answers that are allowed, rendered now; none if the answer is free text."""
        return self.allowed()

    def with_contexts(self, contexts: tuple[str, ...]) -> Sample:
        """Return the sample with other contexts, which must be without any if it has none."""
        if self.arrange is None:
            return self
        return replace(self, contexts=contexts, turns=self.arrange(contexts))

    def to_answer(self) -> Sample:
        """Return the sample without its answer, for the model to give."""
        if self.answer is None:
            return self
        arrange = None if self.arrange is None else partial(_all_but_last, self.arrange)
        return replace(self, turns=self.turns[:-1], arrange=arrange)

    @property
    def is_text(self) -> bool:
        """Return whether the sample is plain text rather than a conversation."""
        return len(self.turns) == 1 and self.turns[0].role == TEXT

    @property
    def answer(self) -> str | None:
        """Return the answer that ends the conversation; None if the model is to generate it."""
        return self.turns[-1].content if self.turns and self.turns[-1].role == ASSISTANT else None

    @property
    def question(self) -> str:
        """Return what is asked last, without contexts."""
        asked = [turn.content for turn in self.with_contexts(()).turns if turn.role in (USER, TEXT)]
        return asked[-1] if asked else ""


def ask(question: str, contexts: tuple[str, ...] = (), answer: str | None = None) -> Sample:
    """Make a sample of a question, the contexts before it, and an answer; None leaves that to the model."""
    arrange = partial(_arrange_question, question, answer)
    return Sample(arrange(contexts), contexts, arrange=arrange)


def _arrange_question(question: str, answer: str | None, contexts: tuple[str, ...]) -> tuple[Turn, ...]:
    asked = Turn(USER, "\n\n".join([*contexts, question]))
    return (asked,) if answer is None else (asked, Turn(ASSISTANT, answer, trained=True))


def _all_but_last(
    arrange: Callable[[tuple[str, ...]], tuple[Turn, ...]], contexts: tuple[str, ...]
) -> tuple[Turn, ...]:
    return arrange(contexts)[:-1]
