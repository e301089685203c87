"""Metrics at each validation: equal to those of evaluate.py, at no frozen block, and what checkpoints are chosen by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, ROOT, make_tiny_model, metrics, run_ranks, tiny_flags, train
from test_evaluation import TASK, choice_rows

import toolkit
from toolkit.checkpoint.choice import choose_checkpoint
from toolkit.checkpoint.validation_score import ValidationScore
from toolkit.runtime.errors import CheckpointError, ConfigError

NAMES = ("accuracy", "macro_f1", "log_loss", "recall/maybe")


def flags_of(folder: Path, name: str, *more: Any) -> list[str]:
    """A run on 40 questions with labels, of which 20 are validation rows."""
    if not (folder / "model").exists():
        make_tiny_model(folder / "model")
        choice_rows(folder / "rows.jsonl", 40)
    return tiny_flags(
        folder / "model", folder / name, "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--data.validation", 0.5, "--train.learning_rate", 1e-2, "--output.evaluate_metrics", json.dumps(NAMES), *more,
    )  # fmt: skip


def scores_of(run: Path, **options: Any) -> dict[str, Any]:
    return {name: score.value for name, score in toolkit.evaluate(run, **options).models[0].scores.items()}


def validated_steps(run: Path) -> list[int]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["step"] for row in rows if "eval_loss" in row]


def test_they_are_those_of_evaluate_at_every_validation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*flags_of(tmp_path, "run", "--train.epochs", 2, "--output.keep", 2)) == 0
    steps = validated_steps(run)
    assert len(steps) == 2
    for place, step in enumerate(steps):
        scores = scores_of(run, step=step)
        for name in NAMES:
            assert metrics(run, f"eval_{name}")[place] == pytest.approx(scores[name], abs=1e-5), name
    assert metrics(run, "eval_log_loss")[0] != metrics(run, "eval_log_loss")[1]


def test_no_frozen_block_runs_for_them_once_the_cache_is_filled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ["--prefix.cache", "on", "--prefix.cache_dir", tmp_path / "cache"]
    assert train(*flags_of(tmp_path, "first", "--train.epochs", 3, *cache)) == 0
    assert len(metrics(tmp_path / "first", "eval_accuracy")) == 3
    assert re.findall(r"(\d+) missed, (\d+) computed", caplog.text) == [("0", "100")]  # 40 rows, 60 options
    assert train(*flags_of(tmp_path, "second", "--train.epochs", 1, *cache)) == 0
    assert "all samples are in" in caplog.text
    assert re.findall(r"(\d+) missed, (\d+) computed", caplog.text)[1:] == [("0", "0")]


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_the_best_checkpoint_is_best_by_the_metric_that_is_named(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted curve, of which the loss would have chosen the second."""
    planted = {"accuracy": [0.5, 0.6, 0.9, 0.7], "log_loss": [0.9, 0.8, 0.2, 0.5]}[metric]
    values = iter(planted)
    monkeypatch.setattr(
        "toolkit.training.between_steps.compute_metrics", lambda context, state, answers: {metric: next(values)}
    )
    run = tmp_path / "run"
    assert train(*flags_of(tmp_path, "run", "--train.epochs", 4, "--train.metric_for_best_model", metric)) == 0
    steps = validated_steps(run)
    best = choose_checkpoint(run, "best")
    assert best.step == steps[2]
    assert f"{metric} {planted[2]:.4f}" in best.text
    assert f"best is step {steps[2]} ({metric} {planted[2]:.4f}): take it" in choose_checkpoint(run).advice("take it")
    assert (run / "checkpoints" / "best").read_text() == best.checkpoint.name
    toolkit.export(run, tmp_path / "export", step="best")
    assert f"{metric} {planted[2]:.4f}" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")


def test_early_stopping_watches_the_metric_and_resumes_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plant(values: list[float]) -> None:
        left = iter(values)
        monkeypatch.setattr(
            "toolkit.training.between_steps.compute_metrics", lambda context, state, answers: {"accuracy": next(left)}
        )

    watch = ["--train.metric_for_best_model", "accuracy", "--train.early_stopping_patience", 2]
    plant([0.5, 0.7, 0.7, 0.6, 0.9])
    assert train(*flags_of(tmp_path, "run", "--train.epochs", 5, *watch)) == 0
    assert metrics(tmp_path / "run", "eval_accuracy") == [0.5, 0.7, 0.7, 0.6]
    assert choose_checkpoint(tmp_path / "run", "best").score.value == 0.7  # type: ignore[union-attr]
    plant([])  # a finished run computes nothing
    assert train(*flags_of(tmp_path, "run", "--train.epochs", 5, *watch)) == 0


