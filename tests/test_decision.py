"""The task decision: PubMedQA in its two settings, its leaks, its official score, and the sample rows."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, KOREAN, ROOT, metrics, run_here

import toolkit
from toolkit.metrics.pubmedqa import LABELS, REASONING_FREE, REASONING_REQUIRED, scores_of_task
from toolkit.runtime.errors import ConfigError
from toolkit.tasks.choose import load_task, recognise_task

SAMPLES = ROOT / "examples" / "data" / "clinical"
PUBLISHED: dict[str, Any] = {
    "QUESTION": "Do statins help?", "CONTEXTS": ["They were given.", "Few fell ill."], "LABELS": ["METHODS", "RESULTS"],
    "MESHES": ["Humans"], "YEAR": "2011", "reasoning_required_pred": "maybe", "reasoning_free_pred": "maybe",
    "final_decision": "yes", "LONG_ANSWER": "They seem to help.",
}  # fmt: skip
ON_THE_HUB = {
    "pubid": 1, "question": PUBLISHED["QUESTION"], "long_answer": PUBLISHED["LONG_ANSWER"], "final_decision": "yes",
    "context": {
        "contexts": PUBLISHED["CONTEXTS"], "labels": ["METHODS", "RESULTS"], "meshes": ["Humans"],
        "reasoning_required_pred": ["maybe"], "reasoning_free_pred": ["maybe"],
    },
}  # fmt: skip
IN_CAPITALS = {key.upper().replace("_", " "): value for key, value in PUBLISHED.items()}


@pytest.mark.parametrize("row", [PUBLISHED, ON_THE_HUB, IN_CAPITALS])
def test_the_published_forms_are_read_alike_in_both_settings(row: dict[str, Any]) -> None:
    required = load_task("decision").read(row)
    asked = required.turns[0].content
    assert asked == "They were given.\n\nFew fell ill.\n\nDo statins help?\n\nAnswer yes, no or maybe."
    assert (required.answer, required.options) == ("yes", LABELS)
    free = load_task("decision_reasoning_free").read(row).turns[0].content
    assert free == asked.replace("Do statins", "They seem to help.\n\nDo statins")


@pytest.mark.parametrize("path", ["LONG_ANSWER", "long answer", "context.reasoning_free_pred", "final_decision"])
def test_what_gives_the_decision_away_is_refused_by_name(path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"columns.contexts reads {path}, which gives the outcome away")):
        load_task({"name": "decision", "columns": {"contexts": path}})
    if "long" not in path.casefold():
        with pytest.raises(ConfigError, match=re.escape(f"columns.conclusion reads {path}, which gives")):
            load_task({"name": "decision_reasoning_free", "columns": {"conclusion": path}})


def test_rows_are_recognised_as_before() -> None:
    for file in (KOREAN, ENGLISH, SAMPLES / "decision_ko.jsonl"):
        row = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
        assert recognise_task(list(row)).name == "long_answer"
    assert recognise_task(list(PUBLISHED)).name == recognise_task(list(ON_THE_HUB)).name == "long_answer"


def test_the_official_score_stands_beside_people_in_the_settings_own_row() -> None:
    truth = {"1": "yes", "2": "no", "3": "maybe"}
    given = {"m": {"1": "yes", "2": "yes", "3": "maybe"}}
    required, free = (scores_of_task(name, given, truth) for name in ("decision", "decision_reasoning_free"))
    assert required["m"] == free["m"]
    assert required["m"].accuracy == pytest.approx(2 / 3)
    assert list(required)[:2] == ["m", "always yes"]
    assert (list(required.values())[-1], list(free.values())[-1]) == (REASONING_REQUIRED, REASONING_FREE)
    assert scores_of_task("choice", given, truth) == scores_of_task("decision", {}, {}) == {}
    assert scores_of_task("decision", {"m": {"1": "A"}}, {"1": "A"}) == {}, "labels of one's own"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def test_sample_rows_are_valid_and_no_two_are_alike() -> None:
    korean, english = rows_of("decision_ko.jsonl"), rows_of("decision_en.jsonl")
    assert (len(korean), len(english)) == (60, 20)
    rows = [*korean, *english]
    assert len({row["id"] for row in rows}) == 80
    for part in (korean, english):
        assert {row["final_decision"] for row in part} == set(LABELS)
    words = [set(re.findall(r"\w+", " ".join([row["QUESTION"], *row["CONTEXTS"], row["LONG_ANSWER"]]))) for row in rows]
    assert max(len(one & two) / min(len(one), len(two)) for one, two in combinations(words, 2)) < 0.4
    others = [json.loads(line) for file in (KOREAN, ENGLISH) for line in file.read_text(encoding="utf-8").splitlines()]
    assert not {row["QUESTION"] for row in others} & {row["QUESTION"] for row in rows}


def test_the_recipe_trains_evaluates_predicts_and_answers(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = {
        "model.name_or_path": tiny_model, "model.dtype": "float32", "mask.train": ["last:2"],
        "data.path": SAMPLES / "decision_en.jsonl", "data.max_length": 448, "train.epochs": 1, "output.dir": run,
        "output.report": [], "output.sample_answers": 0,
    }  # fmt: skip
    toolkit.train(ROOT / "recipes" / "decision.yaml", given)
    assert len(metrics(run, "eval_macro_f1")) == 1
    scored = run_here("evaluate.py", "base", run, "--predictions", tmp_path / "given", "--save")
    assert scored.returncode == 0, scored.stderr
    assert "macro_f1 (declared by the task)" in scored.stdout
    assert "By PubMedQA's official rule, accuracy and macro-F1:" in scored.stdout
    assert "annotator, reasoning required (official test set): 78.0%, 0.722" in scored.stdout
    official = json.loads(scored.stdout.splitlines()[-1])["official"]
    files = list((tmp_path / "given").glob("*.json"))
    assert len(files) == 2
    right = {row["id"]: row["final_decision"] for row in rows_of("decision_en.jsonl")}
    for file in files:
        given_by_id = json.loads(file.read_text(encoding="utf-8"))
        assert len(given_by_id) == 4
        accuracy = sum(right[key] == value for key, value in given_by_id.items()) / 4
        name = "base" if file.stem == "base" else str(run)
        assert official[name]["accuracy"] == accuracy
    answers = toolkit.generate(run, rows_of("decision_en.jsonl")[:2], constrain=True)
    assert set(answers) <= set(LABELS)
