"""The runs of quality.py: rows, training, validation losses, scores of the test rows, and prices."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.contenders import Outcome, run_peer, run_toolkit
from benchmarks.quality_cells import LONG_ANSWER, MASKS, Cell, Study
from benchmarks.report import hardware, versions
from benchmarks.workload import ROOT, Workload

MODEL = "bundled:smollm2-135m"
PRICE_EVERY = 5
"""One in so many training rows is trained to measure seconds."""
METRICS = ("loss", "accuracy", "macro_f1", "log_loss")
"""Scores that a cell keeps, as far as the task has them."""
TRUTH = "test_ground_truth.json"
"""PubMedQA's official test rows, beside its rows."""


def write_rows(data: Path, folder: Path, study: Study = LONG_ANSWER) -> float:
    """Write train.json, validation.json and test.json: the file's first rows, the next and the ones after.

    Of decisions the first two are of the official training questions, and the test rows are official ones. Also writes
    price.json, a fifth of train.json; returns how many times the characters of it train.json has.
    """
    rows: dict[str, Any] = json.loads(data.read_text(encoding="utf-8"))
    if study.task == "decision":
        official = json.loads((data.parent / TRUTH).read_text(encoding="utf-8"))
        tests = iter([(key, rows[key]) for key in official])
        others = iter([(key, row) for key, row in rows.items() if key not in official])
    else:
        tests = others = iter(rows.items())
    parts = {
        name: dict(islice(tests if name == "test" else others, count)) for name, count in study.rows.items()
    }  # fmt: skip
    by_length = sorted(parts["train"].items(), key=lambda item: len(json.dumps(item[1])))
    parts["price"] = dict(by_length[PRICE_EVERY - 1 :: PRICE_EVERY])
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return len(json.dumps(parts["train"])) / len(json.dumps(parts["price"]))


@dataclass(frozen=True)
class Bench:
    """Does the runs of a study on the rows in a folder."""

    folder: Path
    study: Study = LONG_ANSWER
    dtype: str = "bfloat16"
    model: str = MODEL
    drift: bool = True
    """Whether the first seed of a result is also scored on the base's everyday answers."""

    @property
    def _task(self) -> tuple[str, ...]:
        return () if self.study.task == "long_answer" else ("--data.task", self.study.task)

    def provenance(self) -> Cell:
        """Return date, machine, versions and precision of a cell."""
        packages = versions(("torch", "transformers", "peft"))
        return {"date": str(date.today()), "machine": hardware(), "versions": packages, "dtype": self.dtype}

    def train(self, part: str, scratch: Path, mask: str, rate: float, seed: int, cache: Path, *flags: str) -> Outcome:
        """Train a mask on the rows of ``part`` into ``scratch``, which is made.

        Raises:
            DoesNotFitError: it ran out of memory.
            RuntimeError: it failed otherwise.
        """
        rows = self.folder / f"{part}.json"
        orders = [list(range(len(json.loads(rows.read_text(encoding="utf-8")))))] * self.study.epochs
        method = MASKS[mask]
        return run_toolkit(
            Workload(self.model, str(rows), [], orders, seed, rate), scratch, "--model.dtype", self.dtype,
            "--mask.train", *method.train, *method.flags, "--prefix.cache_dir", str(cache), *self._task, *flags,
        )  # fmt: skip

    def train_peer(self, part: str, scratch: Path, rate: float, seed: int, *flags: str) -> Outcome:
        """Train LoRA in all blocks with peft under the Trainer, into ``scratch``; raises as ``train``."""
        scratch.mkdir()
        workload = scratch / "workload.json"
        command = [
            sys.executable, str(ROOT / "benchmarks" / "peer_rows.py"), str(workload), "--model", self.model, "--rows",
            str(self.folder / f"{part}.json"), "--epochs", str(self.study.epochs), "--seed", str(seed), "--rate",
            str(rate), "--dtype", self.dtype, *self._task, *flags,
        ]  # fmt: skip
        _run(command)
        return run_peer(workload, scratch / "peer", "peft_trainer.py", ("--everywhere",))

    def run_cell(self, mask: str, rate: float, seed: int) -> Cell:
        """Train once; return the losses, and the scores of the test rows if the seed is one of the result.

        Runs share a cache, which does not change them. ``rivals`` are the scores of base and trivial answers.
        """
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name) / "scratch"
            if MASKS[mask].kind == "peft + Trainer":
                return self._run_peer_cell(scratch, rate, seed)
            flags = ["--data.validation", str(self.folder / "validation.json"), "--output.sample_answers", "0"]
            flags += ["--output.keep", str(self.study.epochs), "--data.test", str(self.folder / "test.json")]
            flags += ["--output.report", "[]"]
            outcome = self.train("train", scratch, mask, rate, seed, self.folder / "cache", *flags)
            run = scratch / "run"
            losses = [row["eval_loss"] for row in _metrics(run) if "eval_loss" in row]
            cell: Cell = {"validation": losses, "trained": outcome.record.trainable, **self.provenance()}
            if seed not in self.study.seeds:
                return cell
            with_drift = self.drift and seed == self.study.seeds[0]
            found = evaluate("base", str(run), "--step", "best", "--part", "test", *(["--drift"] if with_drift else []))
            delta = scratch / "delta"
            export = [sys.executable, str(ROOT / "launch" / "export.py"), str(run), "--delta", "--dtype", "bfloat16"]
            _run([*export, "--step", "best", "--output", str(delta)])
            return {**cell, **kept_scores(found), "bytes": _tensor_bytes(delta), "rivals": rivals(found)}

    def _run_peer_cell(self, scratch: Path, rate: float, seed: int) -> Cell:
        """Do so with peft; of what it saved, the adapter of the best epoch is scored."""
        outcome = self.train_peer("train", scratch, rate, seed, "--validation", str(self.folder / "validation.json"))
        saved = scratch / "peer"
        losses = json.loads((saved / "validation.json").read_text(encoding="utf-8"))
        cell: Cell = {"validation": losses, "trained": outcome.record.trainable, **self.provenance()}
        if seed not in self.study.seeds:
            return cell
        adapter = saved / f"epoch-{losses.index(min(losses)) + 1}"
        rows = ("--data.path", str(self.folder / "test.json"), *self._task)
        found = evaluate(self.model, str(adapter), "--dtype", self.dtype, *rows)
        return {**cell, **kept_scores(found), "bytes": _tensor_bytes(adapter)}

    def base_cell(self) -> Cell:
        """Return the base's losses on the validation and the test rows."""
        flags = ("--dtype", self.dtype, *self._task)
        paths = {part: str(self.folder / f"{part}.json") for part in ("validation", "test")}
        losses = {part: evaluate(self.model, "--data.path", path, *flags)["loss"] for part, path in paths.items()}
        return {**losses, **self.provenance()}

    def measure_price(self, mask: str, scale: float) -> Cell:
        """Train price.json on an empty cache; return the seconds at the end of each epoch of all rows, and the peak."""
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name) / "scratch"
            if MASKS[mask].kind == "peft + Trainer":
                outcome = self.train_peer("price", scratch, 1e-5, 0)
                sequence = Workload.read(scratch / "workload.json").sequence
                ends = zip(outcome.record.starts, outcome.record.ends, strict=True)
                steps = [(len(ids), end - start) for (ids, _), (start, end) in zip(sequence, ends, strict=True)]
            else:
                outcome = self.train("price", scratch, mask, 1e-5, 0, Path(name) / "cache")
                steps = [(row["tokens"], row["seconds"]) for row in _metrics(scratch / "run") if "loss" in row]
        size = len(steps) // self.study.epochs
        by_length = [sorted(steps[size * epoch :][:size]) for epoch in range(self.study.epochs)]
        one_epoch = sum(min(seconds for _, seconds in same_row) for same_row in zip(*by_length, strict=True))
        filling = outcome.record.starts[0] - outcome.begin
        seconds = [round(scale * (filling + one_epoch * (epoch + 1)), 1) for epoch in range(self.study.epochs)]
        return {"seconds": seconds, "peak_gib": round(outcome.peak_bytes / 2**30, 3), **self.provenance()}


