"""What a model makes of the rows that it is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from toolkit.data.examples import Encoder, Example
from toolkit.data.model_limits import check_fit
from toolkit.data.row_samples import RowSample
from toolkit.data.rows import Rows
from toolkit.evaluation.cut_model import cut_for_evaluation
from toolkit.evaluation.likelihood import (
    OptionQuery,
    answer_and_option_scores,
    answer_losses,
    option_log_likelihoods,
    option_query,
)
from toolkit.evaluation.rows import EvaluatedRows, starts_of
from toolkit.inference.answering import Answerer
from toolkit.inference.open_model import OpenedModel
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.tasks.sample import SYSTEM, RowFaultError, Sample


@dataclass(frozen=True)
class Asked:
    """Says what is computed of every model."""

    batch_size: int = 1
    """Rows computed at once."""
    answers: int = 0
    """Rows, from the first, that are answered by generation."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    constrained: bool = False
    """Whether these are answered a second time, by constrained decoding."""
    keeps_predictions: bool = False
    """Whether what single rows are given is wanted: then it is an error if they have neither options nor answers."""


@dataclass(frozen=True)
class Outputs:
    """Holds what a model, or a trivial method, gives for each row; None for what it does not give."""

    losses: np.ndarray | None = None
    """[rows] cross entropy in nats, summed over a row's supervised tokens."""
    tokens: np.ndarray | None = None
    """[rows] supervised tokens, with those that end answers."""
    text_bytes: np.ndarray | None = None
    """[rows] bytes in UTF-8 of the text that these tokens are; 0 where that is not known."""
    log_likelihoods: Sequence[np.ndarray] | None = None
    """[options] of each row, in nats, summed over the option's tokens."""
    option_tokens: Sequence[np.ndarray] | None = None
    """[options] of each row: tokens of each option."""
    answers: Sequence[str] | None = None
    """Generated answers to the first rows."""
    constrained: Sequence[str] | None = None
    """Answers to them that constrained decoding gives."""

    @classmethod
    def joined(cls, parts: Sequence[Outputs]) -> Outputs:
        """Join what models give for one part of the rows each."""
        return cls(*(_joined([getattr(part, one.name) for part in parts]) for one in fields(cls)))

    def take(self, places: Sequence[int]) -> Outputs:
        """Return what is given for some of the rows, in this order."""
        return Outputs(*(_taken(getattr(self, one.name), places) for one in fields(self)))


def _joined(parts: Sequence[Any]) -> Any:
    if parts[0] is None:
        return None
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [one for part in parts for one in part]


def _taken(values: Any, places: Sequence[int]) -> Any:
    return (
        None if values is None else values[places] if isinstance(values, np.ndarray) else [values[at] for at in places]
    )


def encode_rows(
    encoder: Encoder, rows: Sequence[RowSample], samples: Sequence[Sample] | None = None
) -> tuple[Rows, np.ndarray]:  # fmt: skip
    """Encode rows, or other samples in their place; return their examples, and the number of each row's first one.

    Raises:
        DataError: a row cannot be encoded.
    """
    every = [row.sample for row in rows] if samples is None else samples
    parts = [_encode(encoder, sample, row) for sample, row in zip(every, rows, strict=True)]
    return Rows.of([example for part in parts for example in part]), starts_of(list(map(len, parts)))


