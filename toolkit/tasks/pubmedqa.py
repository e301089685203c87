"""Tasks: how the columns of a row become a question, its contexts and an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.tasks.printed_lists import WrittenListError, read_written

QUESTION, CONTEXTS, ANSWER = "QUESTION", "CONTEXTS", "LONG_ANSWER"

_NOTHING = ("nan", "none", "null", "<na>")
"""How pandas and others print an empty field."""
_NO_TEXT = ("nan", "<na>")
"""Those of them that no question and no answer consists of; 'None' may be an answer."""


class RowFaultError(Exception):
    """A row that cannot be used; the message completes 'ROW …'."""


@dataclass(frozen=True)
class Sample:
    """One question to learn from or to answer."""

    question: str
    contexts: tuple[str, ...]
    answer: str | None = None
    """None when the model is to give it."""

    def prompt(self) -> str:
        """The user's text: the contexts, a blank line, the question."""
        return "\n\n".join([*self.contexts, self.question])


def pubmedqa(values: Any, with_answer: bool = True) -> Sample:
    """Read a row in PubMedQA's columns (Jin et al. 2019, arXiv 1909.06146): QUESTION, CONTEXTS, LONG_ANSWER.

    CONTEXTS is a list of strings, one string, or an object with that list as ``contexts``; a string into which a list
    or object was printed, as tables have it, is read as that (``toolkit.tasks.printed_lists``).

    Raises:
        RowFaultError: a column is missing, null, empty, or of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise RowFaultError(
            f"is a {type(values).__name__}; expected an object with columns {QUESTION}, {CONTEXTS}, {ANSWER}"
        )
    question = _string(values, QUESTION)
    contexts = _contexts(_column(values, CONTEXTS))
    return Sample(question, contexts, _string(values, ANSWER) if with_answer else None)


def _column(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise RowFaultError(f"has no column {name}; it has {', '.join(map(str, values)) or 'none'}")
    if values[name] is None:
        raise RowFaultError(f"has null in {name}; expected text")
    return values[name]


def _string(values: Mapping[str, Any], name: str) -> str:
    value = _column(values, name)
    if not isinstance(value, str):
        raise RowFaultError(f"has a {type(value).__name__} in {name}; expected text")
    if not value.strip():
        raise RowFaultError(f"has an empty {name}; expected text")
    if value.strip().lower() in _NO_TEXT:
        raise RowFaultError(f"has {value.strip()} in {name}, as tables print a missing value; expected text")
    return value.strip()


def _contexts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = _from_text(value)
    if isinstance(value, Mapping):  # as in qiaojin/PubMedQA, where lists of labels and headings stand beside it
        found = [part for key, part in value.items() if str(key).lower() == CONTEXTS.lower()]
        if len(found) != 1:
            raise RowFaultError(
                f"has in {CONTEXTS} an object with {', '.join(map(str, value)) or 'nothing'}; expected text, a list of "
                f"texts, or an object with such a list as {CONTEXTS.lower()}"
            )
        value = _from_text(found[0]) if isinstance(found[0], str) else found[0]
    if not isinstance(value, Sequence) or not all(isinstance(part, str) for part in value):
        kinds = sorted({type(part).__name__ for part in value}) if isinstance(value, Sequence) else type(value).__name__
        raise RowFaultError(f"has {kinds} in {CONTEXTS}; expected text or a list of texts")
    parts = [value] if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


def _from_text(text: str) -> Any:
    """Return what a table's field stands for: a list that was printed into it, nothing, or the text itself."""
    if text.strip().lower() in _NOTHING:
        return ()
    try:
        return read_written(text)
    except WrittenListError as fault:
        raise RowFaultError(
            f"has in {CONTEXTS} a printed list that {fault}; save the rows as JSON lines or Parquet, which keep lists"
        ) from None


TASKS = {"pubmedqa": pubmedqa}
