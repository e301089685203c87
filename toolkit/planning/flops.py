"""Floating-point operations of a run, from those of one rehearsed micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.planning.trace import Phase, Trace

PASSES = ("prefix forward", "suffix forward", "backward", "recomputation")


@dataclass(frozen=True)
class Cost:
    """Operations of one pass over rows: ``per_token * T + per_square * T**2 + per_supervised * S`` a row."""

    per_token: float
    per_square: float
    """Attention: each token with each, causal or not, as the counters of PyTorch do."""
    per_supervised: float
    """Head and last MLP, where they run at supervised positions alone."""

    def of(self, tokens: int, supervised: int) -> float:
        """Operations of a row of ``tokens`` tokens, ``supervised`` of which count."""
        return self.per_token * tokens + self.per_square * tokens**2 + self.per_supervised * supervised

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.per_token - other.per_token,
            self.per_square - other.per_square,
            self.per_supervised - other.per_supervised,
        )


@dataclass(frozen=True)
class Compute:
    """What each pass costs; a product of matrices counts 2 a multiply-add."""

    passes: dict[str, Cost]

    def of(self, rows: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Operations by pass over rows of (tokens, supervised tokens), without padding."""
        return {name: sum(cost.of(*row) for row in rows) for name, cost in self.passes.items()}


def compute(plain: Sequence[Trace], checkpointed: Sequence[Trace] | None) -> Compute:
    """The cost of each pass.

    Args:
        plain: rehearsed without gradient checkpointing, twice: with different numbers of supervised positions.
        checkpointed: rehearsed with it, likewise; none if the run does not use it.
    """
    backward = _cost(plain, "backward")
    again = _cost(checkpointed, "backward") - backward if checkpointed is not None else Cost(0, 0, 0)
    return Compute(
        {
            "prefix forward": _cost(plain, "prefix"),
            "suffix forward": _cost(plain, "forward"),
            "backward": backward,
            "recomputation": again,
        }
    )


def _cost(rehearsals: Sequence[Trace], phase: Phase) -> Cost:
    """What differs between the two is the work at supervised positions."""
    first, second = rehearsals
    shape = first.shape
    tokens = shape.rows * shape.tokens
    matrices, others = (rehearsal.flops.get((phase, "matrices"), 0) for rehearsal in rehearsals)
    attention = first.flops.get((phase, "attention"), 0)
    per_supervised = (matrices - others) / (shape.supervised - second.shape.supervised)
    return Cost((matrices - per_supervised * shape.supervised) / tokens, attention / shape.pairs, per_supervised)
