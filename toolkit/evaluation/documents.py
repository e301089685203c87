"""Score grounded documents (``verify: grounded_document``): citations beside the references', and what is verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from toolkit.clinical.document_checks import check_answer
from toolkit.clinical.document_text import citations, sentences
from toolkit.data.row_samples import RowSample
from toolkit.metrics.metric import Metric, mean_metric
from toolkit.tasks.task_file import TaskSpec


def are_documents(spec: TaskSpec) -> bool:
    """Return whether a task's answers are grounded documents."""
    return spec.verify == "grounded_document"


def metrics_of_documents(rows: Sequence[RowSample], answers: Sequence[str]) -> list[Metric]:
    """Return the metrics of answers to the first rows, none of which looks at the wording.

    ``citation_precision`` and ``citation_recall`` are shares of the citations of all answers, or references, that both
    have; ``verified`` is the share of sentences that break no rule, headings apart. See
    ``toolkit.clinical.document_checks`` for what the rules cannot see.
    """
    ours = [citations(answer) for answer in answers]
    theirs = [citations(row.sample.answer or "") for row in rows[: len(answers)]]
    shared = np.array([len(one & other) for one, other in zip(ours, theirs, strict=True)])
    counts = [sum(not sentence.is_heading for sentence in sentences(answer)) for answer in answers]
    broken = [
        len({fault.field for fault in check_answer(answer, row.values if isinstance(row.values, Mapping) else {})})
        for answer, row in zip(answers, rows, strict=False)
    ]
    verified = np.array([max(count - faults, 0) for count, faults in zip(counts, broken, strict=True)])
    return [
        mean_metric("citation_precision", shared, np.array([len(one) for one in ours])),
        mean_metric("citation_recall", shared, np.array([len(one) for one in theirs])),
        mean_metric("verified", verified, np.array([max(count, 1) for count in counts])),
    ]
