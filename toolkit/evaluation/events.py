"""Score answers that are sets of adverse events (``verify: sdtm_ae``), beside trivial ones, and their retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from toolkit.clinical.ae_metrics import event_metrics, retrieval_recall, trivial_events
from toolkit.clinical.verification import find_check
from toolkit.data.retrieval import dictionary_of
from toolkit.data.row_samples import RowSample
from toolkit.evaluation.rows import EvaluatedRows
from toolkit.metrics.fields import field_metrics
from toolkit.metrics.metric import Metric
from toolkit.tasks.output import is_answer
from toolkit.tasks.task_file import TaskSpec

PRIMARY = "events/f1"
"""Metric by which models are compared that answer with events, where the task declares none."""


def are_events(spec: TaskSpec) -> bool:
    """Return whether a task's answers are adverse events."""
    return spec.verify == "sdtm_ae"


def metrics_of_events(spec: TaskSpec, rows: Sequence[RowSample], answers: Sequence[str]) -> list[Metric]:
    """Return the metrics of answers to the first rows; see ``toolkit.clinical.ae_metrics``."""
    references = [row.sample.answer or "" for row in rows[: len(answers)]]
    valid = field_metrics(answers, references, partial(is_answer, spec))[:1]
    values = [_columns(row) for row in rows[: len(answers)]]
    return valid + event_metrics(answers, references, values, find_check("sdtm_ae"))


def trivial_answers_of_events(rows: Sequence[RowSample]) -> dict[str, list[str]]:
    """Return trivial answers to rows, by their name."""
    return trivial_events([_columns(row) for row in rows], [row.sample.contexts for row in rows])


def retrieval_note(rows: EvaluatedRows) -> str | None:
    """Return what to say of the retrieval of terms; None where the task or the recipe has none."""
    dictionary = dictionary_of(rows.config)
    if dictionary is None or not all(are_events(row.task.spec) and row.sample.answer for row in rows.rows):
        return None
    found = retrieval_recall([row.sample.answer or "" for row in rows.rows], dictionary)
    return (
        f"Of {found['terms']:.0f} events, {dictionary.version} has the term among the first candidate for "
        f"{found['recall@1']:.1%} (recall@1) and among five for {found['recall@5']:.1%} (recall@5); for "
        f"{found['unanswerable']:.1%} it has none, which are counted."
    )


def _columns(row: RowSample) -> Mapping[str, Any]:
    return row.values if isinstance(row.values, Mapping) else {}
