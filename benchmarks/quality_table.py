"""The tables and the picture of quality.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.quality_cells import (
    LONG_ANSWER,
    MASKS,
    Cell,
    Study,
    chosen_rate,
    done,
    dtype_of,
    lowest_loss,
    next_cells,
    results_of,
    search_of,
)
from benchmarks.report import table

KINDS = ("adapters", "whole tensors", "peft + Trainer")
OF_LABELS = {"accuracy": "accuracy (95 %)", "macro_f1": "macro-F1 (95 %)", "log_loss": "log-loss (95 %)"}
"""Columns of a task with labels."""
MISSING = "–"


def interval(values: Sequence[float] | None, form: str = ".3f", with_value: bool = True) -> str:
    """Format a value with the ends of its interval; a dash for none."""
    if not values:
        return MISSING
    value, low, high = (format(one, form) for one in values)
    ends = f"{low} to {high}" if form.startswith("+") or values[1] < 0 else f"{low}–{high}"
    return f"{value} ({ends})" if with_value else ends


def middle(results: Mapping[int, Cell]) -> Cell:
    """Return the cell of the seed whose test loss is in the middle, of those with intervals; empty without one."""
    found = sorted((cell for cell in results.values() if "scores" in cell), key=lambda cell: float(cell["test"]))
    return found[(len(found) - 1) // 2] if found else {}


def result_table(cells: Mapping[str, Cell], study: Study = LONG_ANSWER) -> str:
    """Format one row a mask, below those of the base and of trivial answers; a dash where runs are missing.

    Intervals over the test rows are those of the seed whose test loss is in the middle.
    """
    of_labels = list(OF_LABELS) if study.task == "decision" else []
    epochs = [f"validation {epoch + 1}" for epoch in range(study.epochs)]
    columns = [
        "mask", "trained", "MiB to keep", "rate", *epochs, "test (range), seeds", "95 % over rows", "to base (95 %)",
        *(OF_LABELS[name] for name in of_labels), "drift (95 %)", "seconds", "peak GiB",
    ]  # fmt: skip
    rows = [
        {"mask": name, "test (range), seeds": _loss_of(scores),
         "95 % over rows": interval(scores.get("loss"), with_value=False),
         **{OF_LABELS[metric]: interval(scores.get(metric)) for metric in of_labels}}
        for name, scores in _rivals(cells, study).items()
    ]  # fmt: skip
    rows += [_row(cells, mask, study, of_labels) for mask in MASKS]
    return table(columns, [[row.get(column, MISSING) for column in columns] for row in rows])


def _row(cells: Mapping[str, Cell], mask: str, study: Study, of_labels: Sequence[str]) -> dict[str, str]:
    search, results = search_of(cells, mask, study), results_of(cells, mask, study)
    every = [*search.values(), *results.values()]
    if not every:
        return {"mask": mask}
    rate, best = chosen_rate(cells, mask, study), _best(search or results)
    tests = sorted(cell["test"] for cell in results.values())
    kept = next((cell["bytes"] for cell in results.values() if "bytes" in cell), 2 * every[0]["trained"])
    row = {
        "mask": mask, "trained": f"{every[0]['trained']:,}", "MiB to keep": f"{kept / 2**20:.1f}",
        "rate": f"{rate:g}" if rate else f"{len(search)} of {study.rates}",
        **{f"validation {epoch + 1}": _loss_text(loss) for epoch, loss in enumerate(best["validation"])},
    }  # fmt: skip
    if tests:
        row["test (range), seeds"] = f"{sum(tests) / len(tests):.3f} ({tests[0]:.3f}–{tests[-1]:.3f}), {len(tests)}"
    scored = middle(results)
    scores = scored.get("scores", {})
    row["95 % over rows"] = interval(scores.get("loss"), with_value=False)
    row["to base (95 %)"] = interval(scored.get("to_base", {}).get("loss"), "+.3f")
    row |= {OF_LABELS[metric]: interval(scores.get(metric)) for metric in of_labels}
    drift = next((cell["drift"]["to_base"] for cell in results.values() if "drift" in cell), None)
    row["drift (95 %)"] = interval(drift, "+.3f")
    if price := cells.get(study.price_key(mask)):
        row |= {"seconds": f"{price['seconds'][-1]:.0f}", "peak GiB": f"{price['peak_gib']:.2f}"}
    return row


def _rivals(cells: Mapping[str, Cell], study: Study) -> dict[str, Cell]:
    """Return the scores of the base, also if its loss alone is known, and of trivial answers."""
    rivals = dict(cells.get(study.key("rivals"), {}).get("scores", {}))
    base = cells.get(study.key("base"))
    if base and "base" not in rivals:
        rivals = {"base": {"test": base["test"]}, **rivals}
    return rivals


def _loss_of(scores: Cell) -> str:
    return _loss_text(scores["loss"][0] if "loss" in scores else scores.get("test"))


def _loss_text(loss: float | None) -> str:
    return MISSING if loss is None else f"{loss:.3f}"


def _best(cells: Mapping[Any, Cell]) -> Cell:
    return min(cells.values(), key=lowest_loss)


def equal_cost(cells: Mapping[str, Cell], study: Study = LONG_ANSWER) -> str:
    """Format the lowest validation loss of the search, of each kind of mask, within a time or a memory.

    The limits are those that some mask needs.
    """
    points = [
        (mask, {"seconds": seconds, "GiB": price["peak_gib"]}, loss)
        for mask in MASKS
        if (price := cells.get(study.price_key(mask)))
        for cell in (search_of(cells, mask, study) or results_of(cells, mask, study)).values()
        for seconds, loss in zip(price["seconds"], cell["validation"], strict=True)
        if loss is not None and math.isfinite(loss)
    ]
    kinds = [kind for kind in KINDS if any(MASKS[mask].kind == kind for mask, _, _ in points)]
    rows = []
    for unit, digits in (("seconds", 0), ("GiB", 2)):
        last: list[str] = []
        for limit in sorted({point[1][unit] for point in points}):
            within = [(loss, mask) for mask, costs, loss in points if costs[unit] <= limit]
            best = [min((one for one in within if MASKS[one[1]].kind == kind), default=None) for kind in kinds]
            row = [f"{one[1]}: {one[0]:.3f}" if one else MISSING for one in best]
            if row != last:
                rows.append([f"{limit:.{digits}f} {unit}", *row])
            last = row
    return table(["within", *(f"best {kind}" for kind in kinds)], rows) if rows else ""


def missing_line(
    cells: Mapping[str, Cell], study: Study = LONG_ANSWER, masks: Sequence[str] = tuple(MASKS), again: bool = False
) -> str:
    """Say how many runs the table still needs, and which come next."""
    total = study.runs(masks)
    following = [
        f"{mask} at {rate:g}, seed {seed}" for mask, rate, seed in islice(next_cells(cells, masks, study, again), 3)
    ]
    return f"missing: {total - done(cells, masks, study)} of {total} runs; next: {'; '.join(following) or 'none'}"


def footnotes(cells: Mapping[str, Cell], study: Study = LONG_ANSWER) -> str:
    """Say where the runs and the prices were made, and which runs are not like the others."""
    runs = [
        cell for mask in MASKS
        for cell in (*search_of(cells, mask, study).values(), *results_of(cells, mask, study).values())
    ]  # fmt: skip
    prices = [cells[key] for mask in MASKS if (key := study.price_key(mask)) in cells]
    lines = []
    for what, those in (("runs", runs), ("prices", prices)):
        made = Counter((cell["machine"], dtype_of(cell), cell["date"]) for cell in those if "machine" in cell)
        lines += [f"- {count} {what}: {machine}, {dtype}, {day}" for (machine, dtype, day), count in made.most_common()]
    tested = [cell for cell in runs if "test" in cell]
    sizes = Counter(cell["test_rows"] for cell in tested if "test_rows" in cell)
    if len(sizes) > 1:
        lines.append("- not of the same test rows: " + ", ".join(f"{count} of {rows}" for rows, count in sizes.items()))
    if old := sum("scores" not in cell for cell in tested):
        lines.append(f"- {old} results have no intervals: they were made before these were kept; --again makes them")
    if drift := next((cell["drift"] for cell in tested if "drift" in cell), None):
        lines.append(
            "- drift: loss on the base's own answers to everyday prompts, of the first seed alone, less the base's "
            f"own, {drift['base']:.3f}"
        )
    lines.append("- intervals: over the test rows, of the seed in the middle by its test loss; to base: paired")
    lines.append("- MiB to keep: the exported delta in bfloat16 (of peft its own file, in float32), else 2 bytes each")
    return "\n".join(lines)


def draw(cells: Mapping[str, Cell], path: Path, studies: Sequence[Study]) -> None:
    """Draw the lowest validation loss of each mask against seconds and against memory (needs matplotlib).

    Studies without a run that has a price are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [study for study in studies if any(_priced(cells, mask, study) for mask in MASKS)] or list(studies[:1])
    figure, grid = pyplot.subplots(len(shown), 2, figsize=(11, 6 * len(shown)), sharey="row", squeeze=False)
    styles = {
        "adapters": {"marker": "o", "linestyle": "-", "color": "#0072b2"},
        "whole tensors": {"marker": "s", "linestyle": "--", "color": "#d55e00"},
        "peft + Trainer": {"marker": "^", "linestyle": ":", "color": "#009e73"},
    }
    labels: dict[Any, list[tuple[str, tuple[float, float]]]] = {axes: [] for axes in grid.flat}
    for study, (by_time, by_memory) in zip(shown, grid, strict=True):
        for mask in MASKS:
            if (found := _priced(cells, mask, study)) is None:
                continue
            best, price = found
            cheapest = (price["peak_gib"], lowest_loss(best))
            by_time.plot(price["seconds"], best["validation"], **styles[MASKS[mask].kind])
            by_memory.plot(*([value] for value in cheapest), **styles[MASKS[mask].kind])
            labels[by_time].append((mask, (price["seconds"][-1], best["validation"][-1])))
            labels[by_memory].append((mask, cheapest))
        by_time.set(xlabel="seconds of training, filling of the cache included", ylabel="validation loss")
        by_time.set_title(study.task.replace("_", " "), loc="left")
        by_memory.set(xlabel="peak memory, GiB")
        for axes in (by_time, by_memory):
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
            low, high = axes.get_xlim()
            axes.set_xlim(low, high + 0.25 * (high - low))  # room for names
    figure.tight_layout()
    for axes, points in labels.items():
        _label(axes, points)
    figure.savefig(path)


