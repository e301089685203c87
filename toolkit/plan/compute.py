"""Floating-point operations of a run, from those of one rehearsed micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.plan.rehearse import Phase, Rehearsal

PASSES = ("prefix forward", "suffix forward", "backward", "recomputation")


@dataclass(frozen=True)
class Cost:
    """Operations of one pass over rows: ``per_token * T + per_square * T**2 + per_supervised * S`` a row."""

    per_token: float
    per_square: float
    """Attention: each token with each, causal or not, as the counters of PyTorch do."""
    per_supervised: float
    """The head, at supervised positions alone."""

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


def compute(plain: Rehearsal, checkpointed: Rehearsal | None, head: int, head_passes: int) -> Compute:
    """The cost of each pass.

    Args:
        plain: rehearsed without gradient checkpointing.
        checkpointed: rehearsed with it; none if the run does not use it.
        head: elements of the head's matrix.
        head_passes: products of the head in backward: one for its own gradient, one for that of its input.
    """
    backward = _cost(plain, "backward", 2 * head * head_passes)
    again = Cost(0, 0, 0)
    if checkpointed is not None:
        again = _cost(checkpointed, "backward", 2 * head * head_passes) - backward
    return Compute(
        {
            "prefix forward": _cost(plain, "prefix", 0),
            "suffix forward": _cost(plain, "forward", 2 * head),
            "backward": backward,
            "recomputation": again,
        }
    )


def _cost(rehearsal: Rehearsal, phase: Phase, per_supervised: int) -> Cost:
    shape = rehearsal.shape
    tokens = shape.rows * shape.tokens
    matrices = rehearsal.flops.get((phase, "matrices"), 0) - per_supervised * shape.supervised
    attention = rehearsal.flops.get((phase, "attention"), 0)
    return Cost(matrices / tokens, attention / shape.pairs, per_supervised)
