"""What is looked at between two steps: the loss on held-out rows."""

from __future__ import annotations

from toolkit.evaluate import evaluate
from toolkit.monitor import Monitor
from toolkit.stop import StopRequested
from toolkit.train.setup import Setup


def validate(setup: Setup, monitor: Monitor, step: int, may_stop: bool = True) -> bool:
    """Log the loss on the validation rows, if there are any; every rank calls it.

    Args:
        setup: of the run.
        monitor: where it is shown.
        step: steps done.
        may_stop: a signal cuts it short.

    Returns:
        False if a signal cut it short; a run that goes on from here owes it (``is_owed``).
    """
    if not setup.dataset.validation:
        return True
    setup.engine.train(False)
    if setup.prefix:
        setup.prefix.eval()
    try:
        outcome = evaluate(
            setup.engine.forward, setup.prefix, setup.dataset.validation, setup.plan.micro_batch_size, setup.pad_id,
            setup.world, setup.packed, may_stop,
        )  # fmt: skip
    except StopRequested:
        return False
    finally:
        setup.engine.train(True)
        if setup.prefix:
            setup.prefix.train()
    monitor.evaluation(step, step / setup.plan.steps_per_epoch, outcome.loss, outcome.perplexity)
    return True


def is_owed(setup: Setup, monitor: Monitor, step: int) -> bool:
    """True if the run that is continued stopped after ``step`` steps before it had validated; the same on all ranks."""
    every = setup.config.output.evaluate_every_steps
    due = step % setup.plan.steps_per_epoch == 0 or (every is not None and step % every == 0)
    return step > 0 and due and not setup.world.share(monitor.has_evaluation(step))
