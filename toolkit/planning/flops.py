"""Count the floating-point operations of a run, from those of one traced micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.planning.trace import Pass, Trace

PASSES = ("prefix forward", "suffix forward", "backward", "recomputation")


@dataclass(frozen=True)
class PassFlops:
    """Hold the operations of one pass over a row: ``per_token * T + per_square * T**2 + per_supervised * S``."""

    per_token: float
    per_square: float
    """Attention: each token with each, causal or not, as the counters of PyTorch do."""
    per_supervised: float
    """Head and last MLP, where they run at supervised positions alone."""

    def of(self, tokens: int, supervised: int) -> float:
        """Return the operations of a row of ``tokens`` tokens, ``supervised`` of which count."""
        return self.per_token * tokens + self.per_square * tokens**2 + self.per_supervised * supervised

    def __sub__(self, other: PassFlops) -> PassFlops:
        return PassFlops(
            self.per_token - other.per_token,
            self.per_square - other.per_square,
            self.per_supervised - other.per_supervised,
        )


@dataclass(frozen=True)
class StepFlops:
    """Hold the operations of each pass of a step; a product of matrices counts 2 a multiply-add."""

    passes: dict[str, PassFlops]

    def of(self, rows: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Return the operations by pass over rows of (tokens, supervised tokens), without padding."""
        return {name: sum(cost.of(*row) for row in rows) for name, cost in self.passes.items()}


def count_flops(plain: Sequence[Trace], checkpointed: Sequence[Trace] | None) -> StepFlops:
    """Count the operations of each pass.

    Args:
        plain: traced without activation checkpointing, twice: with different numbers of supervised positions.
        checkpointed: traced with it, likewise; None if the run does not use it.
    """
    backward = _pass_flops(plain, "backward")
    again = _pass_flops(checkpointed, "backward") - backward if checkpointed is not None else PassFlops(0, 0, 0)
    return StepFlops(
        {
            "prefix forward": _pass_flops(plain, "prefix"),
            "suffix forward": _pass_flops(plain, "forward"),
            "backward": backward,
            "recomputation": again,
        }
    )


def _pass_flops(traces: Sequence[Trace], phase: Pass) -> PassFlops:
    """Solve for the three rates: what differs between the two traces is the work at supervised positions."""
    first, second = traces
    shape = first.shape
    tokens = shape.rows * shape.tokens
    matrices, others = (trace.flops.get((phase, "matrices"), 0) for trace in traces)
    attention = first.flops.get((phase, "attention"), 0)
    per_supervised = (matrices - others) / (shape.supervised - second.shape.supervised)
    return PassFlops((matrices - per_supervised * shape.supervised) / tokens, attention / shape.pairs, per_supervised)
