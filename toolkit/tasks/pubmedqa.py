"""The pubmedqa task: turn the columns of a row into a question, its contexts and an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.tasks.printed_lists import PrintedListError, parse_printed_list

QUESTION, CONTEXTS, ANSWER = "QUESTION", "CONTEXTS", "LONG_ANSWER"

_EMPTY_FIELD_WORDS = ("nan", "none", "null", "<na>")
"""Words, in lower case, that pandas and others print for an empty field."""
_MISSING_TEXT_WORDS = ("nan", "<na>")
"""The subset that is never a question or an answer; 'None' may be an answer."""


class RowFaultError(Exception):
    """A row cannot be used; the message is a predicate that follows the row's name, as 'has no column QUESTION'."""


@dataclass(frozen=True)
class Sample:
    """A question with its contexts, and the answer to learn."""

    question: str
    contexts: tuple[str, ...]
    answer: str | None = None
    """None if the model is to generate it."""

    def prompt(self) -> str:
        """Return the user's turn: contexts and question, separated by blank lines."""
        return "\n\n".join([*self.contexts, self.question])


def pubmedqa(values: Any, with_answer: bool = True) -> Sample:
    """Read a row in PubMedQA's columns (Jin et al. 2019, arXiv 1909.06146): QUESTION, CONTEXTS, LONG_ANSWER.

    CONTEXTS is a list of strings, one string, or an object with that list as ``contexts``. A string that holds a
    printed list or object, as in CSV files, is parsed (``toolkit.tasks.printed_lists``).

    Args:
        values: columns of the row.
        with_answer: whether to read LONG_ANSWER, which a question to be answered lacks.

    Raises:
        RowFaultError: a column is missing, null, empty, or of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise RowFaultError(
            f"is a {type(values).__name__}; expected an object with columns {QUESTION}, {CONTEXTS}, {ANSWER}"
        )
    question = _required_text(values, QUESTION)
    contexts = _parse_contexts(_required_value(values, CONTEXTS))
    return Sample(question, contexts, _required_text(values, ANSWER) if with_answer else None)


def _required_value(values: Mapping[str, Any], name: str) -> Any:
    """Return a column's value; RowFaultError if the column is missing or null."""
    if name not in values:
        raise RowFaultError(f"has no column {name}; it has {', '.join(map(str, values)) or 'none'}")
    if values[name] is None:
        raise RowFaultError(f"has null in {name}; expected text")
    return values[name]


def _required_text(values: Mapping[str, Any], name: str) -> str:
    """Return a column's text, stripped; RowFaultError if it is not text, empty, or a printed missing value."""
    value = _required_value(values, name)
    if not isinstance(value, str):
        raise RowFaultError(f"has a {type(value).__name__} in {name}; expected text")
    if not value.strip():
        raise RowFaultError(f"has an empty {name}; expected text")
    if value.strip().lower() in _MISSING_TEXT_WORDS:
        raise RowFaultError(f"has {value.strip()} in {name}, as tables print a missing value; expected text")
    return value.strip()


def _parse_contexts(value: Any) -> tuple[str, ...]:
    """Return the non-empty texts of CONTEXTS; RowFaultError if it has none of the forms of ``pubmedqa``."""
    if isinstance(value, str):
        value = _parse_contexts_text(value)
    if isinstance(value, Mapping):  # as in qiaojin/PubMedQA, whose object also holds labels and headings
        lists = [part for key, part in value.items() if str(key).lower() == CONTEXTS.lower()]
        if len(lists) != 1:
            raise RowFaultError(
                f"has in {CONTEXTS} an object with {', '.join(map(str, value)) or 'nothing'}; expected text, a list of "
                f"texts, or an object with such a list as {CONTEXTS.lower()}"
            )
        value = _parse_contexts_text(lists[0]) if isinstance(lists[0], str) else lists[0]
    if not isinstance(value, Sequence) or not all(isinstance(part, str) for part in value):
        kinds = sorted({type(part).__name__ for part in value}) if isinstance(value, Sequence) else type(value).__name__
        raise RowFaultError(f"has {kinds} in {CONTEXTS}; expected text or a list of texts")
    parts = [value] if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


def _parse_contexts_text(text: str) -> Any:
    """Return what a text field stands for: the list or object printed in it, no contexts, or the text itself."""
    if text.strip().lower() in _EMPTY_FIELD_WORDS:
        return ()
    try:
        return parse_printed_list(text)
    except PrintedListError as fault:
        raise RowFaultError(
            f"has in {CONTEXTS} a printed list that {fault}; save the rows as JSON lines or Parquet, which keep lists"
        ) from None


TASKS = {"pubmedqa": pubmedqa}
"""Row parser by task name."""
