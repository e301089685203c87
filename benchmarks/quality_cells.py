"""The cells of quality.py: which runs there are, what was chosen by them, and their tables and picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import table

EPOCHS = 2
SEEDS = (1, 2, 3)
"""Of the result; the search has seed 0."""
WHOLE, LOW_RANK = (1e-4, 3e-5, 3e-4), (5e-4, 2e-4, 1e-3)
"""Learning rates of whole tensors and of adapters, in the order of the search."""


def lora(select: str) -> str:
    """Return the recipe's entry of adapters beside every linear layer of what ``select`` selects."""
    return json.dumps({"lora": {"select": select, "rank": 16, "alpha": 32}})


MASKS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "LoRA, last 8": ((lora("last:8"),), LOW_RANK),
    "top 8": (("last:8",), WHOLE),
    "LoRA, all": ((lora("all"),), LOW_RANK),
    "top 4 + head": (("last:4", "head"), WHOLE),
    "LoRA, last 4": ((lora("last:4"),), LOW_RANK),
    "top 4": (("last:4",), WHOLE),
    "LoRA, last 16": ((lora("last:16"),), LOW_RANK),
    "top 8 + head": (("last:8", "head"), WHOLE),
    "head": (("head",), WHOLE),
    "full": (("all",), WHOLE),
}
"""By name: entries of mask.train, and the learning rates to search."""

Cell = dict[str, Any]


def cell_key(mask: str, rate: float, seed: int) -> str:
    """Return the name that a run is kept under."""
    return f"{mask} | {rate:g} | seed {seed}"


def price_key(mask: str) -> str:
    """Return the name that the seconds and the memory of a mask are kept under."""
    return f"{mask} | price"


def cheaper(cells: dict[str, Cell], mask: str, price: Cell) -> Cell:
    """Return the faster one of a mask's price and that in ``cells``, if the latter is of the same machine."""
    kept = cells.get(price_key(mask))
    return kept if kept and kept["machine"] == price["machine"] and kept["seconds"] < price["seconds"] else price


def chosen_rate(cells: dict[str, Cell], mask: str) -> float | None:
    """Return the rate of the lowest validation loss in the search; None until all rates have run."""
    rates = MASKS[mask][1]
    found = {rate: cells.get(cell_key(mask, rate, 0)) for rate in rates}
    if not all(found.values()):
        return None
    return min(rates, key=lambda rate: min(found[rate]["validation"]))  # type: ignore[index]


def next_cells(cells: dict[str, Cell], masks: Sequence[str] = tuple(MASKS)) -> Iterator[tuple[str, float, int]]:
    """Yield mask, rate and seed of what has not run of ``masks``: the search first, then the seeds of the result."""
    for turn in range(max(len(rates) for _, rates in MASKS.values())):
        for mask in masks:
            rates = MASKS[mask][1]
            if cell_key(mask, rates[turn], 0) not in cells:
                yield mask, rates[turn], 0
    for seed in SEEDS:
        for mask in masks:
            rate = chosen_rate(cells, mask)
            if rate is not None and cell_key(mask, rate, seed) not in cells:
                yield mask, rate, seed


def result_table(cells: dict[str, Cell]) -> str:
    """Format one row a mask; a dash where runs are missing."""
    rows = []
    for mask, (_, rates) in MASKS.items():
        search = [cells[key] for rate in rates if (key := cell_key(mask, rate, 0)) in cells]
        rate = chosen_rate(cells, mask)
        results = [cells[key] for seed in SEEDS if rate and (key := cell_key(mask, rate, seed)) in cells]
        every = [*search, *results]
        if not every:
            rows.append([mask, *["–"] * (5 + EPOCHS)])
            continue
        tests = sorted(cell["test"] for cell in results)
        test = f"{sum(tests) / len(tests):.3f} ({tests[0]:.3f}–{tests[-1]:.3f}), {len(tests)}" if tests else "–"
        best = min(search, key=lambda cell: min(cell["validation"]))
        price = cells.get(price_key(mask))
        rows.append(
            [
                mask, f"{every[0]['trained']:,}", f"{rate:g}" if rate else f"{len(search)} of {len(rates)}",
                *(f"{loss:.3f}" for loss in best["validation"]), test,
                *([f"{price['seconds'][-1]:.0f}", f"{price['peak_gib']:.2f}"] if price else ["–", "–"]),
            ]
        )  # fmt: skip
    epochs = [f"validation {epoch + 1}" for epoch in range(EPOCHS)]
    return table(["mask", "trained", "rate", *epochs, "test (range), seeds", "seconds", "peak GiB"], rows)


def equal_cost(cells: dict[str, Cell]) -> str:
    """Format the lowest validation loss of the search, of adapters and of whole tensors, within a time or a memory.

    The limits are those that some mask needs.
    """
    points = [
        (mask, {"seconds": seconds, "GiB": price["peak_gib"]}, loss)
        for mask, (_, rates) in MASKS.items()
        if (price := cells.get(price_key(mask)))
        for rate in rates
        if (cell := cells.get(cell_key(mask, rate, 0)))
        for seconds, loss in zip(price["seconds"], cell["validation"], strict=True)
    ]
    rows = []
    for unit, digits in (("seconds", 0), ("GiB", 2)):
        last: list[str] = []
        for limit in sorted({point[1][unit] for point in points}):
            within = [(loss, mask) for mask, costs, loss in points if costs[unit] <= limit]
            best = [
                min((point for point in within if is_lora(point[1]) is lora), default=None) for lora in (True, False)
            ]
            row = [f"{point[1]}: {point[0]:.3f}" if point else "–" for point in best]
            if row != last:
                rows.append([f"{limit:.{digits}f} {unit}", *row])
            last = row
    return table(["within", "best adapters", "best whole tensors"], rows) if rows else ""


def is_lora(mask: str) -> bool:
    """Return whether adapters train in a mask, and not whole tensors."""
    return mask.startswith("LoRA")


def draw(cells: dict[str, Cell], path: Path) -> None:
    """Draw the lowest validation loss of each mask against seconds and against memory (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_time, by_memory) = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    for mask, (_, rates) in MASKS.items():
        search = [cells[key] for rate in rates if (key := cell_key(mask, rate, 0)) in cells]
        price = cells.get(price_key(mask))
        if search and price:
            best = min(search, key=lambda cell: min(cell["validation"]))
            style = {"marker": "o", "linestyle": "-", "color": "#0072b2"}
            if not is_lora(mask):
                style = {"marker": "s", "linestyle": "--", "color": "#d55e00"}
            lowest = (price["peak_gib"], min(best["validation"]))
            by_time.plot(price["seconds"], best["validation"], **style)
            by_memory.plot(*([value] for value in lowest), **style)
            ends = (price["seconds"][-1], best["validation"][-1])
            for axes, at in ((by_time, ends), (by_memory, lowest)):
                below = -12 if is_lora(mask) else 4  # masks of as many blocks end near each other
                axes.annotate(mask, at, xytext=(6, below), textcoords="offset points", fontsize=8)
    by_time.set(xlabel="seconds of training, filling of the cache included", ylabel="validation loss")
    by_memory.set(xlabel="peak memory, GiB")
    for axes in (by_time, by_memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path)
