"""Take one training step: the same lines for one process and for a cluster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from toolkit.activation_cache.cached_prefix import HiddenStates
from toolkit.data.batches import Batch
from toolkit.engine.base import Engine
from toolkit.runtime.distributed import World
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.split.supervised_loss import supervised_loss
from toolkit.training.rank_status import RankStatus

_NOBODY = RankStatus()


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step over all ranks."""

    loss: float
    """Mean cross entropy over the supervised tokens of the global batch."""
    learning_rate: float
    """The rate this step used."""
    grad_norm: float
    """Global gradient 2-norm before clipping."""
    supervised_tokens: int
    """Tokens the loss was taken over."""
    tokens: int
    """Tokens read, without padding."""
    seconds: float
    """Wall-clock time on this rank."""
    shares: tuple[float, ...] = ()
    """Share of the loss of each of this rank's micro batches."""
    moved_share: float | None = None
    """``Engine.moved_share`` of the update."""
    status: RankStatus = _NOBODY
    """Status of all ranks when the step ended."""

    @property
    def skipped(self) -> bool:
        """True if loss or gradient was not finite on some rank: no rank's weights, moments or step counts changed."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


def train_step(
    micro_batches: Sequence[Batch],
    prefix: HiddenStates | None,
    engine: Engine,
    world: World,
    status: Callable[[], RankStatus] = RankStatus,
) -> StepResult:
    """Take one optimizer step on this rank's micro batches; ``StepResult.skipped`` tells if it changed nothing.

    Beside the gradients the ranks exchange one vector, which has all that a step has to tell; reading it is the one
    time that a step waits for the device. ``status`` returns what this rank adds to it, called once.

    Raises:
        OutOfMemoryError: with the phase and the shape of the micro batch.
    """
    started = time.perf_counter()
    supervised, tokens = tokens_of_step(micro_batches, world)
    shares = []
    for index, batch in enumerate(micro_batches, start=1):
        batch = batch.to(world.device)
        with explain_out_of_memory("the prefix", batch.shape_text):
            hidden = prefix(batch) if prefix else None
        with explain_out_of_memory("forward", batch.shape_text):
            loss = supervised_loss(engine.forward_loss, hidden, batch, supervised)
        shares.append(loss.detach())
        # 1, or NaN if the loss is not finite: the gradient is then NaN on all ranks, and every engine skips the step
        guard = 1.0 + 0.0 * shares[-1]
        with explain_out_of_memory("backward", batch.shape_text):
            engine.backward(loss * guard, is_last=index == len(micro_batches))
    with explain_out_of_memory("the update"):
        update = engine.update()
    moved = update.moved.to(world.device, torch.float64)
    measured = torch.cat((moved, torch.stack((update.grad_norm, *shares)).double()))
    ranks = world.exchange(measured, status())  # the step's one wait for the device
    own, end = ranks[world.rank], len(measured)
    mean_loss = sum(sum(values[3:end]) for values in ranks)
    moved_share = engine.moved_share(sum(values[0] for values in ranks), sum(values[1] for values in ranks))
    seconds = time.perf_counter() - started
    return StepResult(
        mean_loss, update.learning_rate, own[2], supervised, tokens, seconds, tuple(own[3:end]), moved_share,
        RankStatus.of_all([values[end:] for values in ranks]),
    )  # fmt: skip


def tokens_of_step(micro_batches: Sequence[Batch], world: World) -> tuple[int, int]:
    """Return the supervised tokens and all tokens of a step over all ranks, as ``step_batches`` counted them.

    A single rank has all micro batches, and counts batches that were made one by one itself.
    """
    known = micro_batches[0].of_step
    if known is None:
        assert world.size == 1, "the batches of several ranks come from step_batches, which knows all rows of a step"
        return (
            sum(batch.supervised_tokens for batch in micro_batches),
            sum(batch.tokens for batch in micro_batches if not batch.is_filler),
        )
    return known


def seed_step(seed: int, step: int, world: World) -> None:
    """Make dropout a function of seed, step and rank alone, so that a resumed run repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * world.size + world.rank)
