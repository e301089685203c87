"""Train on PubMedQA's 500 training questions, and score base and run on the official 500 test questions.

    python benchmarks/pubmedqa.py --data FOLDER [--task TASK] [--answers N] [--rows N] [--save]

FOLDER holds ori_pqal.json and test_ground_truth.json of PubMedQA. The mask and the rate are those of
recipes/quickstart.yaml, for one epoch, in float32, on 450 rows; 50 more are validation rows. ``labels`` answers yes, no
or maybe, and its predictions are scored by the official rule too, beside the human annotators'; ``decision`` and
``decision_reasoning_free`` do so by the task files of PubMedQA's two settings; ``long_answer`` writes the conclusion.
Runs and caches are kept in --scratch, where a second start goes on. Exits 1 if the run is not better than its base in
perplexity.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toolkit  # noqa: E402
from benchmarks.report import head_lines, save  # noqa: E402
from toolkit.evaluation.table import table  # noqa: E402
from toolkit.metrics.pubmedqa import LABELS, REASONING_FREE, REASONING_REQUIRED, official_score  # noqa: E402

TASKS: dict[str, Any] = {
    "labels": {
        "name": "choice", "primary_metric": "macro_f1",
        "columns": {"question": "QUESTION", "contexts": "CONTEXTS", "answer": "final_decision"},
        "output": {"labels": list(LABELS)},
    },
    "decision": "decision",
    "decision_reasoning_free": "decision_reasoning_free",
    "long_answer": "long_answer",
}  # fmt: skip
VALIDATION_ROWS = 50


def main() -> int:
    """Train, compare, print the table as Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with PubMedQA's files")
    parser.add_argument("--task", choices=list(TASKS), default="labels")
    parser.add_argument("--answers", type=int, default=0, help="answer so many test rows by generation; default: 0")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, help="take so many training and test rows; default: all 500 of each")
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=8, help="rows evaluated at once")
    parser.add_argument("--scratch", type=Path, default=Path("runs/pubmedqa"))
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    arguments = parser.parse_args()
    truth = divide(arguments.data, arguments.scratch, arguments.rows)
    begun = time.perf_counter()
    run = train(arguments.model, arguments.task, arguments.scratch)
    trained = time.perf_counter()
    comparison = toolkit.evaluate(
        ["base", run], part="test", batch_size=arguments.batch_size, answers=arguments.answers,
        max_new_tokens=arguments.max_new_tokens,
    )  # fmt: skip
    minutes = (trained - begun) / 60, (time.perf_counter() - trained) / 60
    text = "\n".join([
        head_lines(), f"{comparison.task}: {comparison.data}", "", "```", *table(comparison), "```", "",
        *official(comparison.predictions, truth),
        f"Trained in {minutes[0]:.1f} minutes (0 if the run was there), evaluated in {minutes[1]:.1f}.", "",
    ])  # fmt: skip
    print(text)
    if arguments.save:
        save(f"pubmedqa-{arguments.task.replace('_', '-')}", text)
    perplexity = comparison.models[1].scores["perplexity"]
    return int(perplexity.verdict != "better")


def divide(data: Path, scratch: Path, limit: int | None) -> dict[str, str]:
    """Write the official training and test questions into files of their own, and return the right test labels."""
    rows = json.loads((data / "ori_pqal.json").read_text(encoding="utf-8"))
    truth: Mapping[str, str] = json.loads((data / "test_ground_truth.json").read_text(encoding="utf-8"))
    parts = {
        "train": {key: row for key, row in rows.items() if key not in truth},
        "test": {key: rows[key] for key in truth},
    }
    scratch.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        taken = dict(list(part.items())[:limit])
        (scratch / f"{name}.json").write_text(json.dumps(taken), encoding="utf-8")
    return dict(list(truth.items())[:limit])


def train(model: str, task: str, scratch: Path) -> Path:
    """Train the run, or find it trained."""
    rows = len(json.loads((scratch / "train.json").read_text(encoding="utf-8")))
    result = toolkit.train(ROOT / "recipes" / "quickstart.yaml", {
        "model.name_or_path": model, "model.dtype": "float32", "data.path": scratch / "train.json",
        "data.task": TASKS[task], "data.validation": min(VALIDATION_ROWS / 500, 10 / rows) if rows < 100 else 0.1,
        "data.test": scratch / "test.json", "data.max_length": 1024, "train.epochs": 1, "train.micro_batch_size": 4,
        "prefix.cache": "on", "prefix.cache_dir": scratch / "cache", "output.dir": scratch / task,
        "output.sample_answers": 0, "output.report": [],
    })  # fmt: skip
    return result.run


def official(predictions: Mapping[str, Mapping[str, str]], truth: Mapping[str, str]) -> list[str]:
    """Return the lines of the official score of each model's predictions, beside those of people; none of texts."""
    if not predictions:
        return []
    scores = {name: official_score(of_model, truth) for name, of_model in predictions.items()}
    scores |= {"always yes": official_score(dict.fromkeys(truth, "yes"), truth)}
    scores |= {"annotator, reasoning required": REASONING_REQUIRED, "annotator, reasoning free": REASONING_FREE}
    lines = (f"- {name}: {score.accuracy:.1%}, {score.macro_f1:.3f}" for name, score in scores.items())
    return ["By PubMedQA's official rule, accuracy and macro-F1:", "", *lines, ""]


if __name__ == "__main__":
    sys.exit(main())
