"""Choose the next token: the likeliest, or one drawn by temperature and top-p, repeatable and alone of other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from toolkit.runtime.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Says how each next token is chosen; the default decodes greedily.

    Raises:
        UsageError: a value is outside its range.
    """

    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest ones whose probabilities add up to this (nucleus sampling, 1904.09751)."""
    seed: int = 42
    """Seed of all draws. An answer depends on it and on its row's number, not on the rows that are answered with it."""

    def __post_init__(self) -> None:
        for name, value, is_right, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number from 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("seed", self.seed, self.seed >= 0, "a whole number from 0"),
        ):
            if not is_right:
                raise UsageError(f"{name} is {value}; expected {expected}")

    def processors(self, rows: Sequence[int]) -> LogitsProcessorList:
        """Return what makes greedy decoding draw its tokens so, for a batch of rows with these numbers."""
        processors = LogitsProcessorList()
        if self.temperature:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
            processors.append(_GumbelNoise(self.seed, rows))
        return processors


class _GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds to the logits of each row noise by which the largest sum is a draw from their softmax (1411.0030, 2).

    A generator a row, on the CPU, so that a row's noise is the same in every batch and on every rank.
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        states = [np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] for row in rows]
        self._generators = [torch.Generator().manual_seed(int(state)) for state in states]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for line, generator in zip(noise, self._generators, strict=True):
            line.exponential_(generator=generator)
        return scores.float() - noise.log().to(scores.device)  # type: ignore[return-value]
