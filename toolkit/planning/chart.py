"""Draw a plan: the layers with the frost line, and stacked bars of memory by kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.planning.device_fit import DeviceFit
from toolkit.planning.memory import KINDS
from toolkit.planning.planner import Plan
from toolkit.runtime.errors import PlanError

_SUFFIXES = ".png", ".svg", ".pdf"
_FROZEN, _TRAINED, _PARTLY = "#a8c8e8", "#e8743b", "#f0b48c"
_COLOURS = ("#a8c8e8", "#5b8db8", "#f0b48c", "#e8743b", "#b83a2a", "#7fb069", "#e6c229", "#9a8c98")


def draw(plan: Plan, path: Path, fit: DeviceFit | None = None) -> None:
    """Draw a plan, with the GPU's memory if ``fit`` is given; the suffix of ``path`` sets the format (png, svg, pdf).

    Raises:
        PlanError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    layers, bars = figure.subplots(1, 2, width_ratios=(1, 1.4))
    _draw_layers(layers, plan)
    _draw_bars(bars, plan, fit)
    spec = plan.variant.spec
    figure.suptitle(f"{plan.model}: engine {spec.name} on {spec.ranks} rank(s), {spec.optimizer}")
    save_figure(figure, path)


def require_picture(path: Path) -> None:
    """Raise PlanError unless the suffix of a file names a picture; without one, matplotlib would add its own."""
    if path.suffix.lower() not in _SUFFIXES:
        raise PlanError(f"--png {path}: expected a file name that ends in {', '.join(_SUFFIXES)}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib's; PlanError if that fails."""
    require_picture(path)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise PlanError(f"--png {path} cannot be written ({error}); choose another place") from None


def _draw_layers(axes: Any, plan: Plan) -> None:
    """Draw a box for each part from input to head, coloured by whether it trains."""
    parts = plan.audit
    frost_line = next((index for index, row in enumerate(parts) if row.trained), len(parts))
    for index, row in enumerate(parts):
        colour = _FROZEN if not row.trained else _TRAINED if row.trained == row.parameters else _PARTLY
        axes.barh(index, 1, height=0.9, color=colour, edgecolor="white")
        axes.text(0.5, index, f"{row.part}   {row.parameters / 1e6:,.1f} M   {row.state}", ha="center", va="center")
    axes.axhline(frost_line - 0.5, color="#1f3b57", linewidth=2.5)
    axes.text(1.02, frost_line - 0.48, "frost line", va="bottom", color="#1f3b57")
    axes.set_axis_off()
    axes.set_xlim(0, 1.25)


def _draw_bars(axes: Any, plan: Plan, fit: DeviceFit | None) -> None:
    """Draw memory by kind: at the overall peak, at each kind's own peak, and on the host."""
    names = [f"at the peak\n({plan.memory.moment})", "each kind at most"]
    bars: list[Mapping[str, int]] = [plan.memory.at_peak, plan.memory.most]
    if plan.memory.host:
        names, bars = [*names, "on the host"], [*bars, plan.memory.host]
    for position, held in enumerate(bars):
        bottom = 0.0
        for kind, colour in zip(KINDS, _COLOURS, strict=True):
            size = held.get(kind, 0) / 2**30
            axes.bar(position, size, bottom=bottom, color=colour, width=0.6, label=kind if position == 0 else None)
            bottom += size
    if fit is not None:
        axes.axhline(fit.budget / 2**30, color="black", linestyle="--", linewidth=1)
        axes.text(len(bars) - 0.55, fit.budget / 2**30, " GPU", va="center")
    axes.set_xticks(range(len(bars)), names)
    axes.set_ylabel("GiB a rank")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
