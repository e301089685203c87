"""Turn what models give for each row into metrics, and score trivial answers by the same ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from toolkit.data.row_samples import RowSample
from toolkit.evaluation.documents import are_documents, metrics_of_documents
from toolkit.evaluation.events import PRIMARY, are_events, metrics_of_events, trivial_answers_of_events
from toolkit.evaluation.labels import Classes
from toolkit.evaluation.outputs import Outputs
from toolkit.evaluation.plain_baseline import NAME, plain_probabilities
from toolkit.evaluation.trivial import trivial_answers
from toolkit.evaluation.worst_cases import WorstCase, worst_cases
from toolkit.inference.constrained import require_format
from toolkit.metrics.abstention import CoveragePoint, coverage_curve, coverage_metrics
from toolkit.metrics.calibration import probability_metrics
from toolkit.metrics.fields import field_metrics
from toolkit.metrics.labels import label_metrics
from toolkit.metrics.metric import Metric, mean_metric
from toolkit.metrics.morphemes import MISSING_KIWI, tokenizer_for
from toolkit.metrics.numbers import number_metrics
from toolkit.metrics.overlap import overlap_metrics
from toolkit.metrics.perplexity import loss_metrics
from toolkit.runtime.errors import DataError
from toolkit.tasks.output import is_answer

log = logging.getLogger("frostline")

GENERATED, CONSTRAINED = "generated/", "constrained/"
"""What precedes the names of metrics of generated answers, for a task whose options are scored by likelihood too, and
of those that constrained decoding gives."""
MAJORITY, PRIOR = "majority class", "class prior"
"""Trivial answers to questions with options."""

ByName = dict[str, Metric]
"""Metrics by their name."""


class SeveralTasksError(DataError):
    """The rows that are to be answered are read by several tasks, whose answers have no metric in common."""


class Scorer:
    """Makes the metrics of the rows that models are evaluated on.

    ``train`` are the training rows, if known, and ``answers`` the most rows, from the first, that are answered by
    generation, and if ``constrained`` a second time by constrained decoding.

    Raises:
        DataError: a row that is to be answered has no answer to compare with, or another task than the others.
        UsageError: answers are to be constrained and are free text.
    """

    def __init__(
        self, rows: Sequence[RowSample], train: Sequence[RowSample], answers: int = 0, constrained: bool = False
    ) -> None:
        self.rows, self._train = rows, train
        self.answered = min(answers, len(rows))
        self._spec = rows[0].task.spec
        tasks = list(dict.fromkeys(row.task.name for row in rows if row.task.spec != self._spec))
        with_options = not tasks and all(row.sample.label is not None for row in rows)
        self.classes = Classes.of(rows, train) if with_options else None
        self._is_json = not tasks and self._spec.output != "text" and self._spec.output.json_schema is not None
        self._own_primary = None if tasks else self._spec.primary_metric
        if tasks:
            self._refuse_several_tasks([rows[0].task.name, *tasks])
        self._references = [row.sample.answer or "" for row in rows]
        self._tokenise = None
        if self.classes is None and not self._is_json:
            self._tokenise = tokenizer_for(self._references)
            if self._tokenise is None:
                log.warning("%s; they are left out of the metrics of answers", MISSING_KIWI)
        if self.answered and (unanswered := next((row for row in self.rows if not row.sample.answer), None)):
            raise DataError(f"{unanswered.origin} has no answer to compare a generated one with; leave out --answers")
        for row in self.rows[: self.answered] if constrained else ():
            require_format(row.sample)
        self._constrained = constrained

    @property
    def ids(self) -> list[str]:
        """Return the id of each row, or file and row where ids repeat: rows of several files, or no ids at all."""
        ids = [row.id for row in self.rows]
        return ids if len(set(ids)) == len(ids) else [row.origin for row in self.rows]

    @property
    def primary(self) -> str:
        """Return the metric that the task declares, or the one that its kind has by default."""
        if self._own_primary is not None:
            return self._own_primary
        if self._is_json and self.answered and are_events(self._spec):
            return PRIMARY
        return "accuracy" if self.classes is not None else "exact_match" if self._is_json and self.answered else "loss"

    def _refuse_several_tasks(self, tasks: Sequence[str]) -> None:
        """Say that rows of several tasks have losses alone in common; DataError if they are to be answered."""
        listed = ", ".join(dict.fromkeys(tasks))
        if self.answered:
            raise SeveralTasksError(
                f"the rows are read by several tasks ({listed}), and their answers have no metric in common; leave out "
                "--answers, or name the rows of one source with --data.path"
            )
        log.info("the rows are read by several tasks (%s), which have the loss alone in common", listed)

    def known(self) -> ByName:
        """Return the metrics that a model which gives everything has, of no meaning but their names and directions."""
        nothing, none_given = np.ones(len(self.rows)), [""] * self.answered if self.answered else None
        options = [np.ones(len(row.sample.options)) for row in self.rows]
        constrained = none_given if self._constrained else None
        return self.metrics(Outputs(nothing, nothing, nothing, options, options, none_given, constrained))

    def require_primary(self) -> None:
        """Raise DataError if the declared metric is none of those that models will have."""
        if self.primary not in (known := self.known()):
            raise DataError(
                f"the task's primary_metric is {self.primary}, which is not among {', '.join(known)}; name one of "
                "them. Metrics of generated answers need --answers"
            )

    def metrics(self, outputs: Outputs) -> ByName:
        """Return the metrics of what a model gives, by name."""
        found: list[Metric] = []
        if outputs.losses is not None and outputs.tokens is not None:
            unknown = np.zeros(len(outputs.losses))
            texts = unknown if outputs.text_bytes is None else outputs.text_bytes
            found += loss_metrics(outputs.losses, outputs.tokens, texts)
        if self.classes is not None and outputs.log_likelihoods is not None:
            found += self._of_probabilities(self.classes.probabilities(outputs.log_likelihoods))
            found += self._by_length(outputs)
        if outputs.answers is not None:
            found += self._of_answers(outputs.answers, GENERATED if self.classes is not None else "")
        if outputs.constrained is not None:
            found += self._of_answers(outputs.constrained, CONSTRAINED)
        return _by_name(found)

    def predictions(self, outputs: Outputs) -> dict[str, str]:
        """Return the likeliest option of each row by its id; none without options."""
        if outputs.log_likelihoods is None:
            return {}
        return {
            name: row.sample.options[int(scores.argmax())]
            for name, row, scores in zip(self.ids, self.rows, outputs.log_likelihoods, strict=True)
        }

    def furthest_off(self, outputs: Outputs) -> tuple[tuple[WorstCase, ...], tuple[CoveragePoint, ...]]:
        """Return the worst cases of labels in an order, and what abstaining gives; none of other rows."""
        if self.classes is None or not self.classes.ordered or outputs.log_likelihoods is None:
            return (), ()
        probabilities = self.classes.probabilities(outputs.log_likelihoods)
        curve = coverage_curve(self.classes.truth, probabilities)
        return worst_cases(self.classes, self.rows, self.ids, probabilities), curve

    def corrected(self, outputs: Outputs) -> ByName:
        """Return the metrics of a model without its own leaning to a class, see ``Classes.corrected``.

        None where there is no prior of training rows to put in its place.
        """
        if self.classes is None or outputs.log_likelihoods is None or not self.classes.has_prior:
            return {}
        scores = self.classes.corrected(outputs.log_likelihoods)
        return _by_name(self._of_probabilities(self.classes.probabilities(scores)))

    def trivial(self, seed: int) -> dict[str, ByName]:
        """Return the metrics of trivial answers, by their name; of texts those to the rows that are answered."""
        if self.classes is not None:
            prior = self.classes.of_prior()
            of = "the training rows" if self.classes.has_prior else "these rows"
            labels = label_metrics(self.classes.truth, prior.argmax(1), self.classes.names, self.classes.ordered)
            found = {
                f"{MAJORITY} of {of}": _by_name([one for one in labels if one.name != "valid"]),
                f"{PRIOR} of {of}": _by_name(probability_metrics(self.classes.truth, prior)),
            }
            plain = plain_probabilities(self.rows, self._train, self.classes)
            return found if plain is None else {**found, f"{NAME} of {of}": _by_name(self._of_probabilities(plain))}
        if are_events(self._spec) and self._is_json and self.answered:
            texts = trivial_answers_of_events(self.rows[: self.answered])
            return {name: _by_name(self._of_answers(answers)) for name, answers in texts.items()}
        if self._is_json or not self.answered:
            return {}
        samples = [row.sample for row in self.rows[: self.answered]]
        return {name: _by_name(self._of_answers(texts)) for name, texts in trivial_answers(samples, seed).items()}

    def _of_probabilities(self, probabilities: np.ndarray) -> list[Metric]:
        assert self.classes is not None
        truth, names = self.classes.truth, self.classes.names
        labels = label_metrics(truth, probabilities.argmax(1), names, self.classes.ordered)
        found = [one for one in labels if one.name != "valid"] + probability_metrics(truth, probabilities)
        return found + (coverage_metrics(truth, probabilities) if self.classes.ordered else [])

    def _by_length(self, outputs: Outputs) -> list[Metric]:
        """Return the accuracy of likelihoods by an option's length in tokens, and in characters."""
        assert self.classes is not None
        assert outputs.log_likelihoods is not None
        assert outputs.option_tokens is not None
        characters = [np.array(list(map(len, row.sample.options))) for row in self.rows]
        found = []
        for name, lengths in (("token", outputs.option_tokens), ("character", characters)):
            right = [
                float(classes[(scores / of_row).argmax()] == truth)
                for classes, scores, of_row, truth in zip(
                    self.classes.of_options, outputs.log_likelihoods, lengths, self.classes.truth, strict=True
                )
            ]
            found.append(mean_metric(f"accuracy_per_{name}", np.array(right)))
        return found

    def _of_answers(self, answers: Sequence[str], prefix: str = "") -> list[Metric]:
        """Return the metrics of answers to the first rows; ``prefix`` precedes their names."""
        rows, references = self.rows[: len(answers)], self._references[: len(answers)]
        if self.classes is not None:
            predicted = np.array(
                [label_of(*given) for given in zip(answers, rows, self.classes.of_options, strict=False)]
            )
            truth = self.classes.truth[: len(answers)]
            return label_metrics(truth, predicted, self.classes.names, self.classes.ordered, prefix)
        if self._is_json:
            fields = (
                metrics_of_events(self._spec, rows, answers)
                if are_events(self._spec)
                else field_metrics(answers, references, partial(is_answer, self._spec))
            )
            return [replace(metric, name=f"{prefix}{metric.name}") for metric in fields]
        found = overlap_metrics(answers, references, self._tokenise)
        if are_documents(self._spec):
            found += metrics_of_documents(rows, answers)
        elif any(row.sample.contexts for row in rows):
            found += number_metrics(answers, ["\n".join([*row.sample.contexts, row.sample.question]) for row in rows])
        return found


def label_of(answer: str, row: RowSample, classes: np.ndarray) -> int:
    """Return the class of the option that an answer is, but for case, blanks and a full stop; -1 if it is none.

    Of answers that go on after their option, as with a reason, the first line counts.
    """
    answer = answer.strip().partition("\n")[0] if row.sample.explained else answer
    if answer in row.sample.options:
        return int(classes[row.sample.options.index(answer)])
    options = [_folded(option) for option in row.sample.options]
    return int(classes[options.index(_folded(answer))]) if options.count(_folded(answer)) == 1 else -1


def _folded(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def _by_name(metrics: Sequence[Metric]) -> ByName:
    return {metric.name: metric for metric in metrics}
