"""Score choices here and by lm-eval 0.4.13 (pip install lm-eval), model for model, and compare.

    python benchmarks/lm_eval_scores.py --data ori_pqal.json [--rows 100] [--models bundled:smollm2-135m …] [--save]

lm-eval's own prompts of pubmedqa and kormedmcqa read local rows; here task files have these prompts. PubMedQA's rows
are those of --data. KorMedMCQA's may not be shipped: 30 rows of this project have its columns. Its task in lm-eval
generates and has no acc, so its prompt is scored as multiple choice, by letters and by the texts of the options. Each
model is scored twice: with its chat template (lm-eval's --apply_chat_template), and as plain text, where here a chat
template stands for that. Exits 1 if acc or acc_norm differ, or if the log-likelihoods of two options of a row are
further apart here than there by more than 0.001 nats. (lm-eval's share a shift of up to 0.003 in a row: its softmax.)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from benchmarks.report import head_lines, save, table  # noqa: E402
from toolkit.config.schema import ModelConfig  # noqa: E402
from toolkit.data.sources import Source  # noqa: E402
from toolkit.evaluation.outputs import Asked, compute_outputs  # noqa: E402
from toolkit.evaluation.rows import rows_for  # noqa: E402
from toolkit.evaluation.scoring import Scorer  # noqa: E402
from toolkit.inference.open_model import open_model  # noqa: E402
from toolkit.models.load import load  # noqa: E402

PLAIN = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
"""Chat template of a plain prompt, with a blank before its answer as in lm-eval."""
LETTERS = list("ABCDE")
CHOICE_ROWS = ROOT / "examples" / "data" / "clinical" / "choice_ko.jsonl"
KORMEDMCQA_PROMPT = (
    "{{ question }}\n{% for option in options %}{{ letters[loop.index0] }}. {{ option }}\n{% endfor %}정답："
)
NEAR = 1e-3
Row = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One task in both programs."""

    name: str
    rows: Sequence[Row]
    ours: Row
    """Task of ``data.task``."""
    theirs: Row
    """Keys of lm-eval's task that differ between tasks."""


def compared(pubmedqa: Sequence[Row]) -> Iterator[Compared]:
    """Yield the tasks that are compared, with lm-eval's own functions and template where it has them."""
    import lm_eval.tasks
    from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text

    labels = ["yes", "no", "maybe"]
    columns = {"question": "QUESTION", "contexts": "CONTEXTS", "answer": "final_decision"}
    prompt = "Abstract: {{ contexts | join('\\n') }}\nQuestion: {{ question }}\nAnswer:"
    ours = {"name": "choice", "columns": columns, "prompt": prompt, "target": "{{ label }}"}
    theirs = {"doc_to_text": doc_to_text, "doc_to_target": "final_decision", "doc_to_choice": labels}
    yield Compared("pubmedqa", pubmedqa, ours | {"output": {"labels": labels}}, theirs)
    rows = [json.loads(line) for line in CHOICE_ROWS.read_text(encoding="utf-8").splitlines()]
    template = Path(lm_eval.tasks.__path__[0]) / "kormedmcqa" / "_template_yaml"
    text = yaml.load(template.read_text(encoding="utf-8"), _WithoutFunctions)["doc_to_text"]
    for name, target, choices in (
        ("letters", "{{ letter }}", LETTERS),
        ("texts", "{{ label }}", "{{ [A, B, C, D, E] }}"),
    ):
        yield Compared(
            f"kormedmcqa, {name}", rows, {"name": "choice", "prompt": KORMEDMCQA_PROMPT, "target": target},
            {"doc_to_text": text, "doc_to_target": "{{ answer - 1 }}", "doc_to_choice": choices},
        )  # fmt: skip


def main() -> int:
    """Print the table as Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="PubMedQA's ori_pqal.json")
    parser.add_argument("--rows", type=int, default=100, help="take the first so many; default: 100")
    parser.add_argument("--models", nargs="+", default=["bundled:smollm2-135m"])
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    arguments = parser.parse_args()
    rows = list(json.loads(arguments.data.read_text(encoding="utf-8")).values())[: arguments.rows]
    lines, is_wrong = [], False
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        for task in compared(rows):
            file.write_text("".join(json.dumps(row) + "\n" for row in task.rows), encoding="utf-8")
            for name in arguments.models:
                for form in ("chat template", "plain text"):
                    model = copy_of(name, Path(scratch) / "model", plain=form == "plain text")
                    ours = score_here(model, file, task.ours)
                    theirs = score_there(model, file, task.theirs, form == "chat template")
                    difference = ours[2] - theirs[2]
                    furthest, apart = float(np.abs(difference).max()), float(np.ptp(difference, axis=1).max())
                    is_wrong |= ours[:2] != theirs[:2] or apart > NEAR
                    pairs = [f"{own:.4f} and {other:.4f}" for own, other in zip(ours[:2], theirs[:2], strict=True)]
                    lines.append(
                        [name, f"{task.name}, {len(task.rows)} rows", form, *pairs, f"{furthest:.1e}", f"{apart:.1e}"]
                    )
    heads = [
        "model",
        "task",
        "rows as",
        "acc, here and lm-eval",
        "acc_norm",
        "log-likelihoods, nats",
        "between options",
    ]
    text = f"{head_lines()}\nfloat32.\n\n{table(heads, lines)}\n"
    print(text)
    if arguments.save:
        save("lm-eval-scores", text)
    return int(is_wrong)


def copy_of(name: str, directory: Path, plain: bool) -> Path:
    """Write a model in float32 with its tokenizer, whose chat template may be replaced by plain text."""
    loaded = load(ModelConfig(name_or_path=name, dtype="float32"))
    loaded.model.save_pretrained(directory)
    if plain:
        loaded.tokenizer.chat_template = PLAIN
    loaded.tokenizer.save_pretrained(directory)
    return directory


def score_here(model: Path, file: Path, task: Row) -> tuple[float, float, np.ndarray]:
    """Return accuracy, accuracy per character and the log-likelihoods [rows, options]."""
    opened = open_model(str(model))
    rows = rows_for(opened, str(model), Source(str(file), task=task), "validation")
    outputs = compute_outputs(opened, rows, Asked(batch_size=4), None, 1)
    metrics = Scorer(rows.rows, ()).metrics(outputs)
    assert outputs.log_likelihoods is not None
    scores = metrics["accuracy"].value, metrics["accuracy_per_character"].value
    return (*scores, np.array(outputs.log_likelihoods))


def score_there(model: Path, file: Path, of_task: Row, with_chat_template: bool) -> tuple[float, float, np.ndarray]:
    """Return acc, acc_norm and the log-likelihoods [rows, options] of lm-eval."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    task: Row = {
        "task": "here", "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test", "training_split": None,
        "validation_split": None, "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    } | of_task  # fmt: skip
    found = simple_evaluate(
        HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4), tasks=[task],
        apply_chat_template=with_chat_template, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    (scores,) = found["results"].values()
    (samples,) = found["samples"].values()
    ordered: Sequence[Any] = sorted(samples, key=lambda sample: sample["doc_id"])
    likelihoods = [[float(one[0]) for one in sample["filtered_resps"]] for sample in ordered]
    return float(scores["acc,none"]), float(scores["acc_norm,none"]), np.array(likelihoods)


class _WithoutFunctions(yaml.SafeLoader):
    """Reads lm-eval's task files, whose ``!function`` tags are not needed here."""


_WithoutFunctions.add_multi_constructor("!function", lambda loader, suffix, node: None)


if __name__ == "__main__":
    sys.exit(main())
