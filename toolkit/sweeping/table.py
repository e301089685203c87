"""The trials of a sweep as a table: quality with its interval, costs, and the front of each cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.metrics.resampling import Interval, over_seeds
from toolkit.sweeping.inputs import held_out
from toolkit.sweeping.results import bases_of, quality_of
from toolkit.sweeping.trials import Sweep, Trial

COSTS = {"seconds": "seconds", "memory_gib": "peak GiB", "trained": "trained"}
"""Costs by their key in ``Trial.result``, and what they are called."""
_SEED = "train.seed"


@dataclass(frozen=True)
class ScoredTrial:
    """A trial that has scores."""

    trial: Trial
    quality: Interval
    higher_is_better: bool

    @property
    def rank(self) -> float:
        """Return the quality as a number of which less is better."""
        return -self.quality.value if self.higher_is_better else self.quality.value

    def cost(self, key: str) -> float:
        """Return one of ``COSTS``."""
        return float(self.trial.result[key])


def points_of(sweep: Sweep) -> list[ScoredTrial]:
    """Return the trials that have scores, in their order."""
    found = []
    for trial in sweep.trials:
        quality = quality_of(trial.result)
        if quality is not None:
            found.append(ScoredTrial(trial, quality, trial.result["validation"]["higher_is_better"]))
    return found


def front(points: Sequence[ScoredTrial], cost: str) -> list[ScoredTrial]:
    """Return the Pareto front, by rising cost: points that no other is as good as for less, or better than for as much.

    Of points that are alike in both the first is taken.
    """
    found: list[ScoredTrial] = []
    for point in sorted(points, key=lambda point: (point.cost(cost), point.rank, point.trial.number)):
        if not found or point.rank < found[-1].rank:
            found.append(point)
    return found


def markdown(sweep: Sweep) -> str:
    """Return the table in Markdown, with a second one over the seeds if trials differ in them."""
    points = points_of(sweep)
    fronts = {key: {point.trial.number for point in front(points, key)} for key in COSTS}
    metric = sweep.trials[0].config.train.metric_for_best_model
    has_test = any("test" in trial.result for trial in sweep.trials)
    head = ["trial", "settings", "frost line", f"validation {metric}", *(["test"] if has_test else []), *COSTS.values(),
            "front"]  # fmt: skip
    rows = []
    bases = bases_of(sweep)
    for number, base in enumerate(bases.values(), start=1):
        name = "base" if len(bases) == 1 else f"base {number}"
        rows.append(
            [name, "", "", _score_text(base), *([_score_text(base, "test")] if has_test else []), "", "", "", ""]
        )
    for trial in sweep.trials:
        line = "" if trial.boundary is None else str(trial.boundary)
        if "validation" not in trial.result:
            state = trial.fault or "not finished"
            rows.append([str(trial.number), trial.text, line, state, *([""] if has_test else []), "", "", "", ""])
            continue
        marks = ", ".join(name for key, name in COSTS.items() if trial.number in fronts[key])
        result = trial.result
        costs = [f"{result['seconds']:.1f}", f"{result['memory_gib']:.2f}", f"{result['trained']:,.0f}"]
        test = [_score_text(result, "test")] if has_test else []
        rows.append([str(trial.number), trial.text, line, _score_text(result), *test, *costs, marks])
    lines = [_line(head), _line(["---:", "---", *["---:"] * (len(head) - 3), "---"]), *map(_line, rows)]
    return "\n".join([*lines, *_notes(sweep), *_over_seeds(points)]) + "\n"


def _notes(sweep: Sweep) -> list[str]:
    rows = sorted({trial.result["validation"]["rows"] for trial in sweep.trials if "validation" in trial.result})
    notes = [
        "",
        f"Quality: the best checkpoint on the {' or '.join(map(str, rows))} rows held out, with its 95 % interval over "
        "these rows (bootstrap). Seconds: training steps alone. Front: no trial is as good for less of that cost."
    ] if rows else []  # fmt: skip
    if len({held_out(trial.config) for trial in sweep.trials if "validation" in trial.result}) > 1:
        notes.append("Trials held out different rows (other seeds or data), so their losses differ for that too.")
    return notes


def _over_seeds(points: Sequence[ScoredTrial]) -> list[str]:
    """Return a table of the trials that differ in their seed alone; none if there are no such."""
    groups: dict[str, list[ScoredTrial]] = {}
    for point in points:
        if _SEED in point.trial.settings:
            others = {key: value for key, value in point.trial.settings.items() if key != _SEED}
            groups.setdefault(repr(sorted(others.items())), []).append(point)
    if not any(len(group) > 1 for group in groups.values()):
        return []
    lines = ["", _line(["trials", "mean over seeds", "deviation", "lowest", "highest"]), _line(["---"] + ["---:"] * 4)]
    for group in groups.values():
        found = over_seeds([point.quality.value for point in group])
        deviation = "" if found.deviation is None else f"{found.deviation:.4f}"
        lines.append(_line([", ".join(str(point.trial.number) for point in group), f"{found.mean:.4f}", deviation,
                            f"{found.lowest:.4f}", f"{found.highest:.4f}"]))  # fmt: skip
    return lines


def _score_text(result: dict[str, Any], part: str = "validation") -> str:
    scores = result.get(part)
    if not scores:
        return "–"
    if not _is_finite(scores["value"]):
        return "not finite"
    if not _is_finite(scores["low"]) or not _is_finite(scores["high"]):
        return f"{scores['value']:.4f}"
    return f"{scores['value']:.4f} ({scores['low']:.4f} to {scores['high']:.4f})"


def _is_finite(value: float | None) -> bool:
    """Return whether a score is a number; JSON has null in the place of NaN."""
    return value is not None and math.isfinite(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.splitlines()).replace('|', chr(92) + '|') for cell in cells)} |"
