"""benchmarks/quality.py: which runs it does and in what order, how it times them, what it keeps, and its tables."""

from __future__ import annotations

import json
import runpy
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here
from pubmedqa_files import write_pubmedqa

from benchmarks import contenders, quality, quality_runs
from benchmarks.contenders import Outcome
from benchmarks.process import Finished
from benchmarks.quality_cells import (
    CORE,
    DECISION,
    LONG_ANSWER,
    MASKS,
    SEEDS,
    Run,
    Study,
    cheaper,
    chosen_rate,
    next_cells,
    with_cell,
)
from benchmarks.quality_runs import Bench, write_rows
from benchmarks.quality_table import draw, equal_cost, footnotes, middle, missing_line, result_table
from benchmarks.record import Record

BOTH = pytest.mark.parametrize("study", [LONG_ANSWER, DECISION])
MADE = {"date": "2026-11-28", "machine": "2 cores", "dtype": "float32"}


def scored(test: float, **more: Any) -> dict[str, Any]:
    """A cell of a result as they are kept today."""
    loss = [test, test - 0.1, test + 0.1]
    return {
        "validation": [2.7, 2.6], "trained": 7 << 20, "test": test, "test_rows": 100, "scores": {"loss": loss},
        "to_base": {"loss": [-0.3, -0.4, -0.2]}, **MADE, **more,
    }  # fmt: skip


def run_all(study: Study, cells: dict[str, Any]) -> list[Run]:
    """Do what ``next_cells`` yields until nothing is left; the third rate is the best one of each mask."""
    order = []
    while (run := next(next_cells(cells, study=study), None)) is not None:
        mask, rate, seed = run
        cell = scored(2.5 + seed / 100) if seed in study.seeds else {"trained": 7 << 20, **MADE}
        cell["validation"] = [2.7, 2.6 + abs(rate - MASKS[mask].rates[2])][: study.epochs]
        cells[study.cell_key(*run)] = cell
        order.append(run)
    return order


@BOTH
def test_search_and_seeds_of_the_core_come_before_the_others_and_nothing_runs_twice(study: Study) -> None:
    cells: dict[str, Any] = {}
    order = run_all(study, cells)
    core, others = len(CORE), len(MASKS) - len(CORE)
    assert CORE == ("LoRA, all", "LoRA, last 8", "top 4 + head", "top 4", "head", "full")
    assert len(order) == len(set(order)) == len(cells) == study.runs() == 6 * len(MASKS)
    assert {mask for mask, _, _ in order[: 6 * core]} == set(CORE)
    seeds = [
        seed
        for count in (core, others)
        for seed, times in ((0, 3), (1, 1), (2, 1), (3, 1))
        for _ in range(times * count)
    ]
    assert [seed for _, _, seed in order] == seeds
    assert all(rate == MASKS[mask].rates[2] for mask, rate, seed in order if seed)
    assert all(key.startswith("decision | ") is (study is DECISION) for key in cells)
    assert result_table(cells, study).count("2.520 (2.510–2.530), 3") == len(MASKS)
    assert missing_line(cells, study) == f"missing: 0 of {6 * len(MASKS)} runs; next: none"


def test_cells_of_one_task_are_none_of_the_other_and_of_some_masks_the_rest_is_left_out() -> None:
    cells: dict[str, Any] = {}
    run_all(DECISION, cells)
    assert next(next_cells(cells)) == ("LoRA, all", 5e-4, 0)
    some = {key: cell for key, cell in cells.items() if key.startswith("decision | top 4 |")}
    assert chosen_rate(some, "top 8", DECISION) is None
    assert "top 4" not in {mask for mask, _, _ in next_cells(some, study=DECISION)}
    assert {mask for mask, _, _ in next_cells(some, ["head", "full"], DECISION)} == {"head", "full"}


def test_the_table_says_what_is_missing_and_what_comes_next() -> None:
    cells: dict[str, Any] = {}
    run_all(LONG_ANSWER, cells)
    del cells["top 2 | 0.0003 | seed 2"], cells["head | 0.0003 | seed 3"]
    assert missing_line(cells) == (
        f"missing: 2 of {6 * len(MASKS)} runs; next: head at 0.0003, seed 3; top 2 at 0.0003, seed 2"
    )
    assert missing_line(cells, masks=["full"]) == "missing: 0 of 6 runs; next: none"
    assert missing_line({}, masks=["full"]).startswith("missing: 6 of 6 runs; next: full at 0.0001, seed 0;")


