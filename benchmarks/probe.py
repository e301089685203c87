"""How well plan.py --suggest foretells which frost line pays: predictions kept before a sweep, and their regret after.

    python benchmarks/probe.py --data PATH/TO/ori_pqal.json --save            # predicts, and keeps what it predicts
    python benchmarks/probe.py --data PATH/TO/ori_pqal.json --write-rows rows # the rows, for launch/sweep.py
    python benchmarks/probe.py --measured runs/quickstart-sweep/sweep.json    # beside losses that were measured

Predictions are made from the training rows of quality.py alone: SmolLM2-135M on the first 200 of PubMedQA's rows, with
long answers. They are kept under --name in benchmarks/results/probe.json, with date and machine, and none is made
again: what is kept was said before its sweep ran, and git has the proof of when.

--measured is sweep.json of a sweep over frost lines, quality.json, of which the adapters' best validation losses of the
search are taken, or a JSON list of {"boundary": 22, "loss": 2.71}, of the lowest loss of training adapters from that
block up, with one entry of "boundary": null for the model before training. A line that was not measured has the loss on
the straight line between its neighbours, and a ~.

    regret      measured loss of what was chosen, less the lowest measured; nats a token
    last:4      no look at the data at all
    spectrum, gradient   the other ways of --suggest, at their default budget. They choose single blocks; here
                everything from the lowest one up counts as trained, which flatters their loss and not their cost
    the same rule        that of the probe, on the measured gains
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality_cells import EPOCHS, MASKS, is_lora, lowest_loss, search_of  # noqa: E402
from benchmarks.quality_runs import MODEL, write_rows  # noqa: E402
from benchmarks.report import hardware, head_lines, save, table, versions  # noqa: E402
from toolkit.commands.invocation import build_invocation  # noqa: E402
from toolkit.planning.line_choice import SHARE, LineChoice, choose_line  # noqa: E402
from toolkit.planning.suggest import suggest_for  # noqa: E402
from toolkit.runtime.paths import replace_text  # noqa: E402

PREDICTIONS = ROOT / "benchmarks" / "results" / "probe.json"
NAME = "SmolLM2-135M, PubMedQA's long answers"
OTHER_WAYS = {"spectrum": 0.25, "gradient": 0.25}
"""The other ways of --suggest and their default budgets."""

Prediction = dict[str, Any]
Losses = dict[int | None, float]
"""Measured loss by frost line; None is the model before training."""


def predict(data: Path, rows: int, dtype: str) -> tuple[Prediction, LineChoice]:
    """Probe every line with training rows alone, and ask the other ways of --suggest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(data, folder)
        overrides = {
            "model.name_or_path": MODEL, "model.dtype": dtype, "data.path": str(folder / "train.json"),
            "data.validation": "none", "train.epochs": EPOCHS,
        }  # fmt: skip
        invocation = build_invocation(None, overrides, None)
        choice = choose_line(invocation, 1, None, 1.0, rows, None)
        others = {way: suggest_for(invocation.config, way, budget, 8) for way, budget in OTHER_WAYS.items()}  # type: ignore[arg-type]
    lowest = {way: min(suggestion.chosen) for way, suggestion in others.items()}
    made = {"date": str(date.today()), "machine": hardware(), "versions": versions(("torch", "transformers"))}
    return {**made, "others": lowest, **choice.as_dict()}, choice


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Return what is kept, by name."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def measured_losses(path: Path, blocks: int) -> Losses:
    """Return the lowest measured loss of adapters by frost line, of a file as the module's docstring describes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, list):
        return {entry["boundary"]: float(entry["loss"]) for entry in content}
    if "trials" in content:
        return _swept_losses(content)
    losses: Losses = {None: content["base"]["validation"]}
    for mask in MASKS:
        search = search_of(content, mask).values()
        if is_lora(mask) and search:
            last = mask.rpartition(" ")[2]
            boundary = 0 if last == "all" else blocks - int(last)
            losses[boundary] = min(map(lowest_loss, search))
    return losses


def _swept_losses(sweep: Mapping[str, Any]) -> Losses:
    """Return the lowest validation loss of a sweep's trials by frost line, and that of the base on the same rows.

    Raises:
        ValueError: trials were scored on other rows than each other, or by another metric than the loss.
    """
    bases = [scores["validation"] for scores in sweep["base"].values() if "validation" in scores]
    if len(bases) != 1 or bases[0]["metric"] != "loss":
        metrics = ", ".join(sorted({base["metric"] for base in bases})) or "none"
        raise ValueError(f"found {len(bases)} sets of held-out rows, scored by {metrics}; expected one, scored by loss")
    losses: Losses = {None: bases[0]["value"]}
    for trial in sweep["trials"]:
        value, boundary = (trial.get("validation") or {}).get("value"), trial.get("boundary")
        if value is not None and boundary is not None:  # it diverged; its line was not known without weights
            losses[boundary] = min(value, losses.get(boundary, value))
    return losses


def loss_at(losses: Losses, line: int) -> tuple[float, bool]:
    """Return the measured loss of a line, or the one between its neighbours; and whether it was measured."""
    measured = sorted(boundary for boundary in losses if boundary is not None)
    if line in measured:
        return losses[line], True
    below = max((one for one in measured if one < line), default=measured[0])
    above = min((one for one in measured if one > line), default=measured[-1])
    if below == above:
        return losses[below], False
    return losses[below] + (losses[above] - losses[below]) * (line - below) / (above - below), False


def lines_chosen(prediction: Prediction, losses: Losses) -> dict[str, int | None]:
    """Return the line of each way; None where it names none."""
    blocks = len(prediction["lines"])
    gains = {line: losses[None] - loss for line, loss in losses.items() if line is not None}
    enough = [line for line, gain in gains.items() if gain >= SHARE * max(gains.values())]
    return {
        "probe": prediction["recommended"], "always last:4": max(0, blocks - 4), **prediction["others"],
        "the same rule, measured": max(enough),
    }  # fmt: skip


def regret_table(prediction: Prediction, losses: Losses) -> str:
    """Format what each way chooses, its measured loss and regret, and its planned cost beside training every block."""
    costs, lowest = prediction["lines"], min(loss for line, loss in losses.items() if line is not None)
    rows = []
    for way, line in lines_chosen(prediction, losses).items():
        if line is None:
            rows.append([way, *["–"] * 5])
            continue
        loss, known = loss_at(losses, line)
        about = "" if known else "~"
        shares = [costs[line][key] / costs[0][key] for key in ("flops", "memory")]
        rows.append(
            [way, str(line), f"{about}{loss:.3f}", f"{about}{loss - lowest:.3f}", *(f"{share:.2f}" for share in shares)]
        )
    return table(["way", "frost line", "measured loss", "regret", "operations", "memory"], rows)


def gain_table(prediction: Prediction, losses: Losses) -> str:
    """Format expected and measured gains of the measured lines, alone and as shares of the most of each."""
    lines = sorted((line for line in losses if line is not None), reverse=True)
    expected = {line: prediction["lines"][line]["gain"] for line in lines}
    measured = {line: losses[None] - losses[line] for line in lines}
    most = max(one["gain"] for one in prediction["lines"]), max(measured.values())
    rows = [
        [str(line), f"{expected[line]:.3f}", f"{measured[line]:.3f}",
         f"{expected[line] / most[0]:.2f}", f"{measured[line] / most[1]:.2f}"]
        for line in lines
    ]  # fmt: skip
    pairs = list(combinations(lines, 2))
    right = sum((expected[a] - expected[b]) * (measured[a] - measured[b]) > 0 for a, b in pairs)
    head = ["frost line", "expected gain", "measured gain", "expected, of the most", "measured, of the most"]
    return f"{table(head, rows)}\n\npairs of lines in the right order: {right} of {len(pairs)}"


def within_table(prediction: Prediction, losses: Losses) -> str:
    """Format regrets where a line may cost no more than a measured one: the best of the probe's, and last:4."""
    lines = sorted((line for line in losses if line is not None), reverse=True)
    last = max(0, len(prediction["lines"]) - 4)
    rows = []
    for number, limit in enumerate(lines):
        affordable = lines[: number + 1]
        best = min(losses[line] for line in affordable)
        chosen = max(affordable, key=lambda line: prediction["lines"][line]["gain"])
        always = max(last, limit)
        regrets = [f"{losses[chosen] - best:.3f}", f"{loss_at(losses, always)[0] - best:.3f}"]
        rows.append([f"frost line {limit}", str(chosen), *regrets])
    return table(["at most the cost of", "probe's line", "its regret", "regret of last:4"], rows)


