"""Draw the trials of a sweep: quality against each cost, with the front marked."""

from __future__ import annotations

import io
import math
from typing import Any

from toolkit.sweeping.results import bases_of, quality_of
from toolkit.sweeping.table import COSTS, ScoredTrial, front, points_of
from toolkit.sweeping.trials import Sweep

_FRONT, _BEHIND, _BASE = "#d55e00", "#0072b2", "#666666"
_LABELS = {"seconds": "seconds of training steps", "memory_gib": "peak memory, GiB", "trained": "trained parameters"}


def draw(sweep: Sweep) -> str:
    """Return the picture as SVG text; numbers beside the points are those of the trials, bars their 95 % intervals."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    points = points_of(sweep)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, cost in zip(figure.subplots(1, 3, sharey=True), COSTS, strict=True):
        _draw_cost(axes, cost, points)
        for base in filter(None, map(quality_of, bases_of(sweep).values())):
            axes.axhline(base.value, color=_BASE, linestyle=":", linewidth=1)
    metric = sweep.trials[0].config.train.metric_for_best_model
    better = " (more is better)" if points and points[0].higher_is_better else ""
    figure.axes[0].set_ylabel(f"validation {metric}{better}")
    figure.suptitle("front: orange squares; dotted: the model before training", fontsize=9)
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep"}):
        figure.savefig(written, format="svg", metadata=nothing)
    return written.getvalue()


def _draw_cost(axes: Any, cost: str, points: list[ScoredTrial]) -> None:
    """Draw quality against one cost."""
    best = front(points, cost)
    for point in points:
        is_best = point in best
        value, low, high = point.quality.value, point.quality.low, point.quality.high
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]] if math.isfinite(low + high) else None
        axes.errorbar(
            [point.cost(cost)], [value], yerr=reach, fmt="s" if is_best else "o", markersize=6 if is_best else 5,
            color=_FRONT if is_best else _BEHIND, elinewidth=0.8, capsize=2,
        )  # fmt: skip
        at = (point.cost(cost), value)
        axes.annotate(str(point.trial.number), at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    if len(best) > 1:
        steps = [point.cost(cost) for point in best], [point.quality.value for point in best]
        axes.step(*steps, where="post", color=_FRONT, linewidth=1)
    if cost == "trained" and points and min(point.cost(cost) for point in points) > 0:
        _set_log_scale(axes)
    axes.set_xlabel(_LABELS[cost])
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


def _set_log_scale(axes: Any) -> None:
    """Give the horizontal axis a logarithmic scale with few labels: 500 k, 1 M, 2 M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
