"""A run on self-reports, from its recipe to decisions; and identifiers in its rows, of which nothing is left."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, make_tiny_model, make_tokenizer, run_here

from toolkit.clinical.red_flags import read_red_flags
from toolkit.clinical.reporting import clock_source, reporting_clock, site_questions
from toolkit.config.recipe import read_saved
from toolkit.data.dataset import load_dataset

REPORTS = ROOT / "examples" / "data" / "clinical" / "triage_en.jsonl"
PLANTED = {
    "NOTE": " Call me on 010-4821-7736 or write to min.seo@clinic.example.",
    "BASELINE": "chart SNU-4821, born 900417-2184736",
    "EARLIER": ["Sent from +82-10-4821-7736 yesterday"],
    "REASON": "She wrote “chest” from min.seo@clinic.example.",
    "contact": {"phones": ["010.4821.7736"], "card": "4000-0000-0000-0002"},
}
SECRETS = (
    "4821-7736", "4821.7736", "SNU-4821", "min.seo", "clinic.example", "900417-2184736", "4000-0000-0000-0002",
)  # fmt: skip
"""Long enough to be in no random state by chance."""
PATTERN = "SNU-[0-9]{4}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model trained on the English reports, some with identifiers, evaluated, asked and reported."""
    folder = tmp_path_factory.mktemp("triage")
    rows = [json.loads(line) for line in REPORTS.read_text(encoding="utf-8").splitlines()]
    for at, row in enumerate(rows):
        row["id"] = f"min.seo+{at}@clinic.example"
        if at % 3 != 1:
            row |= PLANTED | {"NOTE": row["NOTE"] + PLANTED["NOTE"]}
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    make_tiny_model(folder / "model")
    said, logged = list[str](), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("frostline").addHandler(handler)
    run = folder / "runs" / "triage"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_CACHE", str(folder / "cache"))

        def command(verb: str, *flags: object) -> None:
            outcome = run_here(verb, *flags)
            assert outcome.returncode == 0, outcome.stderr
            said.extend([outcome.stdout, outcome.stderr])

        command(
            "train", "--config", ROOT / "recipes" / "triage.yaml", "--model.name_or_path", folder / "model",
            "--model.dtype", "float32", "--data.path", source, "--data.task", "recipes/tasks/triage_en.yaml",
            "--mask.train", "last:2", "--data.on_identifier", "mask", "--data.identifier_patterns", f'["{PATTERN}"]',
            "--train.epochs", 1, "--output.dir", run, "--output.sample_tokens", 8,
            "--data.group_by", "USUBJID", "--prefix.cache", "on",
        )  # fmt: skip
        command(
            "evaluate", "base", run, "--save", "--answers", 2, "--max-new-tokens", 8, "--batch-size", 4, "--output",
            folder / "out" / "scores.json", "--predictions", folder / "out" / "predictions",
        )  # fmt: skip
        command("report", run)
        flags = ("--input", source, "--max-new-tokens", 8)
        command("triage", run, *flags, "--output", folder / "out" / "sure.jsonl", "--confidence", 0.01)
        command("triage", run, *flags, "--output", folder / "out" / "unsure.jsonl", "--confidence", 1.0)
    logging.getLogger("frostline").removeHandler(handler)
    return {"folder": folder, "run": run, "source": source, "said": "\n".join(said + logged)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_masked_identifier_is_in_any_file_log_or_token(done: dict[str, Any]) -> None:
    files = [path for path in done["folder"].rglob("*") if path.is_file() and path != done["source"]]
    kinds = {path.relative_to(done["folder"]).parts[0] for path in files}
    assert {"runs", "cache", "out"} <= kinds
    names = {path.name for path in files}
    assert {"report.html", "evaluation.json", "metrics.jsonl", "scores.json", "sure.jsonl"} <= names
    assert any("tfevents" in name for name in names)
    for path in files:
        content = path.read_bytes()
        if path.parent == done["folder"] / "model":
            continue  # made before, of other texts
        for secret in SECRETS:
            assert secret.encode() not in content, f"{secret} in {path}"
    shown = done["said"].replace(str(done["folder"]), "")
    assert not [secret for secret in SECRETS if secret in shown]
    config = read_saved(done["run"] / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FROSTLINE_CACHE", str(done["folder"] / "cache"))
        dataset = load_dataset(config.data, make_tokenizer(), config.train.seed)
    texts = [
        make_tokenizer().decode(list(one.token_ids)) for part in (dataset.train, dataset.validation) for one in part
    ]
    assert any("[PHONE]" in text and "[EMAIL]" in text and "[IDENTIFIER]" in text for text in texts)
    assert any("[RESIDENT_NUMBER]" in text for text in texts)
    assert not [secret for secret in SECRETS for text in texts if secret in text]


def test_the_table_has_the_plain_baseline_the_worst_cases_and_abstention(done: dict[str, Any]) -> None:
    scores = json.loads((done["folder"] / "out" / "scores.json").read_text(encoding="utf-8"))
    assert scores["primary"] == "quadratic_kappa"
    by_name = {model["name"]: model["scores"] for model in scores["models"]}
    plain = by_name["TF-IDF + logistic regression of the training rows"]
    wanted = {"quadratic_kappa", "under_rate", "over_rate", "within_one", "ece", "aurc", "accuracy_at_80"}
    assert wanted | {"recall/emergency"} <= set(plain) & set(by_name[str(done["run"])])
    curve = scores["abstention"][str(done["run"])]
    assert curve[0]["coverage"] == 1.0
    assert curve[0]["risk"] == pytest.approx(1 - by_name[str(done["run"])]["accuracy"]["value"])
    assert [one["coverage"] for one in curve] == sorted((one["coverage"] for one in curve), reverse=True)
    for case in scores["worst"][str(done["run"])]:
        labels = ["self-care", "contact today", "emergency"]
        below = labels.index(case["given"]) < labels.index(case["expected"])
        assert below == (case["kind"] == "under")
        assert f"estimate of {done['run']}: {case['row']}, {case['expected']} given as {case['given']}" in done["said"]


def test_red_flags_override_the_model_and_an_unsure_one_abstains(done: dict[str, Any]) -> None:
    rules, rows = read_red_flags(), read(done["source"])
    sure, unsure = (read(done["folder"] / "out" / name) for name in ("sure.jsonl", "unsure.jsonl"))
    assert len(sure) == len(unsure) == len(rows)
    for row, one, other in zip(rows, sure, unsure, strict=True):
        met, _ = rules.find(row["NOTE"], "en")
        assert [flag["rule"] for flag in one["RED_FLAGS"]] == [flag.rule for flag in met]
        assert one["NOTICE"] == "For research; not for care."
        assert sum(one["PROBABILITIES"].values()) == pytest.approx(1, abs=1e-3)
        assert max(one["PROBABILITIES"], key=one["PROBABILITIES"].get) == one["MODEL_CLASS"]
        assert "TR01" not in {violation["rule"] for violation in one["VIOLATIONS"]}  # the answer begins with a class
        assert one["CLASS"] == row["CLASS"]  # what the row has stays
        if met and met[0].at_least == 2:
            assert (one["DECISION"], other["DECISION"], other["DECIDED_BY"]) == ("emergency", "emergency", "rule")
            assert all(words in row["NOTE"] for words in one["RED_FLAGS"][0]["words"])
        else:
            assert (other["DECISION"], other["DECIDED_BY"]) == ("abstain", "nobody")
            assert one["DECIDED_BY"] in ("model", "rule")


def test_a_confidence_is_taken_from_the_validation_rows(done: dict[str, Any], tmp_path: Path) -> None:
    run, source = done["run"], done["source"]
    kept = (run / "evaluation.json").read_text(encoding="utf-8")
    (run / "evaluation.json").unlink()
    refused = run_here("triage", run, "--input", source, "--output", tmp_path / "out.jsonl")
    assert refused.returncode == 2
    assert re.search(r"holds no abstention of .*; name --confidence, or run evaluate.py", refused.stderr)
    (run / "evaluation.json").write_text(kept.replace("(data.validation", "(data.test"), encoding="utf-8")
    refused = run_here("triage", run, "--input", source, "--output", tmp_path / "out.jsonl")
    assert "a confidence is chosen on validation rows" in refused.stderr
    (run / "evaluation.json").write_text(kept, encoding="utf-8")
    again = run_here(
        "triage", run, "--input", done["folder"] / "out" / "sure.jsonl", "--output", tmp_path / "out.jsonl",
        "--confidence", 0.5,
    )  # fmt: skip
    assert "row 1 has a column DECISION, where its decision would go" in again.stderr


def test_notes_of_adverse_events_get_fields_a_clock_and_questions_and_each_answer_is_json(tmp_path: Path) -> None:
    """From the recipe: train, evaluate, decide, verify."""
    notes = ROOT / "examples" / "data" / "clinical" / "ae_triage_en.jsonl"
    short = sorted(read(notes), key=lambda row: len(row["NOTE"]))[:8]
    short = [
        {**row, "REFERENCE": "expected reactions: nausea, rash"} for row in short
    ]  # the tiny model has few positions
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short), encoding="utf-8")
    make_tiny_model(tmp_path / "model")
    run = tmp_path / "run"
    commands: list[tuple[object, ...]] = [
        (
            "train", "--config", ROOT / "recipes" / "ae_triage.yaml", "--model.name_or_path", tmp_path / "model",
            "--model.dtype", "float32", "--data.path", tmp_path / "rows.jsonl", "--mask.train", "last:1",
            "--train.epochs", 1, "--output.dir", run, "--output.report", "[]", "--output.sample_answers", 0,
            "--data.stratify_by", "none", "--prefix.cache", "off",
        ),
        ("evaluate", run, "--answers", 1, "--max-new-tokens", 130, "--constrain", "--output", tmp_path / "scores.json"),
        ("triage", run, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl",
         "--max-new-tokens", 150),
    ]  # fmt: skip
    for verb, *flags in commands:
        outcome = run_here(str(verb), *flags)
        assert outcome.returncode == 0, outcome.stderr
    names = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["models"][0]["scores"]
    assert {"fields", "field/serious", "field/causality", "field/expectedness", "constrained/valid"} <= set(names)
    out = read(tmp_path / "out.jsonl")
    assert [row["NOTE"] for row in out] == [row["NOTE"] for row in short]
    for row in out:
        assert row["FIELDS"] == json.loads(row["ANSWER"])
        assert row["CLOCK"] == {
            **reporting_clock(row["FIELDS"], row, row["LANGUAGE"]).as_dict(),
            "source": clock_source(),
        }
        asked = [question.id for question in site_questions(row["FIELDS"], row, "en")]
        assert [question["id"] for question in row["QUESTIONS"]] == asked
    outcome = run_here("verify", tmp_path / "out.jsonl", "--check", "ae_triage")
    assert outcome.returncode == (1 if any(row["VIOLATIONS"] for row in out) else 0)