def compare(prediction: Prediction, losses: Losses) -> str:
    """Format all that is to say of a prediction beside measured losses."""
    parts = [gain_table(prediction, losses), regret_table(prediction, losses), within_table(prediction, losses)]
    return "\n\n".join(parts)


def main(words: Sequence[str] | None = None) -> int:
    """Predict and keep, or compare what is kept with measured losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="PubMedQA's ori_pqal.json, to predict")
    parser.add_argument("--write-rows", type=Path, help="with --data: write train.json and validation.json there alone")
    parser.add_argument("--measured", type=Path, help="measured losses, to compare with what is kept")
    parser.add_argument("--rows", type=int, default=40, help="rows that the probe looks at; default: 40")
    parser.add_argument("--dtype", default="float32", help="precision of the model; default: float32")
    parser.add_argument("--name", default=NAME, help="name that the prediction is kept under")
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS, help="default: benchmarks/results/probe.json")
    parser.add_argument("--save", action="store_true", help="also write what is printed under benchmarks/results/")
    given = parser.parse_args(words)
    kept: Mapping[str, Prediction] = read_predictions(given.predictions)
    if (given.data is None) == (given.measured is None):
        parser.error("expected either --data, to predict, or --measured, to compare")
    if given.write_rows:
        if given.data is None:
            parser.error("--write-rows needs --data")
        given.write_rows.mkdir(parents=True, exist_ok=True)
        write_rows(given.data, given.write_rows)
        return 0
    if given.data and given.name in kept:
        parser.error(f"{given.name!r} was predicted on {kept[given.name]['date']}, which stays; choose another --name")
    if given.measured and given.name not in kept:
        parser.error(f"{given.name!r} was not predicted; there are: {', '.join(kept) or 'none'}")
    if given.data:
        prediction, choice = predict(given.data, given.rows, given.dtype)
        replace_text(given.predictions, json.dumps({**kept, given.name: prediction}, indent=1) + "\n")
        lowest = ", ".join(f"{way} {line}" for way, line in prediction["others"].items())
        name, body = "probe", f"{choice.table()}\nlowest block of the other ways: {lowest}"
        body = f"```\n{body}\n```"
    else:
        prediction = kept[given.name]
        name, body = "probe-regret", compare(prediction, measured_losses(given.measured, len(prediction["lines"])))
        body = f"predicted on {prediction['date']} ({prediction['rows']} rows)\n\n{body}"
    text = f"{head_lines(f'; {given.name}')}\n{body}"
    print(text)
    if given.save:
        save(name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