def test_the_cells_that_were_made_before_are_all_in_the_table() -> None:
    cells = quality.read_cells(quality.CELLS)
    first = {key: cell.get("before", cell) for key, cell in cells.items() if "trained" in cell}
    old = {key: cell for key, cell in first.items() if "dtype" not in cell}
    assert len(old) == 53
    known = {
        LONG_ANSWER.cell_key(mask, rate, seed) for mask in MASKS for rate in MASKS[mask].rates for seed in (0, *SEEDS)
    }
    assert set(old) <= known
    text = result_table({**{key: cell for key, cell in cells.items() if key == "base" or "price" in key}, **old})
    rows = {row.split("|")[1].strip(): row for row in text.splitlines()}
    assert "2.720 (2.709–2.729), 3" in rows["LoRA, last 8"]
    assert "2.799 (2.791–2.804), 3" in rows["top 4 + head"]
    assert "2.928" in rows["base"]
    assert "34 runs: NVIDIA H100" in footnotes(old)


def test_what_a_cell_takes_the_place_of_stays_in_it() -> None:
    old = {"validation": [2.6], "test": 2.5, "machine": "a", "seconds": None}
    cells = with_cell({"k": old}, "k", scored(2.5))
    assert cells["k"]["before"] == old
    assert with_cell(cells, "k", cells["k"]) == cells
    price = {"seconds": [2.0], "peak_gib": 1.0, "machine": "a"}
    assert "before" not in with_cell({"p": price}, "p", {**price, "seconds": [1.0]})["p"]
    assert with_cell({"p": price}, "p", {**price, "dtype": "float32"})["p"]["before"] == price


def test_results_without_intervals_run_again_only_if_asked_and_last() -> None:
    cells: dict[str, Any] = {}
    run_all(LONG_ANSWER, cells)
    key = "head | 0.0003 | seed 2"
    del cells[key]["scores"]
    assert list(next_cells(cells)) == []
    assert list(next_cells(cells, again=True)) == [("head", 3e-4, 2)]
    assert "- 1 results have no intervals" in footnotes(cells)
    del cells["top 1 | 0.0003 | seed 1"]
    assert list(next_cells(cells, again=True)) == [("top 1", 3e-4, 1), ("head", 3e-4, 2)]


def test_intervals_are_those_of_the_seed_in_the_middle_and_drift_that_of_the_first() -> None:
    seeds = {
        1: scored(2.53, drift={"base": 0.4, "run": 0.6, "to_base": [0.2, 0.1, 0.3]}),
        2: scored(2.51),
        3: scored(2.52),
    }
    assert middle(seeds)["test"] == 2.52
    assert middle({**seeds, 3: {"test": 2.0}})["test"] == 2.51
    assert middle({}) == {}
    cells = {LONG_ANSWER.cell_key("head", rate, 0): scored(9.0) for rate in MASKS["head"].rates}
    cells |= {LONG_ANSWER.cell_key("head", MASKS["head"].rates[0], seed): cell for seed, cell in seeds.items()}
    row = next(row for row in result_table(cells).splitlines() if row.startswith("| head "))
    for text in (
        "2.520 (2.510–2.530), 3",
        "2.420–2.620",
        "-0.300 (-0.400 to -0.200)",
        "+0.200 (+0.100 to +0.300)",
        " 14.0 ",
    ):
        assert text in row
    assert "own, 0.400" in footnotes(cells)


def test_decisions_stand_below_base_and_trivial_answers_with_scores_of_their_labels() -> None:
    labels = {"accuracy": [0.56, 0.5, 0.62], "macro_f1": [0.3, 0.25, 0.35], "log_loss": [0.95, 0.9, 1.0]}
    cells: dict[str, Any] = {
        "decision | rivals": {
            "scores": {"base": {"loss": [1.6, 1.5, 1.7], **labels}, "majority class of the training rows": labels}
        },
        "decision | base": {"validation": 1.5, "test": 1.6},
    }  # fmt: skip
    run_all(DECISION, cells)
    for key in cells:
        if key.endswith("seed 2"):
            cells[key]["scores"] |= labels
    lines = result_table(cells, DECISION).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == [
        "base",
        "majority class of the training rows",
        CORE[0],
    ]
    assert all("0.560 (0.500–0.620)" in line and "0.300 (0.250–0.350)" in line for line in lines[2:])
    assert "accuracy" not in result_table({}, LONG_ANSWER)


