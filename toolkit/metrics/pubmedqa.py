"""PubMedQA's official score of a file of predictions (arXiv 1909.06146)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from toolkit.metrics.labels import label_metrics
from toolkit.runtime.errors import DataError

LABELS = ("yes", "no", "maybe")


class OfficialScore(NamedTuple):
    """Accuracy and macro-F1."""

    accuracy: float
    macro_f1: float


REASONING_REQUIRED, REASONING_FREE = OfficialScore(0.780, 0.722), OfficialScore(0.904, 0.842)
"""Score of a human annotator who reads question and context, and of one who reads the long answer too."""


def official_score(predictions: Mapping[str, str], truth: Mapping[str, str]) -> OfficialScore:
    """Score predictions as the data set's own script does: over exactly the ids of the truth.

    Raises:
        DataError: the ids are others, or an answer is none of yes, no and maybe.
    """
    missing, extra = truth.keys() - predictions.keys(), predictions.keys() - truth.keys()
    if missing or extra:
        raise DataError(
            f"the predictions lack {len(missing)} of {len(truth)} ids and have {len(extra)} others; expected exactly "
            "the ids of the official test set"
        )
    if wrong := sorted({*predictions.values(), *truth.values()} - set(LABELS)):
        raise DataError(f"{wrong[0]!r} is no answer of PubMedQA; expected one of {', '.join(LABELS)}")
    pairs = np.array([(LABELS.index(truth[key]), LABELS.index(predictions[key])) for key in truth])
    found = {metric.name: metric.value for metric in label_metrics(pairs[:, 0], pairs[:, 1], LABELS)}
    return OfficialScore(found["accuracy"], found["macro_f1"])