def test_metrics_of_answers_are_of_the_sample_answers(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    given = tiny_flags(
        tmp_path / "model", tmp_path / "run", "--data.path", ENGLISH, "--data.task", "long_answer", "--data.validation",
        0.2, "--output.sample_answers", 3, "--output.sample_tokens", 12, "--output.evaluate_metrics",
        "[chrf++, rouge_l]", "--train.epochs", 1,
    )  # fmt: skip
    assert train(*given) == 0
    scores = scores_of(tmp_path / "run", answers=3, max_new_tokens=12)
    for name in ("chrf++", "rouge_l"):
        assert metrics(tmp_path / "run", f"eval_{name}") == [pytest.approx(scores[name], abs=1e-5)]


@pytest.mark.parametrize(
    "more",
    [
        ("--train.micro_batch_size", 3, "--data.packing", "on", "--model.dtype", "bfloat16"),
        ("--mask.schedule", '[{"train": ["blocks:5"], "until_epoch": 1}]', "--prefix.cache", "on"),
        ("--prefix.placement", "disk", "--prefix.cache", "off", "--mask.train", "[last:2]", "--mask.tied", "untie"),
        ("--prefix.precision", "int8", "--mask.train", '[{"lora": {"select": ["last:2"], "rank": 2}}]'),
        ("--mask.train", '[{"rows": {"select": ["head"], "ids": [3, 8]}}, "last:1"]', "--optim.name", "adamw_8bit"),
        ("--mask.train", "[all]", "--mask.tied", "both", "--output.async_save", "true"),
    ],
)
def test_they_are_computed_beside_other_options(more: tuple[Any, ...], tmp_path: Path) -> None:
    answers = ["--output.sample_answers", 3, "--output.sample_tokens", 3, "--train.metric_for_best_model", "log_loss"]
    names = ["--output.evaluate_metrics", "[log_loss, generated/valid, accuracy_per_token]"]
    given = flags_of(
        tmp_path, "run", *answers, *names, "--train.epochs", 2, "--prefix.cache_dir", tmp_path / "c", *more
    )
    assert train(*given) == 0
    run = tmp_path / "run"
    scores = scores_of(run, answers=3, max_new_tokens=3)
    close = {"rel": 0.05, "abs": 0.05} if "int8" in more or "bfloat16" in more else {"abs": 1e-4}
    assert metrics(run, "eval_log_loss")[-1] == pytest.approx(scores["log_loss"], **close)
    assert choose_checkpoint(run, "best").score.value == min(metrics(run, "eval_log_loss"))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--output.evaluate_metrics", "[accuracyy]"), "asks for accuracyy; these rows have accuracy, macro_f1"),
        (("--output.evaluate_metrics", "[loss]"), "asks for loss; these rows have"),
        (("--output.evaluate_metrics", "[generated/accuracy]"), "answers need output.sample_answers"),
        (("--train.metric_for_best_model", "f1"), "train.metric_for_best_model is f1, which is not computed"),
        (("--data.validation", "none"), "data.validation is none"),
        (("--data.validation", "no_maybe.jsonl", "--train.metric_for_best_model", "recall/maybe"), "has no value on"),
        (("--data.path", "MIXTURE", "--data.task", "auto"), "read by several tasks, which have the loss alone"),
    ],
)
def test_what_cannot_be_computed_is_refused(more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    rows = [{"question": f"Is {n} bad?", "contexts": [], "decision": "yes", "patient": n} for n in range(4)]
    (tmp_path / "no_maybe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mixture = [{"path": str(tmp_path / "rows.jsonl"), "task": TASK}, {"path": str(ENGLISH), "task": "long_answer"}]
    files = {"no_maybe.jsonl": str(tmp_path / "no_maybe.jsonl"), "MIXTURE": json.dumps(mixture)}
    more = tuple(files.get(word, word) for word in more)
    if "MIXTURE" in files and json.dumps(mixture) in more:
        more = (*more, "--output.sample_answers", "2")
    with pytest.raises(ConfigError) as error:
        train(*flags_of(tmp_path, "run", *more))
    assert message in str(error.value)


def test_a_score_is_read_as_it_was_written() -> None:
    for score in (ValidationScore(0.5), ValidationScore(0.5, "accuracy", 0.25, True), ValidationScore(1.0, "ece", 0.0)):
        assert ValidationScore.of_json(json.loads(json.dumps(score.as_json()))) == score
    assert ValidationScore(0.5, "accuracy", 0.25, True).rank == -0.25
    for damaged in ({"loss": "x"}, {"loss": 1.0, "metric_for_best_model": {"metric": 3, "value": 1.0}}):
        with pytest.raises((ValueError, KeyError)):
            ValidationScore.of_json(damaged)


@pytest.mark.distributed
@pytest.mark.parametrize("cache", ["on", "off"])
def test_two_ranks_under_zero3_have_the_metrics_of_one_process(cache: str, tmp_path: Path) -> None:
    names = [*NAMES, "generated/valid", "generated/accuracy"]
    more = [
        "--output.evaluate_metrics", json.dumps(names), "--output.sample_answers", 5, "--output.sample_tokens", 4,
        "--train.epochs", 2, "--train.max_steps", 15, "--prefix.cache", cache, "--prefix.cache_dir", tmp_path / "cache",
        "--train.metric_for_best_model", "accuracy",
    ]  # fmt: skip
    alone = flags_of(tmp_path, "alone", *more, "--train.gradient_accumulation_steps", 2)
    assert train(*alone) == 0
    two = flags_of(tmp_path, "two", *more)
    ds = ROOT / "ds_configs" / "zero3.json"
    done = run_ranks("launch/train.py", *two, "--ds", ds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for name in ["loss", *names]:
        expected = metrics(tmp_path / "alone", f"eval_{name}")
        assert len(expected) == 2
        assert metrics(tmp_path / "two", f"eval_{name}") == pytest.approx(expected, abs=1e-4), name
    best = choose_checkpoint(tmp_path / "two", "best")
    assert best.step == choose_checkpoint(tmp_path / "alone", "best").step
    assert best.score is not None
    assert (best.score.metric, best.score.higher_is_better) == ("accuracy", True)


def test_settings_that_the_metric_depends_on_are_kept_on_resume(tmp_path: Path) -> None:
    answers = [
        "--output.evaluate_metrics", "[generated/valid]", "--train.metric_for_best_model", "generated/valid",
        "--output.sample_tokens", 3,
    ]  # fmt: skip
    assert train(*flags_of(tmp_path, "run", *answers, "--train.max_steps", 4, "--output.sample_answers", 3)) == 0
    other = flags_of(tmp_path, "run", *answers, "--train.max_steps", 8, "--output.sample_answers", 2)
    with pytest.raises(CheckpointError, match=r"output\.sample_answers was 3, is now 2"):
        train(*other)
