"""The training step: the same lines for one process and for a cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.data.batches import Batch
from toolkit.distributed import World
from toolkit.engine.base import Engine
from toolkit.errors import FrostlineError
from toolkit.loss import supervised_loss
from toolkit.prefix.cached import HiddenStates


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks."""

    loss: float
    learning_rate: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    seconds: float


def train_step(micro_batches: Sequence[Batch], prefix: HiddenStates | None, engine: Engine, world: World) -> StepResult:
    """One optimizer step on this rank's micro batches.

    Raises:
        FrostlineError: loss or gradient is NaN or infinite.
    """
    started = time.perf_counter()
    supervised, tokens = world.sum(
        sum(batch.supervised_tokens for batch in micro_batches),
        sum(batch.tokens for batch in micro_batches if not batch.is_filler),
    )
    share = torch.zeros((), device=world.device)
    for index, batch in enumerate(micro_batches, start=1):
        batch = batch.to(world.device)
        hidden = prefix(batch) if prefix else None
        loss = supervised_loss(engine.forward, hidden, batch, supervised)
        engine.backward(loss, is_last=index == len(micro_batches))
        share += loss.detach()
    update = engine.update()
    own_share, grad_norm = torch.stack((share, update.grad_norm)).tolist()  # the step's one wait for the device
    (mean_loss,) = world.sum(own_share)
    if not (mean_loss < float("inf") and grad_norm < float("inf")):
        raise FrostlineError(
            f"loss {mean_loss} and gradient norm {grad_norm} are not both finite; the last checkpoint is "
            "intact. Lower train.learning_rate, or look at the rows of this step"
        )
    seconds = time.perf_counter() - started
    return StepResult(mean_loss, update.learning_rate, grad_norm, int(supervised), int(tokens), seconds)


def seed_step(seed: int, step: int, world: World) -> None:
    """Make dropout a function of seed, step and rank alone, so that a resumed run repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * world.size + world.rank)
