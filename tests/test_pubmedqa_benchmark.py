"""The benchmark of PubMedQA, on rows in its published form and a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from adapter_runs import save_of_zoo
from helpers import ENGLISH, run_script

LABELS = ("yes", "no", "maybe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions to train on and 60 to test, as ``ori_pqal.json`` has them."""
    folder = tmp_path_factory.mktemp("pubmedqa")
    texts = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    rows = {}
    for number in range(120):
        text = texts[number % len(texts)]
        rows[str(1000 + number)] = {
            "QUESTION": f"{number}: {text['QUESTION']}", "CONTEXTS": [context[:200] for context in text["CONTEXTS"]],
            "LABELS": ["METHODS"], "LONG_ANSWER": text["LONG_ANSWER"], "final_decision": LABELS[number % 3],
        }  # fmt: skip
    (folder / "ori_pqal.json").write_text(json.dumps(rows))
    truth = {key: row["final_decision"] for key, row in list(rows.items())[::2]}
    (folder / "test_ground_truth.json").write_text(json.dumps(truth))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("task", "generated"), [("labels", "generated/accuracy"), ("long_answer", "chrf")])
def test_the_test_questions_alone_are_scored_and_a_second_start_trains_nothing(
    data: Path, tmp_path: Path, task: str, generated: str
) -> None:
    model = save_of_zoo("llama", tmp_path / "model", num_hidden_layers=17)
    flags = ("--data", data, "--model", model, "--task", task, "--answers", 6, "--max-new-tokens", 4, "--rows", 60,
             "--scratch", tmp_path)  # fmt: skip
    done = run_script("benchmarks/pubmedqa.py", *flags)
    assert done.returncode in (0, 1), done.stderr
    assert re.search(r"^(long_answer|choice): 60 rows of ", done.stdout, re.MULTILINE)
    assert generated in done.stdout
    perplexity = done.stdout.split("\nperplexity")[1].splitlines()[2]
    assert perplexity.endswith(" better") == (done.returncode == 0)
    metrics = (tmp_path / task / "metrics.jsonl").read_bytes()
    again = run_script("benchmarks/pubmedqa.py", *flags)
    assert again.returncode == done.returncode
    assert (tmp_path / task / "metrics.jsonl").read_bytes() == metrics
    assert again.stdout.split("```")[1] == done.stdout.split("```")[1]
    assert ("By PubMedQA's official rule" in done.stdout) == (task == "labels")
    if task == "labels":
        assert "- always yes: 33.3%, 0.167" in done.stdout
        assert len(re.findall(r"^- .*: \d+\.\d%, 0\.\d{3}$", done.stdout, re.MULTILINE)) == 5