def test_within_a_cost_the_best_of_each_kind_is_named() -> None:
    cells: dict[str, Any] = {}
    run_all(LONG_ANSWER, cells)
    assert equal_cost(cells) == ""
    cells |= {LONG_ANSWER.price_key(mask): {"seconds": [10.0, 20.0], "peak_gib": 1.0, **MADE} for mask in MASKS}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in equal_cost(cells).splitlines()]
    assert lines[0] == ["within", "best adapters", "best whole tensors", "best peft + Trainer"]
    assert [line[0] for line in lines[2:]] == ["10 seconds", "20 seconds", "1.00 GiB"]
    assert lines[-1][1:] == ["LoRA, all: 2.600", "LISA: 2.600", "peft + Trainer, LoRA all: 2.600"]


@pytest.mark.slow
def test_the_picture_has_a_row_for_each_task_with_prices(tmp_path: Path) -> None:
    price = {"seconds": [10.0, 20.0], "peak_gib": 1.0, **MADE}
    cells, decisions = (
        {study.cell_key("head", 1e-4, 0): scored(2.5), study.price_key("head"): price}
        for study in (LONG_ANSWER, DECISION)
    )
    for name, both in (("one", cells), ("both", {**cells, **decisions})):
        draw(both, tmp_path / f"{name}.svg", [LONG_ANSWER, DECISION])
    counts = [(tmp_path / f"{name}.svg").read_text().count("peak memory") for name in ("one", "both")]
    assert counts == [1, 2]


def test_so_many_cells_run_at_once_and_each_one_time_and_one_that_is_there_never(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)  # breaks where only one runs; a third would wait for a fourth
    order: list[Run] = []

    def run_cell(mask: str, rate: float, seed: int) -> dict[str, Any]:
        both.wait()
        order.append((mask, rate, seed))
        return scored(2.5, rivals={"base": {"loss": [3.0, 2.9, 3.1]}}) if seed else {"validation": [2.6], "trained": 7}

    path = tmp_path / "cells.json"
    quality.keep(path, "full | 0.0001 | seed 0", {"validation": [9.0], "trained": 7})
    quality.keep(path, "full | 3e-05 | seed 0", {"validation": [9.0], "trained": 7})
    assert quality.run_cells(path, LONG_ANSWER, run_cell, ["head", "full"], minutes=1, processes=2) == []
    cells = quality.read_cells(path)
    assert len(order) == len(set(order)) == 10
    assert len(cells) == 13  # two were there, and rivals
    assert cells["rivals"] == {"scores": {"base": {"loss": [3.0, 2.9, 3.1]}}, **MADE, "test_rows": 100}
    assert cells["full | 0.0001 | seed 0"] == {"validation": [9.0], "trained": 7}
    assert quality.run_cells(path, LONG_ANSWER, run_cell, ["head", "full"], minutes=1, processes=2) == []
    assert len(order) == 10


def test_a_run_that_fails_is_said_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run_cell(mask: str, rate: float, seed: int) -> dict[str, Any]:
        if (rate, seed) == (3e-5, 0):
            raise RuntimeError("exit code 1; no room")
        return {"validation": [2.6, 2.7], "trained": 7}

    path = tmp_path / "cells.json"
    assert quality.run_cells(path, DECISION, run_cell, ["head"], minutes=1) == [("head", 3e-5, 0)]
    assert list(quality.read_cells(path)) == ["decision | head | 0.0001 | seed 0", "decision | head | 0.0003 | seed 0"]
    assert "decision | head | 3e-05 | seed 0 failed: RuntimeError" in capsys.readouterr().err


def test_a_run_that_diverged_is_never_the_best(tmp_path: Path) -> None:
    cells: dict[str, Any] = {
        LONG_ANSWER.cell_key("head", rate, 0): {"validation": losses, "trained": 7}
        for rate, losses in zip(MASKS["head"].rates, ([float("nan"), None], [2.8, None], [2.9, 2.7]), strict=True)
    }
    cells |= {"base": {"validation": 3.0, "test": 3.1}, "head | price": {"seconds": [5.0, 9.0], "peak_gib": 1.5}}
    assert chosen_rate(cells, "head") == MASKS["head"].rates[2]
    assert "head: 2.700" in equal_cost(cells)
    cells[LONG_ANSWER.cell_key("head", MASKS["head"].rates[2], 0)]["validation"] = [2.5, None]
    assert "| 2.500" in " ".join(result_table(cells).split())
    draw(cells, tmp_path / "picture.svg", [LONG_ANSWER])


