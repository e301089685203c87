"""Draw the curves of a run as SVG: no words in it, so that it is of no language, and colours of the page it stands in.

Labels stand in the page beside the picture. Numbers stay text, which a reader can select and a browser can scale.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit.report.facts import Curves

_INK, _QUIET, _TRAIN, _VALIDATION = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "var(--ink)", _QUIET: "var(--line)", _TRAIN: "var(--train)", _VALIDATION: "var(--validation)"}
"""Colours that matplotlib is given, and what stands in their place in the page: light and dark have their own."""
_MOST_POINTS = 240
"""Points of a curve above which it is drawn as means of neighbouring steps, with their range behind."""
_SIZE = (4.6, 2.5)
"""Inches: on a phone a point of it is about a pixel."""


LABEL = "@label@"
"""Stands in a picture for what it shows, which is said in the language of the page."""


def draw_losses(runs: Sequence[Curves], best_step: int | None) -> str:
    """Draw training and validation loss over steps, of one run or of folds, and mark the step of the best loss."""
    figure, axes = _figure()
    for curves in runs:
        steps, means, lows, highs = _binned(curves.steps, curves.losses)
        if len(steps) < len(curves.steps):
            axes.fill_between(steps, lows, highs, color=_TRAIN, alpha=0.2, linewidth=0)
        marks = {"marker": ".", "markersize": 4} if len(steps) <= 12 else {}
        axes.plot(steps, means, color=_TRAIN, linewidth=1.2, **marks)
    for curves in runs:
        axes.plot(
            curves.validation_steps, curves.validation_losses, color=_VALIDATION, linewidth=1.8, linestyle="--",
            marker="o", markersize=4 if len(curves.validation_steps) <= 30 else 0,
        )  # fmt: skip
        if len(runs) == 1 and best_step in curves.validation_steps:
            at = curves.validation_losses[curves.validation_steps.index(best_step)]
            axes.plot([best_step], [at], color=_VALIDATION, marker="D", markersize=9, markerfacecolor="none")
    return _svg(figure, "losses")


def draw_learning_rate(runs: Sequence[Curves]) -> str:
    """Draw the learning rate over steps."""
    figure, axes = _figure()
    for curves in runs:
        steps, means, _, _ = _binned(curves.steps, curves.learning_rates)
        axes.plot(steps, means, color=_TRAIN, linewidth=1.5, marker="." if len(steps) == 1 else "")
    axes.set_ylim(bottom=0)
    return _svg(figure, "rate")


def _binned(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return steps with the mean, lowest and highest value of each bin of neighbouring steps; NaN where none is."""
    at, known = np.asarray(steps, float), np.asarray(values, float)
    if len(at) <= _MOST_POINTS:
        return at, known, known, known
    bins = np.array_split(np.arange(len(at)), _MOST_POINTS)
    finite = [part[np.isfinite(known[part])] for part in bins]
    found = [(known[p].mean(), known[p].min(), known[p].max()) if len(p) else (np.nan,) * 3 for p in finite]
    means, lows, highs = np.array(found).T
    return np.array([at[part].mean() for part in bins]), means, lows, highs


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.tick_params(colors=_INK, labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
    axes.yaxis.get_offset_text().set_color(_INK)
    axes.grid(visible=True, color=_QUIET, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_INK)
    return figure, axes


def _svg(figure: Any, salt: str) -> str:
    """Return the figure as an SVG element with the page's colours, without metadata and without a size of its own."""
    from matplotlib import rc_context

    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "path.simplify": True}):
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None  # matplotlib writes one
    body = text[text.index("<svg") :].split(">", 1)[1].rsplit("</svg>", 1)[0]
    body = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # two figures of a page would share them
    body = re.sub(r" font-family: [^;\"]*;", "", body)  # the page's
    body = body.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{LABEL}"><title>{LABEL}</title>{body.strip()}</svg>'
