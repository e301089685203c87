"""benchmarks/quality.py: which runs it does, how it times them, and its tables."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, quality_cells
from benchmarks.contenders import Outcome
from benchmarks.record import Record


def test_quality_searches_first_then_repeats_the_best_rate_and_runs_nothing_twice(tmp_path: Path) -> None:
    cells: dict[str, Any] = {}
    done = []
    while (cell := next(quality_cells.next_cells(cells), None)) is not None:
        mask, rate, seed = cell
        best = quality_cells.MASKS[mask][1][2]
        losses = [2.7, 2.6 + abs(rate - best)]
        cells[quality_cells.cell_key(*cell)] = {"validation": losses, "trained": 7, "test": 2.5 + seed / 100}
        done.append(cell)
    masks = len(quality_cells.MASKS)
    assert len(done) == len(set(done)) == 3 * masks + 3 * masks
    assert [seed for _, _, seed in done] == [0] * 3 * masks + [1] * masks + [2] * masks + [3] * masks
    assert all(rate == quality_cells.MASKS[mask][1][2] for mask, rate, seed in done if seed)
    assert quality_cells.result_table(cells).count("2.520 (2.510–2.530), 3") == masks
    assert quality_cells.equal_cost(cells) == ""
    cells |= {quality_cells.price_key(mask): {"seconds": [10.0, 20.0], "peak_gib": 1.0} for mask in quality_cells.MASKS}
    within = quality_cells.equal_cost(cells).splitlines()
    assert [line.split("|")[1].strip() for line in within[2:]] == ["10 seconds", "20 seconds", "1.00 GiB"]
    assert "LoRA, all: 2.600" in within[-1]
    assert next(quality_cells.next_cells(cells), None) is None
    for key, cell in cells.items():  # another process may have kept some meanwhile
        quality.keep(tmp_path / "cells.json", key, cell)
    assert quality.read_cells(tmp_path / "cells.json") == cells
    some = {key: cell for key, cell in cells.items() if key.startswith("top 4 |")}
    assert quality_cells.chosen_rate(some, "top 8") is None
    assert next(quality_cells.next_cells(some))[0] != "top 4"
    assert {mask for mask, _, _ in quality_cells.next_cells(some, ["head", "full"])} == {"head", "full"}


def test_quality_runs_so_many_cells_at_once_and_each_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)  # breaks where only one runs; a third would wait for a fourth
    done: list[tuple[str, float, int]] = []

    def run_cell(folder: Path, mask: str, rate: float, seed: int, with_test: bool) -> dict[str, Any]:
        both.wait()
        done.append((mask, rate, seed))
        return {"validation": [2.6, 2.7], "trained": 7, **({"test": 2.5} if with_test else {})}

    monkeypatch.setattr(quality, "run_cell", run_cell)
    quality.run_cells(tmp_path / "cells.json", tmp_path, ["head", "top 4"], minutes=1, processes=2)
    assert len(done) == len(set(done)) == len(quality.read_cells(tmp_path / "cells.json")) == 12


def test_quality_measures_seconds_on_a_fifth_of_the_rows_with_the_longest_among_them(tmp_path: Path) -> None:
    rows = {str(n): {"QUESTION": "q" * (n % 37)} for n in range(450)}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    scale = quality.write_rows(tmp_path / "rows.json", tmp_path)
    parts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in (*quality.PARTS, "price")}
    assert {name: len(part) for name, part in parts.items()} == {**quality.PARTS, "price": 40}
    assert max(map(len, (row["QUESTION"] for row in parts["price"].values()))) == 36
    assert 4.5 < scale < 5.5
    assert not set(parts["train"]) & (set(parts["validation"]) | set(parts["test"]))


def test_a_row_costs_what_its_faster_epoch_took_and_the_cheapest_measurement_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [(500, 2.0), (300, 9.0), (300, 1.0), (500, 3.0)]  # two rows, in another order in the second epoch

    def train_mask(data: Path, scratch: Path, *given: Any) -> Outcome:
        (scratch / "run").mkdir(parents=True)
        lines = [json.dumps({"loss": 1.0, "tokens": tokens, "seconds": seconds}) for tokens, seconds in steps]
        (scratch / "run" / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"eval_loss": 1.0})]) + "\n")
        return Outcome(Record(starts=[7.0], ends=[8.0]), 3.0, 9.0, 2**30, 2)

    monkeypatch.setattr(quality, "train_mask", train_mask)
    price = quality.measure_price(tmp_path, "head", 10.0)
    assert price["seconds"] == [10.0 * (4.0 + 3.0), 10.0 * (4.0 + 6.0)]
    key = quality_cells.price_key("head")
    slower = {**price, "seconds": [70.0, 101.0]}
    assert quality_cells.cheaper({}, "head", price) is price
    assert quality_cells.cheaper({key: slower}, "head", price) is price
    assert quality_cells.cheaper({key: price}, "head", slower) is price
    assert quality_cells.cheaper({key: {**price, "machine": "another"}}, "head", slower) is slower