def test_a_price_that_cannot_be_measured_is_said_and_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_price(self: Bench, mask: str, scale: float) -> dict[str, Any]:
        if mask == "head":
            raise contenders.DoesNotFitError("no room")
        return {"seconds": [1.0, 2.0], "peak_gib": 1.0, **MADE}

    monkeypatch.setattr(Bench, "measure_price", measure_price)
    write_pubmedqa(tmp_path)
    path = tmp_path / "cells.json"
    words = ["--data", str(tmp_path / "ori_pqal.json"), "--cells", str(path), "--prices", "--masks", "head", "top 4"]
    assert quality.main(words) == 1
    assert list(quality.read_cells(path)) == ["top 4 | price"]
    assert "head | price failed: DoesNotFitError: no room" in capsys.readouterr().err


def test_no_run_starts_after_the_minutes(tmp_path: Path) -> None:
    def run_cell(mask: str, rate: float, seed: int) -> dict[str, Any]:
        raise AssertionError

    assert quality.run_cells(tmp_path / "cells.json", LONG_ANSWER, run_cell, list(MASKS), minutes=0) == []


def test_seconds_are_measured_on_a_fifth_of_the_rows_with_the_longest_among_them(tmp_path: Path) -> None:
    rows = {str(n): {"QUESTION": "q" * (n % 37)} for n in range(450)}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    scale = write_rows(tmp_path / "rows.json", tmp_path)
    parts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in (*LONG_ANSWER.rows, "price")}
    assert {name: len(part) for name, part in parts.items()} == {**LONG_ANSWER.rows, "price": 40}
    assert [key for name in ("train", "validation", "test") for key in parts[name]] == list(rows)[:400]
    assert max(map(len, (row["QUESTION"] for row in parts["price"].values()))) == 36
    assert 4.5 < scale < 5.5


def test_decisions_are_trained_on_official_training_rows_and_tested_on_test_rows(tmp_path: Path) -> None:
    write_pubmedqa(tmp_path)
    study = replace(DECISION, rows={"train": 30, "validation": 10, "test": 20})
    write_rows(tmp_path / "ori_pqal.json", tmp_path, study)
    rows, official = (json.loads((tmp_path / name).read_text()) for name in ("ori_pqal.json", quality_runs.TRUTH))
    parts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in study.rows}
    others = [key for key in rows if key not in official]
    assert list(parts["train"]) == others[:30]
    assert list(parts["validation"]) == others[30:40]
    assert list(parts["test"]) == list(official)[:20]


def test_a_row_costs_what_its_faster_epoch_took_and_the_cheapest_measurement_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [(500, 2.0), (300, 9.0), (300, 1.0), (500, 3.0)]  # two rows, in another order in the second epoch

    def train(self: Bench, part: str, scratch: Path, *given: Any) -> Outcome:
        (scratch / "run").mkdir(parents=True)
        lines = [json.dumps({"loss": 1.0, "tokens": tokens, "seconds": seconds}) for tokens, seconds in steps]
        (scratch / "run" / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"eval_loss": 1.0})]) + "\n")
        return Outcome(Record(starts=[7.0], ends=[8.0]), 3.0, 9.0, 2**30, 2)

    monkeypatch.setattr(Bench, "train", train)
    price = Bench(tmp_path).measure_price("head", 10.0)
    assert price["seconds"] == [10.0 * (4.0 + 3.0), 10.0 * (4.0 + 6.0)]
    assert price["dtype"] == "bfloat16"
    slower = {**price, "seconds": [70.0, 101.0]}
    assert cheaper({}, "k", price) is price
    assert cheaper({"k": slower}, "k", price) is price
    assert cheaper({"k": price}, "k", slower) is price
    assert cheaper({"k": {**price, "machine": "another"}}, "k", slower) is slower
    assert cheaper({"k": {**price, "dtype": "float32"}}, "k", slower) is slower


