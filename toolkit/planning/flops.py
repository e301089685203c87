"""Count the floating-point operations of a run, from those of one traced micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from toolkit.planning.trace import Pass, Trace

PASSES = ("prefix forward", "suffix forward", "backward", "recomputation")


class PassFlops(NamedTuple):
    """FLOPs of one pass over a row of T tokens, S of them supervised.

    ``per_token * T + per_square * T**2 + per_supervised * S``
    """

    per_token: float
    per_square: float
    """Attention: every pair of tokens, causal or not, as PyTorch's FLOP counter does."""
    per_supervised: float
    """Head and last MLP, if they run at supervised positions only."""

    def of(self, tokens: np.ndarray, supervised: np.ndarray) -> np.ndarray:
        """Return the FLOPs of rows of ``tokens`` tokens each, ``supervised`` of which are supervised."""
        return self.per_token * tokens + self.per_square * tokens**2 + self.per_supervised * supervised


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of each pass of a training step; a multiply-add counts 2."""

    passes: dict[str, PassFlops]

    def of(self, rows: np.ndarray | Sequence[tuple[int, int]]) -> dict[str, float]:
        """Return the FLOPs by pass for rows, [rows, 2] tokens and supervised tokens, without padding."""
        tokens, supervised = np.asarray(rows, float).T
        return {name: float(cost.of(tokens, supervised).sum()) for name, cost in self.passes.items()}


def count_flops(plain: Sequence[Trace], checkpointed: Sequence[Trace] | None) -> StepFlops:
    """Compute the FLOPs of each pass from traces.

    Args:
        plain: two traces without activation checkpointing, with different numbers of supervised positions.
        checkpointed: two such traces with activation checkpointing; None if the run does not use it.
    """
    prefix, forward, backward = (_pass_flops(plain, phase) for phase in ("prefix", "forward", "backward"))
    with_recomputation = backward if checkpointed is None else _pass_flops(checkpointed, "backward")
    recomputation = PassFlops(*(total - part for total, part in zip(with_recomputation, backward, strict=True)))
    return StepFlops(dict(zip(PASSES, (prefix, forward, backward, recomputation), strict=True)))


def _pass_flops(traces: Sequence[Trace], phase: Pass) -> PassFlops:
    """Solve for the three coefficients; the two traces differ only in the number of supervised positions."""
    first, second = traces
    shape = first.shape
    tokens = shape.rows * shape.tokens
    matrices, matrices_of_second = (trace.flops.get((phase, "matrices"), 0) for trace in traces)
    attention = first.flops.get((phase, "attention"), 0)
    per_supervised = (matrices - matrices_of_second) / (shape.supervised - second.shape.supervised)
    return PassFlops((matrices - per_supervised * shape.supervised) / tokens, attention / shape.pairs, per_supervised)
