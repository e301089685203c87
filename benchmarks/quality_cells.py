"""The cells of quality.py: which runs there are, in what order they are done, and what was chosen by them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

EPOCHS = 2
SEEDS = (1, 2, 3)
"""Of the result; the search has seed 0."""
WHOLE, LOW_RANK = (1e-4, 3e-5, 3e-4), (5e-4, 2e-4, 1e-3)
"""Learning rates of whole tensors and of adapters, in the order of the search."""
PARTS = {"train": 200, "validation": 100, "test": 100}
"""Rows of each part of the file, in its order."""

Kind = Literal["adapters", "whole tensors", "peft + Trainer"]
Task = Literal["long_answer", "decision"]
TASKS: tuple[Task, ...] = ("long_answer", "decision")
Cell = dict[str, Any]
Run = tuple[str, float, int]
"""Mask, learning rate and seed."""


class Method(NamedTuple):
    """What trains, and how."""

    train: tuple[str, ...]
    """Entries of mask.train."""
    rates: tuple[float, ...]
    """Learning rates to search."""
    kind: Kind
    flags: tuple[str, ...] = ("--mask.tied", "untie")
    """Further flags of train.py."""


def lora(select: str, **more: str) -> Method:
    """Return the method of adapters beside every linear layer of what ``select`` selects."""
    entry = json.dumps({"lora": {"select": select, "rank": 16, "alpha": 32, **more}})
    return Method((entry,), LOW_RANK, "adapters")


def whole(*train: str) -> Method:
    """Return the method of whole tensors, the head apart from the embeddings."""
    return Method(train, WHOLE, "whole tensors")


LISA = json.dumps({"method": "lisa", "blocks": 2, "every_steps": 10})
"""Two blocks of 30 for ten steps each, beside embeddings and head: 40 turns in two epochs of 200 rows."""
MASKS: dict[str, Method] = {
    "LoRA, all": lora("all"),
    "LoRA, last 8": lora("last:8"),
    "top 4 + head": whole("last:4", "head"),
    "top 4": whole("last:4"),
    "head": whole("head"),
    "full": Method(("all",), WHOLE, "whole tensors", ("--mask.tied", "both")),
    "QLoRA, all": lora("all", base_precision="nf4"),
    "LISA": Method(("all",), WHOLE, "whole tensors", ("--mask.tied", "both", "--mask.rotation", LISA)),
    "peft + Trainer, LoRA all": Method((), LOW_RANK, "peft + Trainer", ()),
    "LoRA, last 4": lora("last:4"),
    "LoRA, last 16": lora("last:16"),
    "top 8": whole("last:8"),
    "top 8 + head": whole("last:8", "head"),
    "top 2": whole("last:2"),
    "top 2 + head": whole("last:2", "head"),
    "top 1": whole("last:1"),
    "top 1 + head": whole("last:1", "head"),
}
"""By name, the core first."""
CORE = tuple(MASKS)[:6]


@dataclass(frozen=True)
class Study:
    """Says which runs make a table."""

    task: Task = "long_answer"
    rates: int = len(WHOLE)
    """How many of a method's rates are searched; of one nothing is to be searched."""
    seeds: tuple[int, ...] = SEEDS
    epochs: int = EPOCHS
    rows: Mapping[str, int] = field(default_factory=lambda: dict(PARTS))
    """Rows of each part."""

    def rates_of(self, mask: str) -> tuple[float, ...]:
        """Return the learning rates that a mask's search takes."""
        return MASKS[mask].rates[: self.rates]

    def key(self, name: str) -> str:
        """Return the name that a cell of this task is kept under."""
        return name if self.task == "long_answer" else f"{self.task} | {name}"

    def cell_key(self, mask: str, rate: float, seed: int) -> str:
        """Return the name that a run is kept under."""
        return self.key(cell_key(mask, rate, seed))

    def price_key(self, mask: str) -> str:
        """Return the name that the seconds and the memory of a mask are kept under."""
        return self.key(f"{mask} | price")

    def runs(self, masks: Sequence[str] = tuple(MASKS)) -> int:
        """Return how many runs the table of some masks needs."""
        return len(masks) * ((self.rates if self.rates > 1 else 0) + len(self.seeds))


LONG_ANSWER = Study()
DECISION = Study("decision", rows={**PARTS, "test": 500})
SLICE_ROWS = {"train": 40, "validation": 20, "test": 20}


def slice_of(task: Task) -> Study:
    """Return the runs of a slice: one rate, one seed, one epoch, few rows."""
    return Study(task, 1, SEEDS[:1], 1, SLICE_ROWS)