def test_a_slice_has_one_rate_one_seed_and_the_core_and_never_goes_among_the_results(tmp_path: Path) -> None:
    data = tmp_path / "ori_pqal.json"
    given = quality.parse(["--data", str(data), "--slice"])
    runs = list(next_cells({}, given.masks, given.study))
    assert [mask for mask, _, _ in runs] == list(CORE)
    assert {seed for _, _, seed in runs} == {1}
    assert missing_line({}, given.study, given.masks).startswith(
        "missing: 6 of 6 runs; next: LoRA, all at 0.0005, seed 1"
    )
    assert (given.minutes, given.study.rows, given.study.epochs) == (20, {"train": 40, "validation": 20, "test": 20}, 1)
    for words in (["--slice", "--cells", str(quality.CELLS)], ["--task", "decision"]):
        with pytest.raises(SystemExit, match="2"):
            quality.parse(["--data", str(data), *words])
    assert quality.parse(["--data", str(data), "--test-rows", "7"]).study.rows["test"] == 7


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with PubMedQA's files of 120 short questions."""
    folder = tmp_path_factory.mktemp("pubmedqa")
    write_pubmedqa(folder)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands of a cell run in this process, which has imported torch already."""

    def run(command: Sequence[str]) -> None:
        script, words = Path(command[1]), list(map(str, command[2:]))
        if script.parent.name == "launch":
            done = run_here(script.name, *words)
            assert done.returncode == 0, done.stderr
            return
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft and the Trainer warn of is theirs
            patch.setattr("sys.argv", [str(script), *words])
            runpy.run_path(str(script), run_name="__main__")

    def run_process(command: Sequence[str], log: Path, watched: Sequence[Path] = (), **more: Any) -> Finished:
        run(command)
        lines = {path: list(enumerate(path.read_text().splitlines(), 1)) for path in watched}
        return Finished(0, 1.0, 1 << 30, {log: [], **lines})  # type: ignore[dict-item]

    monkeypatch.setattr(quality_runs, "_run", run)
    monkeypatch.setattr(contenders, "run_process", run_process)


def bench_of(data: Path, folder: Path, model: Path, study: Study) -> Bench:
    """A bench of a tiny model in float32 on a dozen rows, without drift."""
    few = replace(study, rows={"train": 12, "validation": 6, "test": 60})
    write_rows(data / "ori_pqal.json", folder, few)
    return Bench(folder, few, "float32", str(model), drift=False)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("mask", "study"),
    [
        ("QLoRA, all", LONG_ANSWER),
        ("LISA", LONG_ANSWER),
        ("peft + Trainer, LoRA all", LONG_ANSWER),
        ("LoRA, all", DECISION),
    ],
)
def test_a_cell_of_each_new_kind_is_made(
    few_rows: Path, tmp_path: Path, tiny_model: Path, mask: str, study: Study
) -> None:
    bench = bench_of(few_rows, tmp_path, tiny_model, study)
    cell = bench.run_cell(mask, 1e-3, 1)
    assert len(cell["validation"]) == 2
    assert cell["test_rows"] == 60
    low, high = cell["scores"]["loss"][1:]
    assert low < cell["test"] == cell["scores"]["loss"][0] < high
    if mask != "peft + Trainer, LoRA all":
        base = cell["rivals"]["base"]["loss"][0]
        assert cell["to_base"]["loss"][0] == pytest.approx(cell["test"] - base, abs=1e-6)
    width = 4 if MASKS[mask].kind == "peft + Trainer" else 2
    assert width * cell["trained"] <= cell["bytes"] < 1.5 * width * cell["trained"] + 20_000
    labels = {"accuracy", "macro_f1", "log_loss"}
    assert (set(cell["scores"]) == {"loss", *labels}) is (study is DECISION)
    if study is DECISION:
        assert "majority class of the training rows" in cell["rivals"]
        assert "test" not in bench.run_cell("head", 1e-3, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_peft_and_the_toolkit_learn_the_same_from_the_same_rows(
    few_rows: Path, tmp_path: Path, tiny_model: Path
) -> None:
    bench = bench_of(few_rows, tmp_path, tiny_model, LONG_ANSWER)
    ours, theirs = (bench.run_cell(mask, 5e-4, 1) for mask in ("LoRA, all", "peft + Trainer, LoRA all"))
    assert ours["trained"] == theirs["trained"]
    assert theirs["validation"] == pytest.approx(ours["validation"], abs=0.02)
    assert theirs["test"] == pytest.approx(ours["test"], abs=0.02)
    prices = [bench.measure_price(mask, 5.0) for mask in ("LoRA, all", "peft + Trainer, LoRA all")]
    assert all(len(price["seconds"]) == 2 and 0 < price["seconds"][0] < price["seconds"][1] for price in prices)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_drift_of_the_first_seed_is_kept(
    few_rows: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache-root"))
    bench = replace(bench_of(few_rows, tmp_path, tiny_model, LONG_ANSWER), drift=True)
    drift = bench.run_cell("head", 1e-3, 1)["drift"]
    assert drift["to_base"][0] == pytest.approx(drift["run"] - drift["base"], abs=1e-6)
    assert drift["to_base"][1] <= drift["to_base"][0] <= drift["to_base"][2]
    assert "drift" not in bench.run_cell("head", 1e-3, 2)
