"""Validate between two steps: compute the loss on the validation rows, and generate sample answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.data.examples import Example
from toolkit.evaluation.cut_model import CutModel
from toolkit.frozen.residence import kept_in_memory
from toolkit.inference.evaluation import Evaluation, evaluate_rows
from toolkit.inference.generation import can_complete_together, complete_together
from toolkit.runtime import signals
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import FrostlineError
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.split.prefix import Prefix
from toolkit.training.answer_pace import AnswerPace
from toolkit.training.context import RunContext
from toolkit.training.monitor import Answer
from toolkit.training.phases import PhaseState

T = TypeVar("T")
_MOST_TOGETHER = 8
"""Sample answers that are generated together, a token of each in every pass: each has a key-value cache."""


def validate(context: RunContext, state: PhaseState, may_stop: bool) -> Evaluation:
    """Compute the loss on the validation rows, which must not be empty; every rank calls it with dropout off.

    Raises:
        StopRequested: a signal came and ``may_stop`` is True; raised on every rank.
    """
    return evaluate_rows(
        state.engine.forward_loss, state.prefix, context.dataset.validation, context.batch_plan.micro_batch_size,
        context.pad_id, context.world, state.packing.on, may_stop, context.batch_plan.micro_batch_tokens,
    )  # fmt: skip


@contextmanager
def without_dropout(state: PhaseState) -> Iterator[None]:
    """Set engine and prefix to evaluation mode within the context, which turns dropout off."""
    prefix = state.prefix if isinstance(state.prefix, Prefix) else None  # a cached prefix has no dropout
    state.engine.train(False)
    if prefix:
        prefix.eval()
    try:
        yield
    finally:
        state.engine.train(True)
        if prefix:
            prefix.train()


def sample_answers(
    context: RunContext, state: PhaseState, may_stop: bool = False, epoch_seconds: float = math.inf
) -> list[Answer]:
    """Generate answers to the first validation rows with the current weights; every rank calls it with dropout off.

    The rows are divided among ranks, and every rank returns all answers. A prefix that was freed, or lies on the host
    or in files, is loaded once for all of them, to where it fits. Under ZeRO-3 the suffix is gathered on each rank for
    the duration. If the answers will take longer than ``epoch_seconds``, the log says so after the first tokens.

    Raises:
        FrostlineError: some rank failed; raised on every rank.
        StopRequested: a signal came and ``may_stop`` is True; raised on every rank.
    """
    world = context.world
    rows = list(context.dataset.validation[: context.config.output.sample_answers])
    if not rows:
        return []
    _gather_results(world, lambda: _require_gathering_memory(state, world))
    own_rows = rows[world.rank :: world.size]
    with state.engine.gathered():
        answers_by_rank = _gather_results(world, lambda: _answers(context, state, own_rows, may_stop, epoch_seconds))
    if may_stop:
        world.raise_if_stopping()
    texts: dict[int, str] = {}
    for rank, answers in enumerate(answers_by_rank):
        texts |= {rank + world.size * index: text for index, text in enumerate(answers)}
    return [
        Answer(_decode(context, _prompt_ids(row)), _decode(context, row.token_ids[slice(*row.spans[-1])]), texts[index])
        for index, row in enumerate(rows)
    ]


def compute_metrics(context: RunContext, state: PhaseState, answers: Sequence[Answer]) -> dict[str, float]:
    """Compute the metrics that ``output.evaluate_metrics`` asks for; every rank calls it with dropout off.

    The rows are divided among ranks, and every rank returns the same values. Under ZeRO-3 the suffix is gathered on
    each rank for the duration. ``answers`` are those to the first validation rows.

    Raises:
        FrostlineError: some rank failed; raised on every rank.
    """
    metrics, world = context.metrics, context.world
    assert metrics is not None
    likelihoods: dict[int, np.ndarray] = {}
    if metrics.queries:
        model = CutModel(state.suffix, state.prefix, context.encoder, context.pad_id, world)
        size = context.batch_plan.micro_batch_size
        _gather_results(world, lambda: _require_gathering_memory(state, world))
        with state.engine.gathered():
            for of_rank in _gather_results(world, lambda: metrics.likelihoods(model, size)):
                likelihoods |= of_rank
    return metrics.values(likelihoods, [answer.answer for answer in answers])


def _require_gathering_memory(state: PhaseState, world: World) -> None:
    """Allocate as much as gathering the suffix will, so that a rank without that memory fails before the collective."""
    torch.empty(state.engine.gathered_bytes(), dtype=torch.uint8, device=world.device)


def _answers(
    context: RunContext, state: PhaseState, rows: Sequence[Example], may_stop: bool, epoch_seconds: float
) -> list[str]:
    """Generate the answers to ``rows``: together where each token copies weights, else one after the other."""
    prefix = state.prefix.offloaded_prefix() if isinstance(state.prefix, CachedPrefix) else state.prefix
    tokenizer, encoder, max_tokens = context.tokenizer, context.encoder, context.config.output.sample_tokens
    prompts, answers = [_prompt_ids(row) for row in rows], list[str]()
    with (
        state.joined.with_prefix(prefix) as model,
        kept_in_memory(prefix.frozen if prefix else None, context.world.size) as copies_weights,
        ProgressBar("sample answers", len(rows), "answer", brief=True) as bar,
    ):
        together = copies_weights and len(prompts) > 1 and can_complete_together(model, prompts, max_tokens)
        size = _MOST_TOGETHER if together else 1
        pace = AnswerPace(-(-len(prompts) // size), max_tokens, epoch_seconds)

        def after_token(tokens: torch.Tensor) -> bool:
            bar.advance(0, token=f"{pace.token()} of {max_tokens}")
            return may_stop and signals.stop_requested()

        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            pace.begin()
            answers += complete_together(model, tokenizer, some, encoder.stop_ids(), max_tokens, stop=after_token)
            bar.advance(len(some))
    return [encoder.answer_opening + encoder.without_closing(answer) for answer in answers]


def _gather_results(world: World, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank and return all results by rank; ``work`` must not contain collectives.

    Raises:
        FrostlineError: ``work`` failed on some rank; raised on every rank, so that none waits for another.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gathered = world.all_gather_object((result, failure))
    for rank, (_, failure_of_rank) in enumerate(gathered):
        if failure_of_rank is not None:
            raise FrostlineError(f"rank {rank}, {failure_of_rank}")
    return [result_of_rank for result_of_rank, _ in gathered]


def _prompt_ids(row: Example) -> tuple[int, ...]:
    """Return the tokens of a row before its last answer."""
    return row.token_ids[: row.answer_start]


def _decode(context: RunContext, ids: tuple[int, ...]) -> str:
    """Return the text of ``ids`` without special tokens."""
    return str(context.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
