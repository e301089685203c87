"""Models are compared on the same rows: what is computed, what it costs, and what is claimed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import ENGLISH, make_tiny_model, make_tokenizer, metrics, run_here, tiny_flags, tiny_llama, train

import toolkit
from toolkit.commands.evaluate import save_predictions
from toolkit.evaluation.labels import Classes
from toolkit.evaluation.likelihood import OptionQuery, option_query
from toolkit.evaluation.outputs import with_shots
from toolkit.evaluation.scoring import label_of
from toolkit.evaluation.table import table
from toolkit.evaluation.trivial import trivial_answers
from toolkit.inference.open_model import open_model
from toolkit.runtime.distributed import require_one_process
from toolkit.runtime.errors import DataError, FrostlineError, UsageError
from toolkit.runtime.privacy import private_files
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix
from toolkit.tasks.choose import load_task
from toolkit.tasks.sample import ask

LABELS = ("yes", "no", "maybe")
TASK = {"name": "choice", "columns": {"answer": "decision"}, "output": {"labels": list(LABELS)}}


def choice_rows(path: Path, count: int = 60) -> Path:
    """Questions about numbers, of which the answer follows from the last digit; 6 yes, 3 no and 1 maybe of ten."""
    rows = [
        {
            "question": f"Is {number} good?", "contexts": [f"The value of case {number} was {number % 10}."],
            "decision": LABELS[0 if number % 10 < 6 else 1 if number % 10 < 9 else 2], "patient": number // 2,
        }
        for number in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions with labels, of which 20 are validation rows and 20 test rows."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_tiny_model(folder / "model")
    flags = tiny_flags(
        folder / "model", folder / "run", "--data.path", choice_rows(folder / "rows.jsonl"), "--data.task",
        json.dumps(TASK), "--data.validation", 0.34, "--data.test", 0.34, "--train.epochs", 2,
        "--prefix.cache_dir", folder / "cache", "--train.learning_rate", 1e-2,
    )  # fmt: skip
    assert train(*flags) == 0
    return folder


@pytest.fixture(scope="module")
def compared(folder: Path) -> toolkit.Comparison:
    return toolkit.evaluate(["base", folder / "run"], batch_size=4)


def scores_of(comparison: toolkit.Comparison, name: str) -> dict[str, Any]:
    return dict(next(model.scores for model in comparison.models if model.name == name))


def test_the_first_run_gives_the_rows_and_its_own_loss(folder: Path, compared: toolkit.Comparison) -> None:
    assert compared.loss == pytest.approx(metrics(folder / "run", "eval_loss")[-1], rel=1e-5)
    assert (compared.rows, compared.held_out, compared.against, compared.primary) == (20, True, "base", "accuracy")
    names = [model.name for model in compared.models]
    assert names[:3] == ["base", str(folder / "run"), "base, prior-corrected"]
    assert names[3:] == [
        "majority class of the training rows", "class prior of the training rows",
        "TF-IDF + logistic regression of the training rows",
    ]  # fmt: skip
    assert scores_of(compared, "base")["loss"].value > compared.loss


def test_options_are_scored_as_the_whole_model_scores_them(folder: Path, compared: toolkit.Comparison) -> None:
    opened = open_model(str(folder / "run"))
    model = opened.loaded.model.eval()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    task = load_task(TASK)
    right, losses = [], []
    whole = toolkit.evaluate(folder / "run", folder / "rows.jsonl", batch_size=7)
    for row in rows:
        sample = task.read(row)
        prompt, options = opened.encoder.encode_answers(sample, LABELS)
        likelihoods = []
        for ids in options:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
            likelihoods.append(float(logits[list(at), list(ids)].sum()))
        right.append(LABELS[int(np.argmax(likelihoods))] == row["decision"])
        losses.append(np.logaddexp.reduce(likelihoods) - likelihoods[LABELS.index(row["decision"])])
    scores = scores_of(whole, str(folder / "run"))
    assert scores["accuracy"].value == pytest.approx(np.mean(right))
    assert scores["log_loss"].value == pytest.approx(np.mean(losses), abs=1e-4)
    assert whole.held_out is False


def test_options_that_differ_in_their_last_token_take_one_sequence(folder: Path) -> None:
    encoder = open_model(str(folder / "model")).encoder
    task = load_task("choice")
    letters = task.read({"question": "Which?", "options": ["a b", "c", "d", "e"], "answer": 1})
    query = option_query(encoder, letters, "row 1")
    assert [len(example.spans) for example in query.examples] == [1]
    assert all(len(ids) == 1 for ids in query.options)


def test_letters_are_scored_in_the_pass_over_the_right_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question": f"Which is {at}?", "options": ["none", "some", "all"], "answer": "ABC"[at % 3]} for at in range(6)
    ]
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    passed = Counter[str]()
    head_input = Suffix._head_input

    def counted(self: Suffix, hidden: Any, batch: Any, *more: Any) -> Any:
        passed["rows"] += len(batch.examples)
        return head_input(self, hidden, batch, *more)

    monkeypatch.setattr(Suffix, "_head_input", counted)
    found = []
    for is_apart in (False, True):
        if is_apart:
            monkeypatch.setattr(OptionQuery, "is_scored_by", lambda *_: False)
        passed.clear()
        compared = toolkit.evaluate(folder / "model", path, task="choice", batch_size=4)
        found.append(
            (passed["rows"], {name: m.value for name, m in scores_of(compared, str(folder / "model")).items()})
        )
    (once, together), (twice, apart) = found
    assert twice - once == len(rows)
    for scores in (together, apart):  # of 1,250; float32's spacing at the loss, 5e-7, is 6e-4 of it
        scores["perplexity"] = math.log(scores["perplexity"])
        assert scores["perplexity"] == pytest.approx(scores["loss"], rel=1e-12)
    assert together == pytest.approx(apart, abs=1e-5, nan_ok=True)


def test_an_option_that_begins_another_is_told_by_its_end(folder: Path) -> None:
    encoder = open_model(str(folder / "model")).encoder
    _, (one, ten) = encoder.encode_answers(ask("Which?"), ["1", "10"])
    end = encoder.stop_ids()
    assert one[-1] in end or set(one) & set(end)
    assert set(ten) & set(end)
    plain = encoder.encode_answers(ask("Which?"), ["a", "b"])[1]
    assert not any(set(ids) & set(end) for ids in plain)


def test_a_prefix_is_computed_once_for_all_models_above_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = Counter[tuple[int, ...]]()
    forward = Prefix.forward

    def counted(self: Prefix, batch: Any) -> torch.Tensor:
        computed.update(example.token_ids for example in batch.examples)
        return forward(self, batch)

    monkeypatch.setattr(Prefix, "forward", counted)
    shifted = tmp_path / "rows.jsonl"
    shifted.write_text((folder / "rows.jsonl").read_text(encoding="utf-8").replace("good", "bad"), encoding="utf-8")
    first = toolkit.evaluate(["base", folder / "run"], shifted, batch_size=8)
    shortest = min(computed, key=len)
    assert {count for ids, count in computed.items() if ids != shortest} == {1}  # the shortest is also tried
    assert len(computed) == 4 * 60  # with its answer, and with three options of several tokens
    computed.clear()
    again = toolkit.evaluate(["base", folder / "run"], shifted, batch_size=8)
    assert not computed
    assert again == first


def test_the_cache_of_a_recipe_that_has_none_is_not_used(folder: Path, tmp_path: Path) -> None:
    flags = tiny_flags(
        folder / "model", tmp_path / "run", "--data.validation", 0.2, "--train.epochs", 1, "--prefix.cache", "off",
        "--prefix.cache_dir", tmp_path / "cache",
    )  # fmt: skip
    assert train(*flags) == 0
    toolkit.evaluate(["base", tmp_path / "run"])
    assert not (tmp_path / "cache").exists()


def test_a_strangers_run_names_no_directory_to_write_to_and_shares_no_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, home = Path(shutil.copytree(folder / "run", tmp_path / "run")), tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("FROSTLINE_CACHE", str(home / "cache"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["prefix"] |= {"cache_dir": str(home / ".ssh"), "share": "group"}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with private_files():
        toolkit.evaluate(["base", run])
    assert not list((home / ".ssh").iterdir())
    kept = [path for path in (home / "cache").rglob("*") if path.suffix == ".safetensors"]
    assert kept
    assert not [path for path in (home / "cache").rglob("*") if path.stat().st_mode & 0o077]


def test_a_loss_by_itself_has_an_interval_and_nothing_to_compare_with(folder: Path) -> None:
    alone = toolkit.evaluate(folder / "run", part="test")
    assert alone.against is None
    loss = scores_of(alone, str(folder / "run"))["loss"]
    assert loss.low < loss.value < loss.high
    assert (loss.difference, loss.verdict) == (None, None)
    assert alone.loss == loss.value


def test_nothing_is_claimed_of_few_rows_and_the_seed_decides_the_interval(folder: Path) -> None:
    few = toolkit.evaluate(["base", folder / "run"])
    assert {score.verdict for score in scores_of(few, str(folder / "run")).values()} == {"too few rows"}
    many = [
        toolkit.evaluate(["base", folder / "run"], folder / "rows.jsonl", seed=seed, batch_size=8) for seed in (1, 1, 2)
    ]
    loss = [scores_of(one, str(folder / "run"))["loss"] for one in many]
    assert loss[0].verdict == "better"
    assert loss[0].difference.high < 0
    assert loss[0] == loss[1]
    assert loss[0].low != loss[2].low


def test_rows_of_one_group_are_drawn_together(folder: Path, tmp_path: Path) -> None:
    flags = tiny_flags(
        folder / "model", tmp_path / "run", "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--data.validation", 0.5, "--data.group_by", "patient", "--train.epochs", 1,
    )  # fmt: skip
    assert train(*flags) == 0
    comparison = toolkit.evaluate(["base", tmp_path / "run"])
    assert (comparison.rows, comparison.units) == (30, 15)
    assert any("15 groups of 30 rows" in line for line in table(comparison))


def test_shots_stand_before_the_question_and_no_context_is_cut_for_them(folder: Path) -> None:
    comparison = toolkit.evaluate(["base", folder / "run"], shots=2, part="test")
    shown = [model.name for model in comparison.models]
    assert "base, 2 shots" in shown
    assert scores_of(comparison, "base, 2 shots")["loss"].value != scores_of(comparison, "base")["loss"].value
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()][:3]
    asked, *shots = (load_task(TASK).read(row) for row in rows)
    encoder = open_model(str(folder / "run")).encoder
    alone, longer = encoder.encode(asked), encoder.encode(with_shots(asked, shots))
    assert longer.supervised_tokens == alone.supervised_tokens  # the answers before it are not scored
    assert longer.token_ids[-len(alone) + 1 :] == alone.token_ids[1:]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda at: toolkit.evaluate("base"), UsageError, "expected a source"),
        (lambda at: toolkit.evaluate([at / "run", at / "run"]), UsageError, "named twice"),
        (lambda at: toolkit.evaluate(["base", at / "model"], ENGLISH), UsageError, "name the base itself"),
        (lambda at: toolkit.evaluate([at / "run"], shots=1), UsageError, "name base among the sources"),
        (lambda at: toolkit.evaluate(["base", at / "run"], shots=30), UsageError, "30 shots were asked for, and 20"),
        (
            lambda at: toolkit.evaluate(["base", at / "run"], at / "rows.jsonl", shots=1), UsageError, "1 shots were",
        ),
        (lambda at: toolkit.evaluate(f"{at / 'run'}@7.5"), UsageError, "'7.5' is no step of"),
        (lambda at: toolkit.evaluate(f"{at / 'run'}@7"), FrostlineError, "no checkpoint of step 7"),
        (
            lambda at: toolkit.evaluate(
                at / "model", at / "rows.jsonl", task={**TASK, "primary_metric": "chrf++"}
            ), DataError, r"primary_metric is chrf\+\+, which is not among loss,",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(folder: Path, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(folder)


def test_a_step_of_a_run_is_named_behind_an_at(folder: Path) -> None:
    run = folder / "run"
    comparison = toolkit.evaluate([f"{run}@best", f"{run}@latest"])
    assert comparison.against == f"{run}@best"
    assert all(isinstance(model.step, int) for model in comparison.models[:2])


def test_the_task_declares_the_metric_and_the_order_of_its_labels(folder: Path) -> None:
    ordered = {**TASK, "primary_metric": "quadratic_kappa", "output": {"labels": list(LABELS), "ordered": True}}
    comparison = toolkit.evaluate(["base", folder / "run"], folder / "rows.jsonl", task=ordered, batch_size=8)
    assert comparison.primary == "quadratic_kappa"
    assert {"quadratic_kappa", "within_one", "under_rate", "over_rate"} <= set(scores_of(comparison, "base"))
    assert "quadratic_kappa (declared by the task)" in list(table(comparison))[1]


def test_generated_labels_are_scored_beside_likelihoods(folder: Path) -> None:
    comparison = toolkit.evaluate(folder / "run", answers=5, max_new_tokens=3)
    scores = scores_of(comparison, str(folder / "run"))
    assert comparison.answered == 5
    assert 0 <= scores["generated/valid"].value <= 1
    assert "generated/accuracy" in scores


def test_answers_are_scored_beside_trivial_ones(tiny_model: Path, tmp_path: Path) -> None:
    comparison = toolkit.evaluate([tiny_model], ENGLISH, answers=4, max_new_tokens=4, batch_size=2)
    names = [model.name for model in comparison.models]
    assert names == [
        str(tiny_model), "context's last sentence", "sentence nearest the question",
        "oracle: sentence nearest the reference", "another row's answer",
    ]  # fmt: skip
    wanted = {"chrf++", "bleu", "rouge_l", "token_f1", "exact_match", "unsupported_numbers"}
    assert all(wanted <= set(model.scores) for model in comparison.models)
    assert scores_of(comparison, "context's last sentence")["unsupported_numbers"].value == 0
    oracle = scores_of(comparison, "oracle: sentence nearest the reference")["chrf++"].value
    assert oracle >= scores_of(comparison, "sentence nearest the question")["chrf++"].value


def test_another_rows_answer_is_never_a_rows_own() -> None:
    samples = [
        ask(f"question {number}", (f"First. That question {number} here!",), f"answer {number}") for number in range(9)
    ]
    for seed in range(5):
        answers = trivial_answers(samples, seed)["another row's answer"]
        assert sorted(answers) == sorted(sample.answer or "" for sample in samples)
        assert not any(answer == sample.answer for answer, sample in zip(answers, samples, strict=True))
    nearest = trivial_answers(samples, 0)["sentence nearest the question"]
    assert nearest == [f"That question {number} here!" for number in range(9)]
    assert set(trivial_answers([ask("why?", (), "so")], 0)) == set()


def test_correction_takes_a_leaning_out_and_the_prior_in() -> None:
    task = load_task(TASK)
    rows: list[Any] = [
        type("R", (), {"sample": task.read({"question": "q", "decision": LABELS[at % 3]}), "task": task})()
        for at in range(6)
    ]
    classes = Classes.of(rows, rows[:1] + rows[:1] + rows[1:2] + rows[2:3])
    assert classes.prior.tolist() == [0.5, 0.25, 0.25]
    leaning = [np.array([0.0, 0.0, 9.0])] * 6
    corrected = classes.probabilities(classes.corrected(leaning))
    assert corrected == pytest.approx(np.tile([0.5, 0.25, 0.25], (6, 1)), abs=1e-6)
    assert classes.of_prior() == pytest.approx(np.tile([0.5, 0.25, 0.25], (6, 1)), abs=1e-9)


def test_the_command_prints_a_table_and_one_json_object(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "scores.json"
    done = run_here("evaluate", "base", folder / "run", "--output", output, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("loss ")
    assert "difference to base" in lines[1]
    assert "accuracy (declared by the task)" in lines
    found = json.loads(lines[-1])
    assert json.loads(output.read_text(encoding="utf-8")) == found
    assert found["models"][0]["name"] == "base"
    assert math.isfinite(found["models"][1]["scores"]["log_loss"]["difference"]["p"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-new-tokens", "3"), "goes with --answers"),
        (("--data.task", "choice"), "goes with --data.path"),
        (("--answers", "some"), "is not a whole number from 0, or all"),
        (("--data.path", "x.jsonl", "--data.task", "{name: choice"), "is not valid YAML"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(folder: Path, flags: tuple[str, ...], message: str) -> None:
    done = run_here("evaluate", folder / "run", *flags)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_model_of_another_tokenizer_reads_the_same_rows_in_its_own_tokens(folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tiny_llama().save_pretrained(tmp_path / "other")
    make_tokenizer(template=template).save_pretrained(tmp_path / "other")
    comparison = toolkit.evaluate([folder / "run", tmp_path / "other"])
    alone = toolkit.evaluate(tmp_path / "other", folder / "rows.jsonl", task=TASK)
    other = scores_of(comparison, str(tmp_path / "other"))
    assert comparison.models[1].name == str(tmp_path / "other")
    assert other["bits_per_byte"].value == pytest.approx(
        scores_of(alone, str(tmp_path / "other"))["bits_per_byte"].value, rel=0.2
    )
    assert other["loss"].value != scores_of(comparison, str(folder / "run"))["loss"].value


def test_a_run_that_was_trained_on_the_rows_is_not_compared_on_them(folder: Path, tmp_path: Path) -> None:
    flags = tiny_flags(
        folder / "model", tmp_path / "all", "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--train.epochs", 1, "--train.max_steps", 1,
    )  # fmt: skip
    assert train(*flags) == 0
    with pytest.raises(DataError, match=r"all was trained on 20 of the 20 rows, of which .*rows.jsonl line \d+ is"):
        toolkit.evaluate([folder / "run", tmp_path / "all"])
    named = toolkit.evaluate([folder / "run", tmp_path / "all"], folder / "rows.jsonl", batch_size=8)
    assert named.rows == 60


@pytest.fixture(scope="module")
def folds(folder: Path) -> Path:
    """Five folds of 40 rows."""
    flags = tiny_flags(
        folder / "model", folder / "folds", "--data.path", choice_rows(folder / "forty.jsonl", 40), "--data.task",
        json.dumps(TASK), "--data.folds", 5, "--train.epochs", 2, "--prefix.cache_dir", folder / "cache",
    )  # fmt: skip
    assert train(*flags) == 0
    return folder / "folds"


def test_folds_predict_every_row_once_by_a_run_that_did_not_see_it(
    folds: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = Counter[tuple[int, ...]]()
    forward = Prefix.forward

    def counted(self: Prefix, batch: Any) -> torch.Tensor:
        computed.update(example.token_ids for example in batch.examples)
        return forward(self, batch)

    monkeypatch.setattr(Prefix, "forward", counted)
    comparison = toolkit.evaluate(["base", folds], batch_size=4)
    assert (comparison.rows, comparison.held_out) == (40, True)
    assert comparison.data.endswith("each by that one of the 5 folds of " + f"{folds} that did not see it")
    lines = (folds / "out_of_fold.jsonl").read_text(encoding="utf-8").splitlines()
    known = [json.loads(line) for line in lines]
    loss = sum(row["loss"] * row["tokens"] for row in known) / sum(row["tokens"] for row in known)
    assert comparison.loss == pytest.approx(loss, abs=1e-5)
    assert len(comparison.predictions[str(folds)]) == 40
    often = [ids for ids, count in computed.items() if count > 1]
    assert len(often) <= 5  # the shortest sequence of each fold is tried before its cache is filled
    again = toolkit.evaluate(["base", folds], batch_size=4)
    assert again == comparison


def test_folds_are_scored_on_their_own_rows_alone(folds: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="holds folds, each scored on the rows that it held out"):
        toolkit.evaluate(folds, folder / "forty.jsonl")
    with pytest.raises(UsageError, match="--answers of folds is all or 0"):
        toolkit.evaluate(folds, answers=3)
    with pytest.raises(DataError, match="holds folds of other rows than those that are scored"):
        toolkit.evaluate([folder / "run", folds])
    (folds / "fold-4").rename(folder / "away")
    try:
        with pytest.raises(DataError, match="holds 4 of 5 folds; train the others first"):
            toolkit.evaluate(folds)
    finally:
        (folder / "away").rename(folds / "fold-4")


def test_two_runs_of_folds_are_compared_row_by_row(folds: Path, folder: Path) -> None:
    flags = tiny_flags(
        folder / "model", folder / "other", "--data.path", folder / "forty.jsonl", "--data.task", json.dumps(TASK),
        "--data.folds", 2, "--train.epochs", 1, "--prefix.cache_dir", folder / "cache",
    )  # fmt: skip
    assert train(*flags) == 0
    both = toolkit.evaluate([folds, folder / "other"], answers=40, max_new_tokens=2, batch_size=8)
    alone = toolkit.evaluate(folder / "other", batch_size=8)
    assert scores_of(both, str(folder / "other"))["loss"].value == pytest.approx(alone.loss, abs=1e-5)
    assert both.predictions[str(folder / "other")].items() == alone.predictions[str(folder / "other")].items()


def test_predictions_are_files_of_each_model_by_the_rows_ids(folder: Path, tmp_path: Path) -> None:
    rows = {"77": {"question": "Why?", "decision": "yes"}, "78": {"question": "How?", "decision": "no"}}
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    done = run_here(
        "evaluate", "base", folder / "run", "--data.path", tmp_path / "rows.json", "--predictions", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "out").iterdir())
    assert files[-1].name == "base.json" or files[0].name == "base.json"
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert list(found) == ["77", "78"]
        assert set(found.values()) <= set(LABELS)
    refused = run_here("evaluate", folder / "model", "--data.path", ENGLISH, "--predictions", tmp_path / "none")
    assert refused.returncode == 2
    assert "rows without options need --answers N" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_generated_answers_are_lines_beside_what_was_asked(folder: Path, tmp_path: Path) -> None:
    rows = ["--data.path", ENGLISH, "--data.task", "long_answer"]
    flags = ["--answers", "3", "--max-new-tokens", "4", "--batch-size", "2"]
    done = run_here("evaluate", "base", folder / "run", *rows, *flags, "--predictions", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    comparison = toolkit.evaluate(
        ["base", folder / "run"], ENGLISH, task="long_answer", answers=3, max_new_tokens=4, batch_size=2
    )
    asked = [json.loads(line) for line in Path(ENGLISH).read_text(encoding="utf-8").splitlines()[:3]]
    lines = [json.loads(line) for line in (tmp_path / "out" / "base.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["QUESTION"] for line in lines] == [row["QUESTION"] for row in asked]
    assert [line["REFERENCE"] for line in lines] == [row["LONG_ANSWER"] for row in asked]
    assert [line["ANSWER"] for line in lines] == [row.answers["base"] for row in comparison.answered_rows]
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_texts_have_no_answers_to_compare(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n', encoding="utf-8")
    assert toolkit.evaluate(tiny_model, tmp_path / "texts.jsonl").rows == 2
    with pytest.raises(DataError, match=r"texts.jsonl line 1 has no answer to compare a generated one with"):
        toolkit.evaluate(tiny_model, tmp_path / "texts.jsonl", answers=2)


def test_folds_that_read_the_rows_otherwise_are_not_put_beside(folds: Path, folder: Path) -> None:
    other = {**TASK, "output": {"labels": list(reversed(LABELS))}}
    flags = tiny_flags(
        folder / "model", folder / "reversed", "--data.path", folder / "forty.jsonl", "--data.task", json.dumps(other),
        "--data.folds", 2, "--train.epochs", 1, "--train.max_steps", 1,
    )  # fmt: skip
    assert train(*flags) == 0
    with pytest.raises(DataError, match=r"reads .* by another task than the first source does"):
        toolkit.evaluate([folds, folder / "reversed"])


@pytest.mark.parametrize("seen_as", ["another prompt", "a checkpoint", "a changed file"])
def test_rows_that_were_seen_are_known_however_they_were_read(folder: Path, tmp_path: Path, seen_as: str) -> None:
    file = folder / "rows.jsonl"
    if seen_as == "a changed file":
        file = tmp_path / "rows.jsonl"
        file.write_text((folder / "rows.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    task = {**TASK, "system": "You decide."} if seen_as == "another prompt" else TASK
    flags = tiny_flags(
        folder / "model", tmp_path / "all", "--data.path", file, "--data.task", json.dumps(task), "--train.epochs", 1,
        "--train.max_steps", 1,
    )  # fmt: skip
    assert train(*flags) == 0
    source = tmp_path / "all" / "checkpoints" / "step-00000001" if seen_as == "a checkpoint" else tmp_path / "all"
    if seen_as == "a changed file":
        choice_rows(file, 10)
    message = "have changed since it was trained" if seen_as == "a changed file" else "was trained on 20 of the 20 rows"
    with pytest.raises(DataError, match=message):
        toolkit.evaluate([folder / "run", source])


def test_folds_answer_all_their_rows(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "folds", "--data.folds", 2, "--train.epochs", 1, "--train.max_steps", 1)
    assert train(*flags) == 0
    comparison = toolkit.evaluate(["base", tmp_path / "folds"], answers=sys.maxsize, max_new_tokens=2, batch_size=8)
    assert comparison.answered == comparison.rows == 20
    assert "chrf++" in scores_of(comparison, str(tmp_path / "folds"))
    with pytest.raises(UsageError, match="folds know no training rows that all of them may see"):
        toolkit.evaluate(["base", tmp_path / "folds"], shots=1)


def test_json_is_scored_by_its_fields_where_it_is_answered_and_by_loss_where_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"note {number}", "completion": json.dumps({"grade": number})} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"name": "prompt_completion", "output": {"schema": {"type": "object"}}}
    assert toolkit.evaluate(tiny_model, tmp_path / "rows.jsonl", task=task).primary == "loss"
    answered = toolkit.evaluate(tiny_model, tmp_path / "rows.jsonl", task=task, answers=4, max_new_tokens=3)
    assert answered.primary == "exact_match"
    assert {"valid", "exact_match", "fields", "field/grade"} <= set(scores_of(answered, str(tiny_model)))


def test_rows_of_several_tasks_have_the_loss_in_common(folder: Path, tmp_path: Path) -> None:
    sources = f"[{{path: {ENGLISH}}}, {{path: {folder / 'rows.jsonl'}, task: {json.dumps(TASK)}}}]"
    flags = tiny_flags(
        folder / "model", tmp_path / "run", "--data.path", sources, "--data.validation", 0.5, "--train.epochs", 1,
        "--train.max_steps", 1,
    )  # fmt: skip
    assert train(*flags) == 0
    comparison = toolkit.evaluate(["base", tmp_path / "run"], batch_size=8)
    assert set(scores_of(comparison, "base")) == {"loss", "perplexity", "bits_per_byte"}
    assert comparison.primary == "loss"
    with pytest.raises(DataError, match=r"read by several tasks .* leave out --answers"):
        toolkit.evaluate(["base", tmp_path / "run"], answers=2)


def test_bits_per_byte_leave_out_rows_whose_turns_were_cut(tiny_model: Path, tmp_path: Path) -> None:
    turns = [("user", "who?"), ("assistant", "you and me"), ("user", "why?"), ("assistant", "because")]
    row = {"messages": [{"role": role, "content": text * 3} for role, text in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    flags = tiny_flags(
        tiny_model,
        tmp_path / "run",
        "--data.path",
        tmp_path / "rows.jsonl",
        "--data.max_length",
        40,
        "--train.epochs",
        1,
    )
    assert train(*flags) == 0
    cut = scores_of(toolkit.evaluate(tmp_path / "run", tmp_path / "rows.jsonl"), str(tmp_path / "run"))
    whole = scores_of(toolkit.evaluate(tiny_model, tmp_path / "rows.jsonl"), str(tiny_model))
    assert math.isnan(cut["bits_per_byte"].value)
    assert 2 < whole["bits_per_byte"].value < 12


def test_a_label_is_read_exactly_before_it_is_read_loosely() -> None:
    task = load_task("choice")
    sample = task.read({"question": "Which?", "options": ["A.", "a", "b"], "answer": 3})
    sample = dataclasses.replace(sample, allowed=lambda: ("A.", "a", "b"))
    row: Any = type("R", (), {"sample": sample})()
    numbers = np.arange(3)
    assert [label_of(text, row, numbers) for text in ("a", "A.", " B ", "A", "none")] == [1, 0, 2, -1, -1]


def test_the_same_option_twice_is_named(folder: Path, tmp_path: Path) -> None:
    row = {"question": "Which?", "options": ["a", "a", "b"], "answer": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    task = {"name": "choice", "target": "{{ label }}"}
    with pytest.raises(DataError, match=r"rows.jsonl line 1 has the same option twice: 'a', 'a', 'b'"):
        toolkit.evaluate(folder / "model", tmp_path / "rows.jsonl", task=task)


def test_groups_of_the_recipe_hold_for_named_rows_that_have_them(folder: Path, tmp_path: Path) -> None:
    flags = tiny_flags(
        folder / "model", tmp_path / "run", "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--data.validation", 0.5, "--data.group_by", "patient", "--train.epochs", 1, "--train.max_steps", 1,
    )  # fmt: skip
    assert train(*flags) == 0
    named = toolkit.evaluate(tmp_path / "run", folder / "rows.jsonl", batch_size=8)
    assert (named.rows, named.units) == (60, 30)


def test_ids_that_repeat_name_no_row_and_models_of_like_names_have_files_of_their_own(
    folder: Path, tmp_path: Path
) -> None:
    rows = [{"id": 1, "question": f"Why {number}?", "decision": "yes"} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    comparison = toolkit.evaluate(folder / "model", tmp_path / "rows.jsonl", task=TASK)
    assert len(comparison.predictions[str(folder / "model")]) == 3
    alike = dataclasses.replace(comparison, predictions={"모델/가": {"1": "yes"}, "모델_가": {"1": "no"}, "/": {}})
    save_predictions(alike, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.json",
        "모델_가-2.json",
        "모델_가.json",
    ]


def test_a_moved_base_and_a_step_are_for_the_sources_that_have_one(folder: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "moved")
    comparison = toolkit.evaluate(
        ["base", folder / "run", folder / "model"], base=tmp_path / "moved", step="best", batch_size=4
    )
    assert comparison.models[2].step is None
    assert isinstance(comparison.models[1].step, int)


def test_several_ranks_do_not_all_evaluate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for command in ("evaluate", "report"):
        done = run_here(command, folder / "run")
        assert done.returncode == 2
        assert not done.stdout
        with pytest.raises(UsageError, match=f"{command}.py computes in one process, and a launcher has started 2"):
            require_one_process(f"{command}.py")
