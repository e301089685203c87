"""Validation loss: the mean cross entropy over the supervised tokens of held-out rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.activation_cache.cached_prefix import HiddenStates, read_ahead
from toolkit.activation_cache.read_ahead import HiddenReader
from toolkit.data.batches import BatchPlan, collate, step_batches
from toolkit.data.examples import Example
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.data.rows import Rows
from toolkit.runtime.distributed import World
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.split.supervised_loss import SuffixLoss, supervised_loss

log = logging.getLogger("frostline")

_MOST_NAMED = 16
"""Most rows that a message names."""


@dataclass(frozen=True)
class Evaluation:
    """Validation loss over a set of rows."""

    loss: float
    """Mean cross entropy over all supervised tokens."""
    supervised_tokens: int
    """Number of those tokens."""

    @property
    def perplexity(self) -> float:
        """Perplexity, ``exp(loss)``."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, or infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def evaluate_rows(
    forward: SuffixLoss,
    prefix: HiddenStates | None,
    examples: Sequence[Example],
    micro_batch_size: int,
    pad_id: int,
    world: World,
    packed: bool = False,
    may_stop: bool = False,
    micro_batch_tokens: int | None = None,
) -> Evaluation:
    """Compute the validation loss; a collective that divides ``examples`` and returns the same value on every rank.

    The caller must turn dropout off. Without ``prefix``, ``forward`` runs the whole model. With ``packed`` the rows of
    a micro batch are laid end to end, and the model must keep them apart.

    Raises:
        StopRequested: a signal came and ``may_stop`` is set; raised on every rank.
    """
    tokens = int(Rows.of(examples).supervised.sum())
    plan = BatchPlan(len(examples), micro_batch_size, 1, world.rank, world.size, micro_batch_tokens)
    local_loss = torch.zeros((), device=world.device)  # this rank's part of the global mean
    own: list[tuple[list[str], torch.Tensor]] = []  # rows of each micro batch, and its share of the loss
    steps = step_batches(examples, range(len(examples)), plan, pad_id, packed=packed)
    with (
        HiddenReader(world.device) as reader, Prefetcher() as ahead,
        ProgressBar("evaluating", len(examples), "row", brief=True) as bar,
    ):  # fmt: skip
        for micro_batches in ahead(on_device(read_ahead(lambda: prefix, steps, reader), world.device)):
            for batch in micro_batches:
                if may_stop:
                    world.raise_if_stopping()
                with explain_out_of_memory("the evaluation", batch.shape_text):
                    hidden = prefix(batch) if prefix else None
                    share = supervised_loss(forward, hidden, batch, tokens)
                local_loss += share
                own.append(([] if batch.is_filler else [row.origin for row in batch.examples], share))
            bar.advance(plan.global_batch)
    (loss,) = world.sum(float(local_loss))
    if not math.isfinite(loss):
        _name_rows(own, loss, world)
    return Evaluation(loss, tokens)


def _name_rows(own: Sequence[tuple[list[str], torch.Tensor]], loss: float, world: World) -> None:
    """Warn of the rows whose loss is not finite, of all ranks; every rank calls it."""
    bad = [name for names, share in own if not bool(share.isfinite()) for name in names]
    found: list[str] = [name for of_rank in world.all_gather_object(bad) for name in of_rank]
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    log.warning("the loss of the held-out rows is %s; not finite in the micro batches of: %s%s",
                loss, ", ".join(found[:_MOST_NAMED]), more)  # fmt: skip


@torch.no_grad()
def row_losses(
    forward: SuffixLoss, prefix: HiddenStates | None, examples: Sequence[Example], pad_id: int, world: World
) -> list[float]:
    """Compute the loss of each row by itself, the mean over its supervised tokens; a collective, equal on every rank.

    The caller must turn dropout off. Without ``prefix``, ``forward`` runs the whole model.

    Raises:
        StopRequested: a signal came; raised on every rank.
    """
    own: dict[int, float] = {}
    with ProgressBar("held-out rows", len(examples), "row", brief=True) as bar:
        for start in range(0, len(examples), world.size):
            world.raise_if_stopping()
            row = start + world.rank
            is_filler = row >= len(examples)  # this rank joins in the collectives of the last rows
            batch = collate([examples[start if is_filler else row]], pad_id, is_filler).to(world.device)
            with explain_out_of_memory("the evaluation", batch.shape_text):
                hidden = prefix(batch) if prefix else None
                loss = supervised_loss(forward, hidden, batch, max(batch.supervised_tokens, 1))
            if not is_filler:
                own[row] = float(loss)
            bar.advance(world.size)
    losses: dict[int, float] = {}
    for of_rank in world.all_gather_object(own):
        losses |= of_rank
    return [losses[row] for row in range(len(examples))]
