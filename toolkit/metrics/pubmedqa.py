"""PubMedQA's official score of a file of predictions (arXiv 1909.06146)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from toolkit.metrics.labels import label_metrics, label_numbers
from toolkit.runtime.errors import DataError

LABELS = ("yes", "no", "maybe")


class OfficialScore(NamedTuple):
    """Accuracy and macro-F1."""

    accuracy: float
    macro_f1: float


REASONING_REQUIRED, REASONING_FREE = OfficialScore(0.780, 0.722), OfficialScore(0.904, 0.842)
"""Score of a human annotator who reads question and context, and of one who reads the long answer too."""
_PEOPLE = {
    "decision": {"annotator, reasoning required (official test set)": REASONING_REQUIRED},
    "decision_reasoning_free": {"annotator, reasoning free (official test set)": REASONING_FREE},
}
"""People's score by the task of their setting."""


def official_score(predictions: Mapping[str, str], truth: Mapping[str, str]) -> OfficialScore:
    """Score predictions as the data set's own script does: over exactly the ids of the truth.

    That script takes the macro-F1 over the answers that the truth or the predictions have at all: if both lack "maybe",
    it is the mean of two. In the official test set all three are there.

    Raises:
        DataError: the ids are others, or none, or an answer is none of yes, no and maybe.
    """
    if not truth:
        raise DataError("the truth has no ids; expected those of the official test set with their answers")
    missing, extra = truth.keys() - predictions.keys(), predictions.keys() - truth.keys()
    if missing or extra:
        raise DataError(
            f"the predictions lack {len(missing)} of {len(truth)} ids and have {len(extra)} others; expected exactly "
            "the ids of the official test set"
        )
    given = {*predictions.values(), *truth.values()}
    if wrong := sorted(map(repr, given - set(LABELS))):
        raise DataError(f"{wrong[0]} is no answer of PubMedQA; expected one of {', '.join(LABELS)}")
    labels = [label for label in LABELS if label in given]
    right, predicted = (
        label_numbers(list(truth.values()), labels),
        label_numbers([predictions[key] for key in truth], labels),
    )
    found = {metric.name: metric.value for metric in label_metrics(right, predicted, labels)}
    return OfficialScore(found["accuracy"], found["macro_f1"])


def scores_of_task(
    task: str, predictions: Mapping[str, Mapping[str, str]], truth: Mapping[str, str]
) -> dict[str, OfficialScore]:
    """Return the official score of each model's predictions, of always yes, and of people in the setting of ``task``.

    None where ``task`` is not one of PubMedQA's two settings, or its labels are others. Those of people are of the
    official test set alone.
    """
    given = {*truth.values(), *(answer for of_model in predictions.values() for answer in of_model.values())}
    if task not in _PEOPLE or not predictions or not given <= set(LABELS):
        return {}
    found = {name: official_score(of_model, truth) for name, of_model in predictions.items()}
    return found | {"always yes": official_score(dict.fromkeys(truth, "yes"), truth)} | _PEOPLE[task]
