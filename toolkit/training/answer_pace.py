"""Tell how long sample answers will take, while there is time to wonder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from toolkit.runtime.progress_bar import duration

log = logging.getLogger("frostline")

_TOKENS = 3
"""Tokens after which the time of all is told: the first one also reads the question."""


class AnswerPace:
    """Times the first tokens of ``passes`` generations of at most ``tokens`` tokens each.

    If all together will take longer than ``epoch_seconds``, the log says so once. ``clock`` returns seconds.
    """

    def __init__(self, passes: int, tokens: int, epoch_seconds: float, clock: Callable[[], float] = monotonic) -> None:
        self._passes, self._tokens, self._epoch_seconds, self._clock = passes, tokens, epoch_seconds, clock
        self._times: list[float] = []
        self._is_told = False

    def begin(self) -> None:
        """Begin a generation."""
        self._times = [self._clock()]

    def token(self) -> int:
        """Count a token of the generation, and return how many it has; say if it will take long."""
        self._times.append(self._clock())
        count = len(self._times) - 1
        if not self._is_told and count == min(_TOKENS, self._tokens):
            self._is_told = True
            begun, first, last = self._times[0], self._times[1], self._times[-1]
            later = (last - first) / max(count - 1, 1) * (self._tokens - 1)
            seconds = self._passes * (first - begun + later)
            if seconds > self._epoch_seconds:
                log.info(
                    "sample answers may take %s, longer than an epoch (%s); lower output.sample_answers or "
                    "output.sample_tokens",
                    duration(seconds), duration(self._epoch_seconds),
                )  # fmt: skip
        return count
