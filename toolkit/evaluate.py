"""Validation loss: the token mean of the cross entropy over held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.data.batches import BatchPlan, step_batches
from toolkit.data.examples import Example
from toolkit.distributed import World
from toolkit.loss import Forward, supervised_loss
from toolkit.prefix.split import Prefix


@dataclass(frozen=True)
class Evaluation:
    """The outcome on a set of rows."""

    loss: float
    """Mean cross entropy over all supervised tokens."""
    supervised_tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    forward: Forward,
    prefix: Prefix | None,
    examples: Sequence[Example],
    micro_batch_size: int,
    pad_id: int,
    world: World,
) -> Evaluation:
    """Loss over ``examples``, shared among the ranks; every rank calls it and gets the same answer.

    The caller turns dropout off.
    """
    tokens = sum(example.supervised_tokens for example in examples)
    plan = BatchPlan(len(examples), micro_batch_size, rank=world.rank, ranks=world.size)
    share = torch.zeros((), device=world.device)
    for micro_batches in step_batches(examples, range(len(examples)), plan, pad_id):
        for batch in micro_batches:
            batch = batch.to(world.device)
            hidden = prefix(batch) if prefix else None
            share += supervised_loss(forward, hidden, batch, tokens)
    (loss,) = world.sum(float(share))
    return Evaluation(loss, tokens)