def _label(axes: Any, points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write each name beside its point, where neither another name nor a point is; else at its right."""
    from matplotlib.transforms import Bbox

    places = [(7, 3, "left"), (7, -10, "left"), (-7, 3, "right"), (-7, -10, "right"), (0, 8, "center"),
              (0, -15, "center"), (7, 12, "left"), (7, -19, "left"), (-7, 12, "right"), (-7, -19, "right")]  # fmt: skip
    renderer = axes.figure.canvas.get_renderer()
    drawn = [point for line in axes.lines for point in line.get_xydata()]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (axes.transData.transform(point) for point in drawn)]
    for name, at in points:
        text = axes.annotate(name, at, xytext=places[0][:2], textcoords="offset points", fontsize=8)
        for dx, dy, side in [*places, places[0]]:
            text.xyann = dx, dy
            text.set_horizontalalignment(side)
            box = text.get_window_extent(renderer)
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _priced(cells: Mapping[str, Cell], mask: str, study: Study) -> tuple[Cell, Cell] | None:
    """Return the best cell of a mask's search, and its price; None where one of them or a loss is missing."""
    search, price = search_of(cells, mask, study), cells.get(study.price_key(mask))
    if not search or not price or None in _best(search)["validation"]:  # it diverged
        return None
    return _best(search), price
