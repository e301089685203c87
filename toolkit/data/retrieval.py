"""Add the passages that ``data.retrieval`` finds to rows before a task reads them: in training, evaluation, answers."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.clinical.dictionary import Dictionary, open_dictionary
from toolkit.config.data_schema import DataConfig
from toolkit.config.retrieval_schema import RetrievalConfig
from toolkit.data.identifiers import texts_of
from toolkit.retrieval.retriever import open_retriever
from toolkit.runtime.errors import UsageError
from toolkit.tasks.choose import PASSAGES
from toolkit.tasks.columns import MISSING, find, match
from toolkit.tasks.sample import RowFaultError
from toolkit.tasks.task import Task


def passages_for(data: DataConfig, task: Task) -> Callable[[Any], Any]:
    """Return what adds to the values of a row the column that the task names ``passages``; the values stay as they are.

    Without ``data.retrieval`` it returns the values. It raises RowFaultError if a row lacks a column of the query or a
    date, or has passages of its own.

    Raises:
        UsageError: the task has no column ``passages`` of kind texts, or a library is not installed.
        DataError: the corpus cannot be read.
    """
    config = data.retrieval
    if config is None:
        return lambda values: values
    column = task.spec.columns.get(PASSAGES)
    if column is None or column.kind != "texts":
        raise UsageError(
            f"data.retrieval adds a column of texts that a task names {PASSAGES}, and task {task.name} has none; name "
            f"one in its columns, as in {PASSAGES}: {{path: PASSAGES, kind: texts}}"
        )
    name, find_texts = column.path[0], _finder(config)

    def with_passages(values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values  # which the task refuses
        if (own := match([str(key) for key in values], name)) is not None and values[own]:
            raise RowFaultError(f"has a column {own}, which data.retrieval fills; leave one of the two out")
        query = " ".join(text for path in config.query for text in _texts(values, path))
        return {**values, name: find_texts(query, None if config.as_of is None else _day(values, config.as_of))}

    return with_passages


def _finder(config: RetrievalConfig) -> Callable[[str, str | None], list[str]]:
    """Return what finds the texts of a query, at a day if one is given: passages of a corpus, or terms."""
    if config.dictionary is not None:
        dictionary = open_dictionary(config.dictionary)
        return lambda query, day: dictionary.candidate_names(query, config.passages)
    retriever = open_retriever(config)
    return lambda query, day: [one.text_in_prompt() for one in retriever.search(query, config.passages, day)]


def texts_for(data: DataConfig, question: str) -> list[str]:
    """Return the passages of a question that is not a row; none without ``data.retrieval``."""
    if data.retrieval is None:
        return []
    return _finder(data.retrieval)(question, None)


def retrieval_fingerprint(data: DataConfig) -> str:
    """Return the SHA-256 of the corpus or dictionary that rows get passages from; empty without one."""
    if data.retrieval is None:
        return ""
    named = data.retrieval.dictionary
    return open_retriever(data.retrieval).fingerprint if named is None else open_dictionary(named).fingerprint


def dictionary_of(data: DataConfig) -> Dictionary | None:
    """Return the dictionary whose terms rows get; None if they get none of one."""
    named = None if data.retrieval is None else data.retrieval.dictionary
    return None if named is None else open_dictionary(named)


def _texts(values: Mapping[str, Any], path: str) -> list[str]:
    value = find(values, path)
    if value is MISSING or value is None:
        raise RowFaultError(f"has no column {path}, which data.retrieval.query names")
    return list(texts_of(value))


def _day(values: Mapping[str, Any], path: str) -> str:
    """Return the date at ``path`` of a row; of a date and time the date."""
    value = find(values, path)
    try:
        return datetime.date.fromisoformat(str(value)[:10]).isoformat()
    except ValueError:
        shown = "nothing" if value is MISSING else repr(value)
        raise RowFaultError(
            f"has {shown} in {path}, which data.retrieval.as_of names; expected a date such as 2026-03-01"
        ) from None
