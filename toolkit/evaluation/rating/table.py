"""Show what ratings say as text."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.evaluation.rating.result import RatedMeasure, RatingResult
from toolkit.evaluation.table import interval, number
from toolkit.metrics.resampling import RESAMPLES

_VERDICTS = {"better": "A is better", "worse": "B is better"}


def table(result: RatingResult) -> Iterator[str]:
    """Yield the lines of a table: the preference, each criterion, and the agreement of raters."""
    yield f"A: {result.a}"
    yield f"B: {result.b}"
    for rater in result.raters:
        yield (
            f"rater {rater['rater']}: {rater['rated']} of {result.rows} rows rated, {rater['in_part']} of them in "
            f"part; {rater['unrated']} left out"
        )
    width = max(len(name) for name in [*result.criteria, "preference"])
    yield ""
    yield f"{'':<{width}}  {'rows':>4}  {'A':>9}  {'B':>9}  A - B with its 95 % interval"
    for name, measure in {"preference": result.preference, **result.criteria}.items():
        yield f"{name:<{width}}  {_line(measure)}"
    low, high = result.scale
    yield (
        f"Ratings are from {low} to {high}, the preference is a share of judgements. Intervals are of {RESAMPLES:,} "
        "resamples of the rows. Verdicts on criteria are corrected for their number (Holm)."
    )
    if result.ties is not None and result.preferred_sides is not None:
        sides = ", ".join(f"{name.replace('_', ' ')} {number(share)}" for name, share in result.preferred_sides.items())
        yield f"Ties: {number(result.ties)}. By place, whoever's answer it is: {sides}."
    if result.agreement:
        yield ""
        yield f"{'agreement of raters':<{width + 14}}  {'rows':>4}  kappa"
    for one in result.agreement:
        name = f"{one.raters[0]} and {one.raters[1]}, {one.of}"
        kappa = "–" if one.kappa is None else number(one.kappa)
        yield f"{name:<{width + 14}}  {one.rows:>4}  {kappa} ({one.weights} weights)"


def _line(measure: RatedMeasure | None) -> str:
    if measure is None:
        return "   0  not rated"
    of = measure.difference
    verdict = _VERDICTS.get(measure.verdict, measure.verdict)
    return (
        f"{measure.rows:>4}  {number(measure.a.value):>9}  {number(measure.b.value):>9}  "
        f"{of.value:+.4f} {interval(of.low, of.high)} {verdict}"
    )
