"""What is looked at between two steps: the loss on held-out rows, and answers to some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.data.examples import Example
from toolkit.inference.evaluation import Evaluation, evaluate
from toolkit.inference.generation import complete
from toolkit.runtime import signals
from toolkit.runtime.errors import FrostlineError
from toolkit.runtime.progress_bar import track
from toolkit.training.monitor import Answer
from toolkit.training.setup import Setup

T = TypeVar("T")


def validate(setup: Setup, may_stop: bool) -> Evaluation:
    """The loss on the validation rows, of which there are some; every rank calls it. The caller turns dropout off.

    Raises:
        StopRequested: a signal came, and it ``may_stop``; on every rank.
    """
    return evaluate(
        setup.engine.forward, setup.prefix, setup.dataset.validation, setup.plan.micro_batch_size,
        setup.pad_id, setup.world, setup.packed, may_stop,
    )  # fmt: skip


@contextmanager
def without_dropout(setup: Setup) -> Iterator[None]:
    """The model computes as it does when it answers."""
    setup.engine.train(False)
    if setup.prefix:
        setup.prefix.eval()
    try:
        yield
    finally:
        setup.engine.train(True)
        if setup.prefix:
            setup.prefix.train()


def sample_answers(setup: Setup, may_stop: bool = False) -> list[Answer]:
    """What the model as it stands answers to the first validation rows; every rank calls it and gets all of them.

    The ranks share the rows. A prefix that was let go is read from the model's files, block by block. Under ZeRO-3
    the suffix is gathered on each rank meanwhile. The caller turns dropout off.

    Raises:
        FrostlineError: some rank failed; on every rank.
        StopRequested: a signal came, and it ``may_stop``; on every rank.
    """
    world = setup.world
    rows = setup.dataset.validation[: setup.config.output.sample_answers]
    if not rows:
        return []
    _together(setup, lambda: _try_room(setup))
    with setup.engine.gathered():
        every = _together(setup, lambda: _own_answers(setup, rows[world.rank :: world.size], may_stop))
    if may_stop:
        signals.raise_if_stopping(world)
    texts: dict[int, str] = {}
    for rank, given in enumerate(every):
        texts |= {rank + world.size * index: text for index, text in enumerate(given)}
    return [
        Answer(_text(setup, _prompt(row)), _text(setup, row.token_ids[row.answer_start :]), texts[index])
        for index, row in enumerate(rows)
    ]


def _try_room(setup: Setup) -> None:
    """Fail here, rather than while ranks wait for each other, where the gathered suffix has no room."""
    torch.empty(setup.engine.gathered_bytes(), dtype=torch.uint8, device=setup.world.device)


def _own_answers(setup: Setup, rows: Sequence[Example], may_stop: bool) -> list[str]:
    tokenizer, most, asked = (
        setup.tokenizer,
        setup.config.output.sample_tokens,
        signals.stop_requested if may_stop else None,
    )
    prefix = setup.prefix.offloaded_prefix() if isinstance(setup.prefix, CachedPrefix) else setup.prefix
    with setup.active.whole.joined(prefix) as model:
        return [
            complete(model, tokenizer, _prompt(row), setup.stop_ids, most, stop=asked)
            for row in track(rows, "sample answers", "answer")
        ]


def _together(setup: Setup, work: Callable[[], T]) -> list[T]:
    """What ``work``, which waits for no other rank, gives on every rank by rank.

    Raises:
        FrostlineError: it failed on one; on every rank, so that none waits for another in vain.
    """
    given, trouble = None, None
    try:
        given = work()
    except Exception as error:
        trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    every = setup.world.all_gather_object((given, trouble))
    for rank, (_, its) in enumerate(every):
        if its is not None:
            raise FrostlineError(f"rank {rank}, {its}")
    return [its for its, _ in every]


def _prompt(row: Example) -> tuple[int, ...]:
    return row.token_ids[: row.answer_start]


def _text(setup: Setup, ids: tuple[int, ...]) -> str:
    return str(setup.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
