"""Validate between two steps: the loss on held-out rows, and answers to some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.data.examples import Example
from toolkit.inference.evaluation import Evaluation, evaluate_rows
from toolkit.inference.generation import complete
from toolkit.runtime import signals
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import FrostlineError
from toolkit.runtime.progress_bar import track
from toolkit.training.context import RunContext
from toolkit.training.monitor import Answer
from toolkit.training.phases import PhaseState

T = TypeVar("T")


def validate(context: RunContext, state: PhaseState, may_stop: bool) -> Evaluation:
    """Compute the loss on the validation rows, of which there are some; every rank calls it.

    The caller turns dropout off.

    Raises:
        StopRequested: a signal came, and it ``may_stop``; on every rank.
    """
    return evaluate_rows(
        state.engine.forward, state.prefix, context.dataset.validation, context.batch_plan.micro_batch_size,
        context.pad_id, context.world, state.packing.on, may_stop,
    )  # fmt: skip


@contextmanager
def without_dropout(state: PhaseState) -> Iterator[None]:
    """Turn dropout off, as when the model answers, while entered."""
    state.engine.train(False)
    if state.prefix:
        state.prefix.eval()
    try:
        yield
    finally:
        state.engine.train(True)
        if state.prefix:
            state.prefix.train()


def sample_answers(context: RunContext, state: PhaseState, may_stop: bool = False) -> list[Answer]:
    """Return what the model as it stands answers to the first validation rows; every rank calls it and gets them all.

    The ranks share the rows. A prefix that was freed is read from the model's files, block by block. Under ZeRO-3 the
    suffix is gathered on each rank meanwhile. The caller turns dropout off.

    Raises:
        FrostlineError: some rank failed; on every rank.
        StopRequested: a signal came, and it ``may_stop``; on every rank.
    """
    world = context.world
    rows = context.dataset.validation[: context.config.output.sample_answers]
    if not rows:
        return []
    _together(world, lambda: _try_room(state, world))
    with state.engine.gathered():
        every = _together(world, lambda: _own_answers(context, state, rows[world.rank :: world.size], may_stop))
    if may_stop:
        world.raise_if_stopping()
    texts: dict[int, str] = {}
    for rank, given in enumerate(every):
        texts |= {rank + world.size * index: text for index, text in enumerate(given)}
    return [
        Answer(_text(context, _prompt(row)), _text(context, row.token_ids[row.answer_start :]), texts[index])
        for index, row in enumerate(rows)
    ]


def _try_room(state: PhaseState, world: World) -> None:
    """Fail here, rather than while ranks wait for each other, where the gathered suffix has no room."""
    torch.empty(state.engine.gathered_bytes(), dtype=torch.uint8, device=world.device)


def _own_answers(context: RunContext, state: PhaseState, rows: Sequence[Example], may_stop: bool) -> list[str]:
    asked = signals.stop_requested if may_stop else None
    prefix = state.prefix.offloaded_prefix() if isinstance(state.prefix, CachedPrefix) else state.prefix
    tokenizer, most = context.tokenizer, context.config.output.sample_tokens
    with state.joined.joined(prefix) as model:
        return [
            complete(model, tokenizer, _prompt(row), context.stop_ids, most, stop=asked)
            for row in track(rows, "sample answers", "answer")
        ]


def _together(world: World, work: Callable[[], T]) -> list[T]:
    """Return what ``work``, which waits for no other rank, gives on every rank, by rank.

    Raises:
        FrostlineError: it failed on one; on every rank, so that none waits for another in vain.
    """
    given, trouble = None, None
    try:
        given = work()
    except Exception as error:
        trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    every = world.all_gather_object((given, trouble))
    for rank, (_, its) in enumerate(every):
        if its is not None:
            raise FrostlineError(f"rank {rank}, {its}")
    return [its for its, _ in every]


def _prompt(row: Example) -> tuple[int, ...]:
    return row.token_ids[: row.answer_start]


def _text(context: RunContext, ids: tuple[int, ...]) -> str:
    return str(context.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
