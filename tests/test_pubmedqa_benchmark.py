"""The benchmark of PubMedQA, on rows in its published form and a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from adapter_runs import save_of_zoo
from helpers import run_script
from pubmedqa_files import write_pubmedqa


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions to train on and 60 to test, as ``ori_pqal.json`` has them."""
    folder = tmp_path_factory.mktemp("pubmedqa")
    write_pubmedqa(folder)
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
