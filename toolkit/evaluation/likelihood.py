"""Likelihood: what a model makes of answers that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Encoder, Example
from toolkit.data.rows import Rows
from toolkit.evaluation.cut_model import CutModel
from toolkit.runtime.errors import DataError
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.split.supervised_loss import cross_entropy
from toolkit.tasks.sample import RowFaultError, Sample


@dataclass(frozen=True)
class OptionQuery:
    """The options of one question as tokens, and the one sequence of which the model's logits score them all."""

    options: tuple[tuple[int, ...], ...]
    """Tokens of each option as it follows the prompt."""
    examples: tuple[Example, ...]
    """Sequences whose supervised tokens are those that follow the prompt. One will do for all options that differ in
    their last token alone, such as letters."""

    def is_scored_by(self, example: Example) -> bool:
        """Return whether an answer's own sequence has all logits that score the options, as of letters."""
        start, known = example.answer_start, example.token_ids[example.answer_start :]
        prompt = self.examples[0].token_ids[: self.examples[0].answer_start]
        return (
            len(example.spans) == 1
            and example.token_ids[:start] == prompt
            and all(len(ids) <= example.supervised_tokens and ids[:-1] == known[: len(ids) - 1] for ids in self.options)
        )


def option_query(encoder: Encoder, sample: Sample, origin: str) -> OptionQuery:
    """Encode a question with the options that it brings.

    Raises:
        DataError: it cannot be encoded; names ``origin``.
    """
    try:
        prompt, options = encoder.encode_answers(sample, sample.options)
    except RowFaultError as fault:
        raise DataError(f"{origin} {fault}") from None
    stems = {ids[:-1]: ids for ids in options}
    longest = [
        ids for stem, ids in stems.items() if not any(stem != other and stem == other[: len(stem)] for other in stems)
    ]
    return OptionQuery(tuple(options), tuple(Example.with_answer(prompt + ids, len(prompt)) for ids in longest))


@torch.no_grad()
def answer_losses(model: CutModel, examples: Sequence[Example], batch_size: int) -> np.ndarray:
    """Compute the cross entropy of each example, summed over its supervised tokens: [examples] float64, in nats."""
    losses = np.zeros(len(examples))

    def compute(at: list[int], hidden: torch.Tensor | None, batch: Batch) -> None:
        losses[at] = model.suffix.losses_by_row(hidden, batch).double().cpu().numpy()

    _run(model, examples, batch_size, "evaluating", compute)
    return losses


@torch.no_grad()
def option_log_likelihoods(
    model: CutModel, queries: Sequence[OptionQuery], batch_size: int, key: str = "--batch-size"
) -> list[np.ndarray]:  # fmt: skip
    """Compute the log-likelihood of each option of each question: [options] float64, in nats, summed over its tokens.

    An option is scored as what follows the prompt, without what closes the turn (see ``Encoder.encode_answers``).
    ``key`` is what sets the batch size, for a message.
    """
    scores = [np.full(len(query.options), -np.inf) for query in queries]
    asked = [(row, example) for row, query in enumerate(queries) for example in query.examples]

    def compute(at: list[int], hidden: torch.Tensor | None, batch: Batch) -> None:
        for place, logits in zip(at, _logits_by_row(model, hidden, batch), strict=True):
            row, example = asked[place]
            _score_options(queries[row], example, logits, scores[row])

    _run(model, [example for _, example in asked], batch_size, "scoring options", compute, key)
    return scores


@torch.no_grad()
def answer_and_option_scores(
    model: CutModel, examples: Sequence[Example], queries: Sequence[OptionQuery], batch_size: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Compute ``answer_losses`` and ``option_log_likelihoods`` in one pass; each query ``is_scored_by`` its example."""
    losses, scores = np.zeros(len(examples)), [np.full(len(query.options), -np.inf) for query in queries]

    def compute(at: list[int], hidden: torch.Tensor | None, batch: Batch) -> None:
        targets = torch.split(batch.targets, [example.supervised_tokens for example in batch.examples])
        for place, logits, of_row in zip(at, _logits_by_row(model, hidden, batch), targets, strict=True):
            losses[place] = cross_entropy(logits, of_row).double().item()
            _score_options(queries[place], examples[place], logits, scores[place])

    _run(model, examples, batch_size, "evaluating", compute)
    return losses, scores


def _logits_by_row(model: CutModel, hidden: torch.Tensor | None, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Return [supervised, vocabulary] logits of each row."""
    logits = model.suffix.logits(hidden, batch, model.suffix.shortcuts)
    return torch.split(logits, [example.supervised_tokens for example in batch.examples])


def _score_options(query: OptionQuery, example: Example, logits: torch.Tensor, scores: np.ndarray) -> None:
    """Fill in the scores of those options of a question that a sequence with these logits scores."""
    known = example.token_ids[example.answer_start :]
    likelihoods = logits.float().log_softmax(-1).double().cpu().numpy()
    for option, ids in enumerate(query.options):
        if ids[:-1] == known[: len(ids) - 1]:
            scores[option] = likelihoods[range(len(ids)), ids].sum()


def _run(
    model: CutModel, examples: Sequence[Example], batch_size: int, text: str,
    compute: Callable[[list[int], torch.Tensor | None, Batch], None], key: str = "--batch-size",
) -> None:  # fmt: skip
    """Call ``compute`` with batches of about the same length, their numbers and hidden states, the longest first."""
    order = Rows.of(examples).longest_first().tolist()
    advice = f"{key} {batch_size // 2}" if batch_size > 1 else "data.max_length, to shorter rows"
    with ProgressBar(text, len(examples), "row", brief=True) as bar:
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            batch = collate([examples[place] for place in at], model.pad_id).to(model.world.device)
            with explain_out_of_memory("the evaluation", batch.shape_text, advice):
                compute(at, model.prefix(batch) if model.prefix else None, batch)
            bar.advance(len(at))
