"""ae_coding from its recipe: train, evaluate, generate with checks and tries, verify."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, run_here

import toolkit
from toolkit.clinical.verification import Violation
from toolkit.data.questions import Question
from toolkit.inference.answering import Answerer
from toolkit.inference.open_model import open_model
from toolkit.inference.verified import checked_batches
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import load_task

RECIPE = ROOT / "recipes" / "ae_coding.yaml"


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short English notes: the tiny model has 512 positions, and a token a byte of Korean."""
    rows = (ROOT / "examples/data/clinical/ae_coding.jsonl").read_text(encoding="utf-8").splitlines()
    short = sorted((row for row in rows if json.loads(row)["LANGUAGE"] == "en"), key=len)[:5]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(short) + "\n", encoding="utf-8")
    return path


def test_it_trains_evaluates_generates_and_verifies(tiny_model: Path, english: Path, tmp_path: Path) -> None:
    run, answers = tmp_path / "run", tmp_path / "answers.jsonl"
    toolkit.train(
        RECIPE,
        {
            "model.name_or_path": str(tiny_model), "model.dtype": "float32", "data.path": str(english),
            "data.max_length": 512, "data.retrieval": {"dictionary": "toy", "passages": 2}, "mask.train": ["last:1"],
            "train.max_steps": 1, "output.dir": str(run), "output.sample_answers": 0, "output.report": [],
        },
    )  # fmt: skip
    comparison = toolkit.evaluate(run, english, answers=4, constrain=True, max_new_tokens=12)
    assert comparison.primary == "events/f1"
    names = {model.name: model.scores for model in comparison.models}
    assert {"no event", "candidate terms that stand in the note"} <= set(names)
    assert {"events/precision", "field/AESER", "verified", "constrained/valid"} <= set(names[str(run)])
    assert comparison.retrieval is not None
    assert "recall@5" in comparison.retrieval

    flags = ("--verify", "--verify-tries", "2", "--max-new-tokens", "12", "--limit", "3")
    done = run_here("generate", run, "--input", english, "--output", answers, *flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["VERIFIED"] is (not row["VIOLATIONS"])
        assert row["TRIES"] in (1, 2)
    assert run_here("verify", answers, "--dictionary", "toy").returncode == int(not all(r["VERIFIED"] for r in rows))


def test_a_bad_answer_is_asked_for_again_by_other_draws_and_then_flagged(tiny_model: Path) -> None:
    opened = open_model(str(tiny_model))
    answerer = Answerer(opened.loaded, 256, 6, 2)
    task = load_task({"name": "ask", "columns": {"q": "q"}, "prompt": "{{ q }}", "target": "x"})
    rows: list[dict[str, Any]] = [{"q": f"question {number}"} for number in range(3)]
    questions = [Question(number, task.read(row, with_answer=False), row) for number, row in enumerate(rows)]
    seen: dict[str, list[str]] = {}

    def check(answer: str, row: Mapping[str, Any]) -> list[Violation]:
        seen.setdefault(row["q"], []).append(answer)
        is_bad = row["q"] == "question 1" or (row["q"] == "question 2" and len(seen[row["q"]]) < 2)
        return [Violation(None, "f", "R", answer, "expected better")] * is_bad

    found = {row: one for batch in checked_batches(answerer, questions, check, 3) for row, one in batch.items()}
    assert {row: (one.tries, not one.violations) for row, one in found.items()} == {
        0: (1, True), 1: (3, False), 2: (2, True),
    }  # fmt: skip
    assert [len(seen[row["q"]]) for row in rows] == [1, 3, 2]
    assert len(set(seen["question 1"])) == 3  # other draws, not the same answer again
    assert found[1].answer == seen["question 1"][0]
    assert found[2].answer == seen["question 2"][1]
    assert found[1].columns()["VERIFIED"] is False
    with pytest.raises(DataError, match="has a column TRIES, where --verify writes"):
        list(checked_batches(answerer, [questions[0]._replace(values={"TRIES": 1})], check, 3))


def test_verify_goes_with_input_and_a_task_that_names_its_check(tiny_model: Path, tmp_path: Path) -> None:
    assert run_here("generate", tiny_model, "--question", "?", "--verify").returncode == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"QUESTION": "?"}\n', encoding="utf-8")
    done = run_here("generate", tiny_model, "--input", rows, "--verify")
    assert done.returncode == 2
    assert "--verify needs a task that names its check" in done.stderr
