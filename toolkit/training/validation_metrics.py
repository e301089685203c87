"""Compute metrics of ``evaluate.py`` on the validation rows while a run trains (``output.evaluate_metrics``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Dataset
from toolkit.data.examples import Encoder
from toolkit.data.row_samples import read_samples
from toolkit.data.rows import Rows
from toolkit.data.sources import sources_of
from toolkit.evaluation.cut_model import CutModel
from toolkit.evaluation.likelihood import OptionQuery, option_log_likelihoods, option_query
from toolkit.evaluation.outputs import Outputs
from toolkit.evaluation.scoring import GENERATED, Scorer, SeveralTasksError
from toolkit.runtime.errors import ConfigError

_OF_LOSSES = ("loss", "perplexity", "bits_per_byte")
"""Metrics that are not computed here: every validation has the first two."""
_SEVERAL_TASKS = "the rows are read by several tasks, which have the loss alone in common; leave it out"
_NEEDS_ANSWERS = "; metrics of generated answers need output.sample_answers"


@dataclass(frozen=True)
class ValidationMetrics:
    """Computes what is asked of the validation rows beside their loss."""

    names: tuple[str, ...]
    scorer: Scorer
    encoder: Encoder
    queries: tuple[OptionQuery, ...]
    """Of each row, its options; none if no metric is of their likelihood."""
    needs_answers: bool
    """Whether some metric is of generated answers, those of ``output.sample_answers``."""
    higher_is_better: bool
    """Of ``train.metric_for_best_model``."""

    @classmethod
    def of(cls, config: RunConfig, dataset: Dataset, encoder: Encoder) -> ValidationMetrics | None:
        """Read the validation rows as texts, and encode their options; None if no metric is asked for.

        Raises:
            ConfigError: a metric is none that these rows have.
            DataError: a row's options cannot be encoded.
        """
        names, answers = config.output.evaluate_metrics, config.output.sample_answers
        if not names:
            return None
        sources = sources_of(config.data, "validation") or sources_of(config.data, "train")
        (rows,) = read_samples(sources, config.data, dataset.validation)
        try:
            scorer = Scorer(rows, (), answers)
        except SeveralTasksError:
            raise ConfigError(
                [f"output.evaluate_metrics is [{', '.join(names)}], but {_SEVERAL_TASKS}"], "recipe"
            ) from None
        known = {name: metric for name, metric in scorer.known().items() if name not in _OF_LOSSES}
        has_options = scorer.classes is not None
        of_options = {name for name in known if has_options and not name.startswith(GENERATED)}
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                [
                    f"output.evaluate_metrics asks for {name}; these rows have {', '.join(known) or 'none'}, beside "
                    f"loss and perplexity, which are always computed{'' if answers else _NEEDS_ANSWERS}"
                    for name in unknown
                ],
                "recipe, read against the rows",
            )
        chosen = known.get(config.train.metric_for_best_model)
        if chosen is not None and chosen.higher_is_better is None:
            raise ConfigError(
                [f"train.metric_for_best_model is {chosen.name}, of which neither more nor less is better"], "recipe"
            )
        if chosen is not None and math.isnan(chosen.value):  # whatever a model gives
            raise ConfigError(
                [
                    f"train.metric_for_best_model is {chosen.name}, which has no value on the validation rows, as none "
                    "has what it counts; choose by another"
                ],
                "recipe, read against the rows",
            )
        wanted = of_options.intersection(names)
        queries = tuple(option_query(encoder, row.sample, row.origin) for row in rows) if wanted else ()
        return cls(
            names, scorer, encoder, queries, not of_options.issuperset(names),
            bool(chosen.higher_is_better) if chosen is not None else False,
        )  # fmt: skip

    @property
    def examples(self) -> Rows | None:
        """Sequences of the options, of which the activation cache is to hold the hidden states; None without any."""
        sequences = [example for query in self.queries for example in query.examples]
        return Rows.of(sequences) if sequences else None

    def likelihoods(self, model: CutModel, batch_size: int) -> dict[int, np.ndarray]:
        """Compute the log-likelihoods of the options of this rank's rows, by row number; no collective."""
        world = model.world
        own = range(world.rank, len(self.queries), world.size)
        scores = option_log_likelihoods(
            model, [self.queries[row] for row in own], batch_size, "train.micro_batch_size"
        )  # fmt: skip
        return dict(zip(own, scores, strict=True))

    def values(self, likelihoods: Mapping[int, np.ndarray], answers: Sequence[str]) -> dict[str, float]:
        """Return the metrics by name, from the likelihoods of all rows and the answers to the first ones."""
        tokens = [np.array(list(map(len, query.options))) for query in self.queries]
        outputs = Outputs(
            log_likelihoods=[likelihoods[row] for row in range(len(self.queries))] if self.queries else None,
            option_tokens=tokens if self.queries else None,
            answers=answers if self.needs_answers else None,
        )
        found = self.scorer.metrics(outputs)
        return {name: found[name].value for name in self.names}