def cell_key(mask: str, rate: float, seed: int) -> str:
    """Return the name that a run on long answers is kept under."""
    return f"{mask} | {rate:g} | seed {seed}"


def cheaper(cells: Mapping[str, Cell], key: str, price: Cell) -> Cell:
    """Return the faster one of a price and that in ``cells``, if the latter is of the same machine and precision."""
    kept = cells.get(key)
    return kept if kept and same_conditions(kept, price) and kept["seconds"] < price["seconds"] else price


def same_conditions(one: Cell, other: Cell) -> bool:
    """Return whether two cells are of one machine and one precision."""
    return bool(one["machine"] == other["machine"] and dtype_of(one) == dtype_of(other))


def dtype_of(cell: Cell) -> str:
    """Return the precision of a cell; the first ones do not say theirs, which was bfloat16."""
    return str(cell.get("dtype", "bfloat16"))


def with_cell(cells: Mapping[str, Cell], key: str, cell: Cell) -> dict[str, Cell]:
    """Return the cells with one more; what it takes the place of stays in it, as ``before``.

    A price that a faster one of the same machine and precision takes the place of is dropped: it was disturbed.
    """
    old = cells.get(key)
    if old is not None and old != cell and not ("seconds" in cell and same_conditions(old, cell)):
        cell = {**cell, "before": old}
    return {**cells, key: cell}


def search_of(cells: Mapping[str, Cell], mask: str, study: Study = LONG_ANSWER) -> dict[float, Cell]:
    """Return the cells of a mask's search that are there, by rate."""
    keys = {rate: study.cell_key(mask, rate, 0) for rate in study.rates_of(mask)}
    return {rate: cells[key] for rate, key in keys.items() if key in cells}


def lowest_loss(cell: Cell) -> float:
    """Return the lowest validation loss of a run; infinity if none is finite (null in its file)."""
    return min((loss for loss in cell["validation"] if loss is not None and math.isfinite(loss)), default=math.inf)


def chosen_rate(cells: Mapping[str, Cell], mask: str, study: Study = LONG_ANSWER) -> float | None:
    """Return the rate of the lowest validation loss in the search; None until all rates have run."""
    rates = study.rates_of(mask)
    if len(rates) == 1:
        return rates[0]
    found = search_of(cells, mask, study)
    return min(rates, key=lambda rate: lowest_loss(found[rate])) if len(found) == len(rates) else None


def results_of(cells: Mapping[str, Cell], mask: str, study: Study = LONG_ANSWER) -> dict[int, Cell]:
    """Return the cells of a mask's result that are there, by seed."""
    rate = chosen_rate(cells, mask, study)
    keys = {seed: study.cell_key(mask, rate, seed) for seed in study.seeds if rate is not None}
    return {seed: cells[key] for seed, key in keys.items() if key in cells}


def next_cells(
    cells: Mapping[str, Cell], masks: Sequence[str] = tuple(MASKS), study: Study = LONG_ANSWER, again: bool = False
) -> Iterator[Run]:
    """Yield what has not run of ``masks``: search, then seeds of the result, of the core and after that of the others.

    ``again`` adds, at the end, results without intervals, which the first ones are.
    """
    for group in ([mask for mask in masks if (mask in CORE) is core] for core in (True, False)):
        for turn in range(study.rates if study.rates > 1 else 0):
            for mask in group:
                if study.cell_key(mask, (rate := study.rates_of(mask)[turn]), 0) not in cells:
                    yield mask, rate, 0
        for seed in study.seeds:
            for mask in group:
                rate_chosen = chosen_rate(cells, mask, study)
                if rate_chosen is not None and study.cell_key(mask, rate_chosen, seed) not in cells:
                    yield mask, rate_chosen, seed
    for mask in masks if again else ():
        rate_chosen = chosen_rate(cells, mask, study)
        for seed, cell in results_of(cells, mask, study).items():
            if rate_chosen is not None and "scores" not in cell:
                yield mask, rate_chosen, seed


def done(cells: Mapping[str, Cell], masks: Sequence[str] = tuple(MASKS), study: Study = LONG_ANSWER) -> int:
    """Return how many of the runs that the table needs are there."""
    searched = study.rates > 1
    return sum(
        (len(search_of(cells, mask, study)) if searched else 0) + len(results_of(cells, mask, study)) for mask in masks
    )


def is_lora(mask: str) -> bool:
    """Return whether a mask is LoRA on the unchanged model, in all or in the last blocks."""
    return mask.startswith("LoRA")