def compute_outputs(
    opened: OpenedModel, rows: EvaluatedRows, asked: Asked, boundary: int | None, models: int,
    shots: Sequence[Sample] = (), is_first: bool = False,
) -> Outputs:  # fmt: skip
    """Compute the losses of the references, the likelihoods of options, and answers, in this one process.

    ``boundary`` and ``models`` are those of ``cut_for_evaluation``; ``shots`` are answered samples that precede every
    question. Of the model that the rows were read for (``is_first``) the tokens are known.

    Raises:
        DataError: a row does not fit the model.
    """
    encoder = encoder_for(opened, rows)
    samples = [with_shots(row.sample, fitting_shots(row.sample, shots, encoder)) for row in rows.rows]
    examples, starts = rows.examples, rows.starts
    if not is_first:
        examples, starts = encode_rows(encoder, rows.rows, samples)
    has_options = all(row.sample.label is not None for row in rows.rows)
    queries = [
        option_query(encoder, sample, row.origin) for sample, row in zip(samples, rows.rows, strict=True) if has_options
    ]
    at_once = len(queries) == len(examples) and all(map(OptionQuery.is_scored_by, queries, examples))
    sequences = [example for query in queries for example in query.examples if not at_once]
    every = examples + Rows.of(sequences) if sequences else examples
    check_fit(every, opened.loaded.model, "name rows that fit, or shorten these")
    model = cut_for_evaluation(opened, boundary, every, encoder, models, World())
    try:
        if at_once:
            losses, likelihoods = answer_and_option_scores(model, examples, queries, asked.batch_size)
        else:
            losses = answer_losses(model, examples, asked.batch_size)
            likelihoods = option_log_likelihoods(model, queries, asked.batch_size)
    finally:
        model.close()
    return Outputs(
        np.add.reduceat(losses, starts), np.add.reduceat(examples.supervised, starts),
        np.array([_text_bytes(row.sample, examples[int(first)]) for row, first in zip(rows.rows, starts, strict=True)]),
        likelihoods if has_options else None,
        [np.array(list(map(len, query.options))) for query in queries] if has_options else None,
        *(
            generate_answers(opened, samples[: asked.answers], asked, rows.config.max_length, constrains)
            if wanted
            else None
            for constrains, wanted in ((False, asked.answers), (True, asked.answers and asked.constrained))
        ),
    )  # fmt: skip


def _text_bytes(sample: Sample, example: Example) -> int:
    """Return the bytes of the turns that are scored; 0 where turns were cut to fit, or are calls of tools."""
    trained = [turn for turn in sample.turns if turn.trained]
    if not sample.is_text and (len(trained) != len(example.spans) or any(turn.tool_calls for turn in trained)):
        return 0
    return sum(len(turn.content.encode("utf-8", "surrogatepass")) for turn in trained)


def encoder_for(opened: OpenedModel, rows: EvaluatedRows) -> Encoder:
    """Return what encodes the rows for a model, by its own chat template."""
    loaded = opened.loaded
    return Encoder(loaded.tokenizer, rows.config.max_length, loaded.ends, opened.rendering)


def fitting_shots(sample: Sample, shots: Sequence[Sample], encoder: Encoder) -> Sequence[Sample]:
    """Return the last of some answered samples, as many as fit before a question: its contexts are not cut for them."""
    while shots:
        try:
            if not encoder.encode(with_shots(sample, shots)).shortened:
                break
        except RowFaultError:
            pass
        shots = shots[1:]
    return shots


def with_shots(sample: Sample, shots: Sequence[Sample]) -> Sample:
    """Return a sample with answered ones before its question; contexts of a sample with shots are not cut any more."""
    if not shots:
        return sample
    system = sample.turns[:1] if sample.turns[0].role == SYSTEM else ()
    before = [replace(turn, trained=False) for shot in shots for turn in shot.turns if turn.role != SYSTEM]
    return replace(sample, turns=(*system, *before, *sample.turns[len(system) :]), arrange=None, contexts=())


def _encode(encoder: Encoder, sample: Sample, row: RowSample) -> list[Example]:
    try:
        return encoder.encode_all(sample)
    except RowFaultError as fault:
        raise DataError(f"{row.origin} {fault}") from None


def generate_answers(
    opened: OpenedModel, samples: Sequence[Sample], asked: Asked, max_length: int, constrains: bool = False
) -> list[str]:  # fmt: skip
    """Generate the answers to samples, of prompts of at most ``max_length`` tokens, in this one process."""
    answerer = Answerer(
        opened.loaded, max_length, asked.max_new_tokens, asked.batch_size, rendering=opened.rendering,
        constrains=constrains,
    )  # fmt: skip
    answers = []
    with ProgressBar("answering", len(samples), "question", brief=True) as bar:
        answerer.on_token = lambda tokens: bar.advance(0, token=f"{tokens} of {asked.max_new_tokens}")
        for _, answer in answerer.in_order(enumerate(samples)):
            answers.append(answer or "")
            bar.advance()
    return answers
