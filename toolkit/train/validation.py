"""What is looked at between two steps: the loss on held-out rows, and answers to some of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from toolkit import stop
from toolkit.data.examples import Encoder, Example
from toolkit.evaluate import evaluate
from toolkit.generate import complete
from toolkit.monitor import Answer, Monitor
from toolkit.prefix.cached import CachedPrefix
from toolkit.progress_bar import track
from toolkit.stop import StopRequested
from toolkit.train.progress import Progress
from toolkit.train.setup import Setup


def validate(setup: Setup, monitor: Monitor, progress: Progress, may_stop: bool = True) -> bool:
    """Log the loss on the validation rows, if there are any, and sample answers; every rank calls it.

    Args:
        setup: of the run.
        monitor: where it is shown.
        progress: where the run is; takes the loss down.
        may_stop: a signal cuts it short.

    Returns:
        False if a signal cut it short; a run that goes on from here owes it (``is_owed``).
    """
    if not setup.dataset.validation:
        return True
    with without_dropout(setup):
        try:
            outcome = evaluate(
                setup.engine.forward, setup.prefix, setup.dataset.validation, setup.plan.micro_batch_size,
                setup.pad_id, setup.world, setup.packed, may_stop,
            )  # fmt: skip
            answers = sample_answers(setup, may_stop)
        except StopRequested:
            return False
    progress.eval_loss = outcome.loss
    monitor.answers(progress.step, answers)
    monitor.evaluation(progress.step, progress.passes, outcome.loss, outcome.perplexity)
    return True


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
    the suffix is gathered on each rank meanwhile.

    Raises:
        StopRequested: a signal came, and it ``may_stop``; on every rank.
    """
    world, tokenizer = setup.world, setup.tokenizer
    rows = setup.dataset.validation[: setup.config.output.sample_answers]
    if not rows:
        return []
    ends = Encoder(tokenizer, setup.config.data.max_length).stop_ids()
    prefix = setup.prefix.lent() if isinstance(setup.prefix, CachedPrefix) else setup.prefix
    most, asked = setup.config.output.sample_tokens, stop.asked if may_stop else None
    with setup.engine.gathered(), setup.active.whole.joined(prefix) as model:
        own = [
            complete(model, tokenizer, _prompt(row), ends, most, stop=asked)
            for row in track(rows[world.rank :: world.size], "sample answers", "answer")
        ]
    if may_stop:
        stop.pause(world)
    texts: dict[int, str] = {}
    for rank, given in enumerate(world.gather(own)):
        texts |= {rank + world.size * index: text for index, text in enumerate(given)}
    return [
        Answer(_text(setup, _prompt(row)), _text(setup, row.token_ids[row.answer_start :]), texts[index])
        for index, row in enumerate(rows)
    ]


def is_owed(setup: Setup, monitor: Monitor, progress: Progress) -> bool:
    """True if the run that is continued stopped here before it had validated; the same on all ranks."""
    every, step = setup.config.output.evaluate_every_steps, progress.step
    due = progress.cursor == 0 or (every is not None and step % every == 0)
    return step > 0 and due and not setup.world.share(monitor.has_evaluation(step))


def _prompt(row: Example) -> tuple[int, ...]:
    return row.token_ids[: row.answer_start]


def _text(setup: Setup, ids: tuple[int, ...]) -> str:
    return str(setup.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
