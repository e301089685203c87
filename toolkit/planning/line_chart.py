"""Draw what training above each frost line is expected to gain, against what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.planning.chart import save_figure
from toolkit.planning.line_choice import LineChoice

_LINE, _CHOSEN = "#0072b2", "#d55e00"


def draw_choice(choice: LineChoice, path: Path) -> None:
    """Draw the expected gains against operations and memory; the suffix of ``path`` sets the format (png, svg, pdf).

    Raises:
        PlanError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    by_flops, by_memory = figure.subplots(1, 2, sharey=True)
    known = all(cost["flops"] is not None for cost in choice.costs)
    if known:
        _draw(by_flops, choice, [cost["flops"] / 1e12 for cost in choice.costs])
    else:
        _draw(by_flops, choice, [cost["trained"] / 1e6 for cost in choice.costs])
    _draw(by_memory, choice, [cost["memory"] / 2**30 for cost in choice.costs])
    by_flops.set_xlabel("operations of the whole run, TFLOP" if known else "trained parameters, millions")
    by_flops.set_ylabel("expected gain on held-out rows, nats a token")
    by_memory.set_xlabel("peak memory of a rank, GiB")
    figure.suptitle(f"adapters above each frost line, probed on {choice.rows} rows (± standard error)")
    save_figure(figure, path)


def _draw(axes: Any, choice: LineChoice, costs: list[float]) -> None:
    """Draw one point a line, named by its block; the recommended one stands out, and what does not fit is hollow."""
    gains = [gain.gain for gain in choice.gains]
    axes.errorbar(costs, gains, [gain.error for gain in choice.gains], color=_LINE, elinewidth=1, alpha=0.6)
    for gain, cost, x in zip(choice.gains, choice.costs, costs, strict=True):
        colour = _CHOSEN if gain.boundary == choice.recommended else _LINE
        face = "none" if cost["fits"] is False else colour
        axes.plot([x], [gain.gain], marker="o", markeredgecolor=colour, markerfacecolor=face)
        if len(gains) <= 12 or gain.boundary % 4 == 0 or gain.boundary == choice.recommended:
            axes.annotate(str(gain.boundary), (x, gain.gain), xytext=(4, 5), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
