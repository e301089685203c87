"""What a model gives each of a question's options, as probabilities: the confidence by which it abstains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from toolkit.data.examples import Encoder
from toolkit.data.model_limits import check_fit
from toolkit.data.rows import Rows
from toolkit.evaluation.cut_model import cut_for_evaluation
from toolkit.evaluation.likelihood import option_log_likelihoods, option_query
from toolkit.evaluation.sources import boundary_of
from toolkit.inference.open_model import OpenedModel
from toolkit.runtime.distributed import World
from toolkit.tasks.sample import Sample


def label_probabilities(
    opened: OpenedModel, samples: Sequence[Sample], origins: Sequence[str], batch_size: int
) -> list[np.ndarray]:  # fmt: skip
    """Compute the probability of each option of each sample, the same as ``evaluate.py`` scores: [options] of each.

    Raises:
        DataError: a sample cannot be encoded, or does not fit the model; names it by its origin.
    """
    loaded, config = opened.loaded, opened.config
    encoder = Encoder(loaded.tokenizer, config.data.max_length, loaded.ends, opened.rendering)
    queries = [option_query(encoder, sample, origin) for sample, origin in zip(samples, origins, strict=True)]
    rows = Rows.of([example for query in queries for example in query.examples])
    check_fit(rows, loaded.model, "name rows that fit, or shorten these")
    model = cut_for_evaluation(opened, boundary_of(opened), rows, encoder, 1, World())
    try:
        scores = option_log_likelihoods(model, queries, batch_size)
    finally:
        model.close()
    return [np.exp(of_row - np.logaddexp.reduce(of_row)) for of_row in scores]