def evaluate(*words: str) -> dict[str, Any]:
    """Return the JSON of launch/evaluate.py.

    Raises:
        RuntimeError: it failed; ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "scores.json"
        _run([sys.executable, str(ROOT / "launch" / "evaluate.py"), *words, "--output", str(output)])
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found


def kept_scores(found: Mapping[str, Any]) -> Cell:
    """Return what a cell keeps of an evaluation of two models, the second against the first.

    A score is a list of its value and the ends of its 95 % interval over the rows; ``to_base`` has the differences.
    """
    scores = found["models"][1]["scores"]
    cell: Cell = {
        "test": scores["loss"]["value"], "test_rows": found["rows"], "scores": _intervals(scores),
        "to_base": _intervals({name: score["difference"] for name, score in scores.items()}),
    }  # fmt: skip
    if found["drift"]:
        base, run = (model["scores"]["loss"] for model in found["drift"]["models"][:2])
        more = _intervals({"drift": run["difference"]}, ("drift",))
        cell["drift"] = {"base": base["value"], "run": run["value"], "to_base": more["drift"]}
    return cell


def rivals(found: Mapping[str, Any]) -> Cell:
    """Return the scores of the base and of trivial answers, by name, from an evaluation of base and run."""
    others = [found["models"][0], *found["models"][2:]]
    return {model["name"]: _intervals(model["scores"]) for model in others}


def _intervals(scores: Mapping[str, Any], names: tuple[str, ...] = METRICS) -> Cell:
    return {
        name: [scores[name][key] for key in ("value", "low", "high")]
        for name in names
        if scores.get(name) is not None
    }  # fmt: skip


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _tensor_bytes(folder: Path) -> int:
    """Return the bytes of the tensors' files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"exit code {done.returncode}; its last lines:\n" + "\n".join(done.stderr.splitlines()[-20:])
        )
