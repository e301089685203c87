"""What a plain classifier makes of the same texts: TF-IDF of letters and logistic regression, by scikit-learn.

On real triage data such baselines have won over language models, so a table of labels has one beside them.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

import numpy as np

from toolkit.data.row_samples import RowSample
from toolkit.evaluation.labels import Classes
from toolkit.tasks.output import labels_of
from toolkit.tasks.sample import Sample

log = logging.getLogger("frostline")

NAME = "TF-IDF + logistic regression"
MISSING = 'the plain baseline needs scikit-learn: pip install "scikit-learn>=1.5"; it is left out of the table'


def plain_probabilities(
    rows: Sequence[RowSample], train: Sequence[RowSample], classes: Classes
) -> np.ndarray | None:  # fmt: skip
    """Fit the baseline to the training rows, and return what it gives the others: [rows, classes].

    It reads what the model is asked, system prompt, contexts and all. Letters in runs of 2 to 4 within words, which
    needs no morphemes and so holds for Korean as for English; C is 10, nothing is tuned. None where the answers are no
    fixed labels of the task, fewer than two of them are in the training rows, or scikit-learn is missing.
    """
    known = [row for row in train if row.sample.label in classes.names]
    numbers = [classes.names.index(str(row.sample.label)) for row in known]
    if len(labels_of(rows[0].task.spec)) != len(classes.names) or len(set(numbers)) < 2:
        return None
    if importlib.util.find_spec("sklearn") is None:
        log.warning("%s", MISSING)
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    model.fit([_asked(row.sample) for row in known], numbers)
    found = np.zeros((len(rows), len(classes.names)))
    found[:, model.classes_] = model.predict_proba([_asked(row.sample) for row in rows])
    return found


def _asked(sample: Sample) -> str:
    return "\n".join(turn.content for turn in sample.to_answer().turns)
