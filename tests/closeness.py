"""How far apart two runs of the tiny model are, and how far rounding alone takes them; gradients that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from helpers import metrics

from benchmarks.record import rms
from toolkit.data.batches import Batch
from toolkit.runtime.distributed import World
from toolkit.training import step

BFLOAT16_LOSS = 4e-3
BFLOAT16_NORM = 1.6e-2
"""Allowed between two bfloat16 runs of the tiny model that should learn the same: root mean squares over the steps, of
the loss and of the gradient norm's relative difference.

The norm's is four times bfloat16's spacing of 2^-8. One run's whole distance from float32 was 1.8e-3 to 2.2e-3 and
2.4e-3 to 6.6e-3 on every path tried (oneDNN up to AVX2, AVX-512 and its bf16 instructions, float32 gradients on and
off, three orders of the rows), two bfloat16 runs differed by half of it. The largest difference of a single step varied
threefold, so no bound is one of a single step. ``test_closeness`` and ``test_matrix`` hold that both are above what
rounding does and below what a wrong gradient does.
"""

Weight = Callable[[Batch, float, World, int], float]
"""What a micro batch's gradient is multiplied by, which should be 1: from the batch, the global batch's tokens, the
rank and how many micro batches this rank had before."""

FAULTS: dict[str, Weight] = {
    "mean_of_means": lambda batch, tokens, world, index: tokens / (2 * world.size * batch.supervised_tokens),
    "lost_rank": lambda batch, tokens, world, index: float(world.is_main),
    "lost_micro_batch": lambda batch, tokens, world, index: float(index % 2),
    "lost_once": lambda batch, tokens, world, index: float(index != 20 or world.rank + 1 < world.size),
}
"""Gradients that are not the global token mean's, of two micro batches a step; the reported loss stays right."""


@contextmanager
def planted(weight: Weight, world: World) -> Iterator[None]:
    """Give the training step a loss with the right value and the wrong gradient."""
    right, calls = step.supervised_loss, count()

    def wrong(forward: Any, hidden: Any, batch: Batch, tokens: float) -> torch.Tensor:
        share, index = right(forward, hidden, batch, tokens), next(calls)
        factor = 1.0 if batch.is_filler else weight(batch, tokens, world, index)
        return share * factor + share.detach() * (1 - factor)

    step.supervised_loss = wrong
    try:
        yield
    finally:
        step.supervised_loss = right


def assert_rounded_alike(run: Path, other: Path) -> None:
    """Two bfloat16 runs took the same steps but for rounding."""
    loss = rms(metrics(run), metrics(other))
    norms = [a / b for a, b in zip(metrics(run, "grad_norm"), metrics(other, "grad_norm"), strict=True)]
    norm = rms(norms, [1.0] * len(norms))
    assert (loss < BFLOAT16_LOSS, norm < BFLOAT16_NORM) == (True, True), f"loss {loss:.1e}, gradient norm {norm:.1e}"
