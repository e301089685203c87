"""Compute the share of the weights that an update changed; warn if rounding loses the updates."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

log = logging.getLogger("frostline")

SAMPLED = 256
"""Elements sampled of each tensor, or of each partition under ZeRO; all of a smaller one."""

STEPS, TOO_LOW = 10, 0.5
"""Steps over which the share is averaged for the warning, and the mean below which it is given."""

Sampler = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


def sampled_indices(sizes: Sequence[int]) -> torch.Tensor:
    """Return the indices, int64, to sample of concatenated vectors of the given sizes; the same in every run."""
    start, parts = 0, []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        within = torch.randint(size, (SAMPLED,), generator=generator) if size > SAMPLED else torch.arange(size)
        parts.append(start + within)
        start += size
    return torch.cat(parts)


class UpdateMonitor:
    """Compare a fixed sample of the master weights before and after each update.

    It samples fp32 masters, not the bfloat16 copies that compute, of which most stay the same from
    step to step however well the run learns. An element is expected to change if its first moment is not zero, which
    leaves out rows of an embedding table that never occur and the padding of ZeRO's partitions. The share is the
    fraction of those elements that changed.

    Args:
        sample: function that yields, in parts, the sampled weights and whether the first moment of each is not zero.
    """

    def __init__(self, sample: Sampler) -> None:
        self._sample = sample
        self._last: list[torch.Tensor] | None = None
        self.counts = torch.zeros(2, dtype=torch.int64)
        """How many sampled elements the last update changed, and should have changed: int64 [2], on the weights'
        device; reading it waits for that."""
        self._shares: deque[float] = deque(maxlen=STEPS)
        self._warned = False

    def reset(self) -> None:
        """Forget the last sample; for when the weights were loaded or set from outside."""
        self._last = None

    @torch.no_grad()
    def before(self) -> None:
        """Sample the weights before an update, unless the last sample is still valid. Does not wait for the device."""
        if self._last is None:
            self._last = [values.clone() for values, _ in self._sample()]

    @torch.no_grad()
    def after(self) -> None:
        """Sample the weights after an update. Does not wait for the device."""
        values_after, counts = [], []
        assert self._last is not None
        for (values, is_expected), last in zip(self._sample(), self._last, strict=True):
            counts.append(torch.stack((((values != last) & is_expected).sum(), is_expected.sum())))
            values_after.append(values.clone())
        self._last = values_after
        if counts:
            self.counts = torch.stack([count.to(counts[0].device) for count in counts]).sum(0)

    def changed_share(self, changed: float, expected: float, learning_rate: float) -> float | None:
        """Return ``changed / expected``, the ``counts`` of the last update; None if 0 / 0. Warn once if it stays low.

        The caller sums the counts over ranks, which may have partitions of their own. At a learning rate of 0, as in
        the first step of a warmup, no change is expected and the result is None.
        """
        if not expected or learning_rate == 0:
            return None
        share = changed / expected
        self._shares.append(share)
        mean = sum(self._shares) / len(self._shares)
        if not self._warned and len(self._shares) == STEPS and mean < TOO_LOW:
            self._warned = True
            log.warning(
                "rounding eats the updates: in the last %d steps %.0f %% of the weights that had an update to take "
                "changed, at a learning rate of %.1e. The numbers that take the updates are too coarse for them: keep "
                "float32 masters (optim.name: adamw) or raise train.learning_rate (docs/optimizers.md)",
                STEPS, 100 * mean, learning_rate,
            )  # fmt: skip
        return share
