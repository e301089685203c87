"""Show a comparison as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from toolkit.evaluation.verdicts import is_detail
from toolkit.evaluation.worst_cases import lines

if TYPE_CHECKING:
    from toolkit.evaluation.comparison import Comparison
    from toolkit.evaluation.verdicts import ModelScores, Score

_WIDTH = 40
"""Most letters of a model's name."""


def summary(comparison: Comparison) -> str:
    """Return the loss of the first model in one line."""
    tokens = f"{comparison.supervised_tokens} supervised tokens of {comparison.rows} rows"
    return f"loss {comparison.loss:.4f}, perplexity {comparison.perplexity:.2f} over {tokens}"


def report(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of all tables: that of the rows, then drift and forgetting under headings of their own."""
    yield from table(comparison)
    if official := comparison.official:
        yield from ("", "By PubMedQA's official rule, accuracy and macro-F1:")
        yield from (f"{name}: {score.accuracy:.1%}, {score.macro_f1:.3f}" for name, score in official.items())
    if comparison.drift is not None:
        yield from ("", f"Drift: loss, in nats a token, of {comparison.drift.data}")
        yield from table(comparison.drift)
    if comparison.forgetting is not None:
        yield from ("", f"Forgetting: {comparison.forgetting.data}")
        yield from table(comparison.forgetting)


def table(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of a table: each metric with the models that have it, the declared one first."""
    names = [name for name in metric_names(comparison) if not is_detail(name)]
    width = min(_WIDTH, max(len(_name(model)) for model in comparison.models))
    against = f"difference to {comparison.against}" if comparison.against else ""
    yield f"{'':<{width}}  {'value':>9}  {'95 % interval':>19}  {against}".rstrip()
    for name in names:
        yield f"{name}{' (declared by the task)' if name == comparison.primary and len(names) > 1 else ''}"
        for model in comparison.models:
            if name in model.scores:
                yield f"{_shortened(_name(model), width):<{width}}  {_line(model.scores[name])}".rstrip()
    if notes := list(_notes(comparison)):
        yield from ("", *notes)


def metric_names(comparison: Comparison) -> list[str]:
    """Return the names of all metrics, the declared one first."""
    every = dict.fromkeys(name for model in comparison.models for name in model.scores)
    return sorted(every, key=lambda name: name != comparison.primary)


def _line(score: Score) -> str:
    line = f"{number(score.value):>9}  {interval(score.low, score.high):>19}"
    if score.difference is None:
        return line
    of = score.difference
    return f"{line}  {signed(of.value)} {interval(of.low, of.high)} {score.verdict or ''}"


def _notes(comparison: Comparison) -> Iterator[str]:
    units = "rows" if comparison.units == comparison.rows else f"groups of {comparison.rows} rows"
    verdicts = any(score.verdict for model in comparison.models for score in model.scores.values())
    if comparison.against is not None:
        yield f"Intervals are of 1,000 resamples of {comparison.units} {units}, differences of the same ones." + (
            f" Verdicts on metrics other than {comparison.primary} are corrected for their number (Holm)."
            if verdicts
            else ""
        )
    if comparison.contamination is not None:
        yield comparison.contamination
    if comparison.retrieval is not None:
        yield comparison.retrieval
    yield from lines(comparison.worst, comparison.abstention)


def interval(low: float, high: float) -> str:
    """Return an interval as ``[0.512, 0.598]``."""
    return f"[{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Return a number with four digits that count; a dash for one that is not defined."""
    if math.isnan(value):
        return "–"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def signed(value: float) -> str:
    """Return a number with its sign."""
    return ("+" if value > 0 else "") + number(value)


def _name(model: ModelScores) -> str:
    return model.name if model.step is None or "@" in model.name else f"{model.name} (step {model.step})"


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"…{name[1 - width :]}"
