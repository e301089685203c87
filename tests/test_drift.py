"""What training does to a model beside its task: drift from its base, forgetting, and rows that the base may know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_tiny_model, run_here, tiny_flags, train
from transformers import LlamaForCausalLM

import toolkit
from toolkit.data.row_samples import RowSample
from toolkit.evaluation.base_answers import everyday_prompts
from toolkit.evaluation.contamination import public_sources
from toolkit.evaluation.table import report
from toolkit.inference.open_model import open_model
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.errors import ConfigError, DataError, UsageError
from toolkit.tasks.choose import load_task
from toolkit.tasks.lm_eval import LmEvalTask, read_lm_eval_task
from toolkit.tasks.sample import RowFaultError

ITEMS = {"name": "choice", "first_number": 0, "target": "{{ label }}"}
LM_EVAL = """\
task: evens
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "Is {{number}} even?{% if number > 30 %} It is large.{% endif %}\\nAnswer:"
doc_to_choice: ["yes", "no, it is odd"]
doc_to_target: "{{ number % 2 }}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of it that trained hard, one that trained at a rate of next to nothing, and labelled items."""
    folder = tmp_path_factory.mktemp("drift")
    make_tiny_model(folder / "model")
    for name, rate, steps in (("run", 1e-2, 12), ("still", 1e-30, 1)):
        flags = tiny_flags(
            folder / "model", folder / name, "--data.validation", 0.2, "--train.max_steps", steps,
            "--train.learning_rate", rate, "--train.warmup_ratio", 0,
        )  # fmt: skip
        assert train(*flags) == 0
    rows = [{"question": f"Is {n} even?", "options": ["yes", "no, it is odd"], "answer": n % 2} for n in range(60)]
    write(folder / "items.jsonl", rows)
    write(folder / "numbers.jsonl", [{"number": n} for n in range(60)])
    return folder


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> toolkit.Comparison:
    return toolkit.evaluate(
        [folder / "run", folder / "still"], batch_size=8, drift=True, forgetting=folder / "items.jsonl",
        forgetting_task=ITEMS,
    )  # fmt: skip


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call that generates."""
    calls: list[int] = []
    generate = LlamaForCausalLM.generate

    def counted(self: Any, **options: Any) -> Any:
        calls.append(len(options["input_ids"]))
        return generate(self, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", counted)
    return calls


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def scores(comparison: toolkit.Comparison | None, name: object) -> dict[str, Any]:
    assert comparison is not None
    return dict(next(model.scores for model in comparison.models if model.name == str(name)))


def test_the_everyday_prompts_are_30_korean_and_30_others_each_once() -> None:
    prompts = everyday_prompts()
    assert len(prompts) == len(set(prompts)) == 60
    assert sum(bool(re.search("[가-힣]", prompt)) for prompt in prompts) == 30
    assert all(prompt == prompt.strip() != "" for prompt in prompts)


def test_a_run_drifts_as_far_as_it_trained(folder: Path, evaluated: toolkit.Comparison) -> None:
    drift = evaluated.drift
    assert drift is not None
    still, moved = (scores(drift, folder / name)["loss"] for name in ("still", "run"))
    assert (still.difference.value, still.difference.low, still.difference.high) == (0, 0, 0)
    assert moved.difference.low > 0.1
    assert moved.verdict is None
    assert (drift.rows, drift.units, drift.against, drift.step) == (60, 60, "base", None)
    assert drift.loss == scores(drift, "base")["loss"].value
    assert [model.name for model in drift.models] == ["base", str(folder / "run"), str(folder / "still")]


def test_the_bases_answers_are_generated_once_a_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generated: list[int]
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    asked = {"batch_size": 10, "drift": True, "drift_max_new_tokens": 4}
    first = toolkit.evaluate(folder / "run", **asked)
    assert sum(calls for calls in generated if calls > 1) == 60
    generated.clear()
    assert toolkit.evaluate(folder / "run", **asked) == first
    toolkit.evaluate(["base", folder / "still"], **asked)
    assert not generated
    toolkit.evaluate(folder / "run", **{**asked, "drift_max_new_tokens": 3})
    toolkit.evaluate(folder / "run", **asked, dtype="bfloat16")
    assert sum(calls for calls in generated if calls > 1) == 120
    assert len(list((tmp_path / "base_answers").iterdir())) == 3


@pytest.mark.parametrize("damage", ["torn", "changed", "another model's", "no object"])
def test_a_damaged_file_of_answers_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    asked = {"batch_size": 16, "drift": True, "drift_max_new_tokens": 2}
    first = toolkit.evaluate(folder / "run", **asked)
    (path,) = (cache_root() / "base_answers").iterdir()
    whole = path.read_text(encoding="utf-8")
    content = json.loads(whole)
    if damage == "changed":
        content["answers"][0] += "x"
    path.write_text(
        {
            "torn": whole[:-40], "changed": json.dumps(content), "no object": "[]",
            "another model's": json.dumps({**content, "model": "0" * 64}),
        }[damage],
        encoding="utf-8",
    )  # fmt: skip
    with caplog.at_level("WARNING"):
        assert toolkit.evaluate(folder / "run", **asked) == first
    assert "is damaged, or another model's" in caplog.text
    assert path.read_text(encoding="utf-8") == whole


def test_another_tokenizer_is_compared_by_bytes_alone(folder: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "other")
    saved = json.loads((tmp_path / "other" / "tokenizer.json").read_text(encoding="utf-8"))
    saved["model"]["merges"] = saved["model"]["merges"][:20]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    items = folder / "items.jsonl"
    drift = toolkit.evaluate([folder / "run", tmp_path / "other"], items, task=ITEMS, drift=True, batch_size=8).drift
    assert set(scores(drift, tmp_path / "other")) == {"bits_per_byte"}
    assert set(scores(drift, folder / "run")) == {"loss", "perplexity", "bits_per_byte"}


def test_forgetting_is_what_evaluating_on_the_file_gives(folder: Path, evaluated: toolkit.Comparison) -> None:
    alone = toolkit.evaluate(
        ["base", folder / "run", folder / "still"], folder / "items.jsonl", task=ITEMS, batch_size=8
    )
    assert evaluated.forgetting == alone
    assert evaluated.forgetting.primary == "accuracy"
    assert scores(alone, folder / "still")["accuracy"].difference.value == 0
    assert scores(alone, folder / "still")["accuracy"].verdict == "no difference shown"


def lm_eval_file(folder: Path, path: Path, **changes: str) -> Path:
    text = LM_EVAL.replace("ROWS", str(folder / "numbers.jsonl"))
    for key, line in changes.items():
        text = re.sub(rf"^{key}:.*\n", "", text, flags=re.MULTILINE) + (f"{key}: {line}\n" if line else "")
    path.write_text(text, encoding="utf-8")
    return path


def test_a_task_of_lm_eval_is_the_one_made_by_hand(folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Is {n} even?{' It is large.' if n > 30 else ''}\nAnswer:",
            "options": ["yes", "no, it is odd"], "answer": n % 2,
        }
        for n in range(60)
    ]  # fmt: skip
    by_hand = {**ITEMS, "prompt": "{{ question }}"}
    wanted = toolkit.evaluate(
        ["base", folder / "run"], write(tmp_path / "hand.jsonl", rows), task=by_hand, batch_size=8
    )
    file = lm_eval_file(folder, tmp_path / "task.yaml")
    without_rows = lm_eval_file(folder, tmp_path / "rowless.yaml", dataset_kwargs="", dataset_path="org/set")
    for named in (
        {"forgetting": file},
        {"forgetting": folder / "numbers.jsonl", "forgetting_task": str(without_rows)},
    ):
        found = toolkit.evaluate(folder / "run", batch_size=8, **named).forgetting
        assert found is not None
        assert found.models == wanted.models
        assert "by lm-eval's task evens" in found.data
        assert "each model's chat template" in found.data
    with pytest.raises(DataError, match="names no local rows"):
        toolkit.evaluate(folder / "run", forgetting=without_rows)
    with pytest.raises(UsageError, match="names another"):
        toolkit.evaluate(folder / "run", forgetting=file, forgetting_task="choice")


def test_a_model_without_a_chat_template_has_lm_evals_plain_prompt(folder: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert train(*tiny_flags(tmp_path / "model", tmp_path / "run", "--train.max_steps", 1)) == 0
    file = lm_eval_file(folder, tmp_path / "task.yaml")
    items = folder / "items.jsonl"
    found = toolkit.evaluate(tmp_path / "run", items, task=ITEMS, batch_size=8, forgetting=file).forgetting
    opened = open_model(str(tmp_path / "model"))
    likelihoods = []
    for n in range(60):
        prompt = f"Is {n} even?{' It is large.' if n > 30 else ''}\nAnswer:"
        start = len(opened.loaded.tokenizer(prompt)["input_ids"])
        for option in ("yes", "no, it is odd"):
            ids = opened.loaded.tokenizer(f"{prompt} {option}")["input_ids"]
            with torch.no_grad():
                logits = opened.loaded.model.eval()(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            likelihoods.append(float(sum(logits[at - 1, ids[at]] for at in range(start, len(ids)))))
    table = np.array(likelihoods).reshape(60, 2)
    truth = np.arange(60) % 2
    right = {"accuracy": table, "accuracy_per_character": table / [3, 13]}
    for name, values in right.items():
        assert scores(found, "base")[name].value == pytest.approx((values.argmax(1) == truth).mean())
    chance = np.exp(table - np.logaddexp.reduce(table, axis=1)[:, None])
    brier = ((chance - np.eye(2)[truth]) ** 2).sum(1).mean()
    assert scores(found, "base")["brier"].value == pytest.approx(brier, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_docs": "!function utils.process"}, r"process_docs is !function utils\.process: Python code"),
        ({"doc_to_text": "!function utils.text"}, r"doc_to_text is !function utils\.text: Python code"),
        ({"include": "base.yaml"}, "include is 'base.yaml': a task is read from one file"),
        ({"num_fewshot": "5"}, "num_fewshot is 5, which changes the prompt"),
        ({"description": "Answer."}, "description is 'Answer.', which changes the prompt"),
        ({"target_delimiter": "''"}, "target_delimiter is '', which changes the prompt"),
        ({"fewshot_config": "{sampler: first_n}"}, "fewshot_config is not supported"),
        ({"process_results": "x"}, "process_results is not supported"),
        ({"output_type": "generate_until"}, "output_type is 'generate_until'; expected multiple_choice"),
        ({"doc_to_choice": "[yes, no]"}, "yes and no in quotes"),
        ({"doc_to_choice": ""}, "doc_to_choice is None; expected a template or column"),
        ({"doc_to_text": "'{% if %}'"}, "doc_to_text is no valid template"),
        ({"dataset_kwargs": "{data_dir: x}"}, "expected data_files alone"),
        ({"test_split": "validation"}, "expected test_split or validation_split to be one"),
    ],
)
def test_what_a_task_of_lm_eval_may_not_have_is_named(
    folder: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    file = lm_eval_file(folder, tmp_path / "task.yaml", **changes)
    with pytest.raises(ConfigError, match=message):
        toolkit.evaluate(folder / "run", forgetting=file)


ROW = {"number": 3, "kind": "odd", "list": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "choice", "target", "item"),
    [
        ("kind", "list", 1, ("odd", ["a", "b"], 1)),
        ("kind", "{{ [kind, 'even'] }}", "kind", ("odd", ["odd", "even"], 0)),
        ("{{kind|regex_replace('o', 'O')}}", ("a", "b"), "{{ list[1] }}", ("Odd", ["a", "b"], 1)),
        ("kind", ("a", "b"), "number", "gives '3' for doc_to_target; expected a number from 0 to 1"),
        ("{{ none }}x", ("a", "b"), "{{ gone }}", "cannot be rendered by doc_to_target: 'gone' is undefined"),
        ("{{kind}}\n", ("a", "b"), 0, "with blanks at an end"),
        ("number", ("a", "b"), 0, "gives '3' for doc_to_text"),
        ("kind", "{{ kind }}", 0, "gives 'odd' for doc_to_choice; expected a list"),
        ("{{ kind.__class__.__mro__ }}", ("a", "b"), 0, "unsafe"),
    ],
)
def test_rows_become_items_by_templates_and_columns(text: str, choice: Any, target: Any, item: Any) -> None:
    task = LmEvalTask("one", text, choice, target, ())
    if isinstance(item, str):
        with pytest.raises(RowFaultError, match=re.escape(item)):
            task.item(ROW, set(ROW))
    else:
        assert tuple(task.item(ROW, set(ROW)).values()) == item


def test_the_options_of_a_task_may_be_a_mapping(folder: Path, tmp_path: Path) -> None:
    file = lm_eval_file(folder, tmp_path / "task.yaml", doc_to_choice="{a: 'yes', b: 'no'}")
    assert read_lm_eval_task(str(file)).choice == ("yes", "no")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda at: toolkit.evaluate(at / "model", at / "items.jsonl", drift=True), UsageError,
            "--drift compares with the base that the first source began from",
        ),
        (
            lambda at: toolkit.evaluate(at / "model", at / "items.jsonl", forgetting=at / "items.jsonl"), UsageError,
            "name a run, a checkpoint or a delta first",
        ),
        (lambda at: toolkit.evaluate("base", drift=True), UsageError, "--drift compares sources with their base"),
        (lambda at: toolkit.evaluate(at / "run", forgetting=at / "none.jsonl"), DataError, "none.jsonl: no such file"),
        (
            lambda at: toolkit.evaluate(at / "run", forgetting=at / "numbers.jsonl"), DataError,
            "numbers.jsonl: task choice needs the columns question, answer",
        ),
        (
            lambda at: toolkit.evaluate(
                at / "run", forgetting=write(at / "open.jsonl", [{"question": "Why?", "answer": "so"}])
            ), DataError, "open.jsonl line 1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_a_model_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(error, match=message):
        call(folder)


def test_the_command_prints_further_tables_and_keys(folder: Path, evaluated: toolkit.Comparison) -> None:
    items = ["--forgetting", folder / "items.jsonl", "--forgetting.task", json.dumps(ITEMS)]
    done = run_here("evaluate", folder / "run", folder / "still", "--batch-size", 8, "--drift", *items)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("Drift: loss, in nats a token, of the base's own greedy answers") for line in lines)
    assert any(line.startswith("Forgetting: all 60 rows of ") for line in lines)
    found = json.loads(lines[-1])
    assert found == evaluated.as_dict()
    assert found["drift"]["rows"] == found["forgetting"]["rows"] == 60
    assert not {"predictions", "answered_rows"} & (found["drift"].keys() | found["forgetting"].keys())
    plain = toolkit.evaluate(folder / "run").as_dict()
    assert (plain["drift"], plain["forgetting"], plain["contamination"]) == (None, None, None)
    for flag in (("--drift.max_new_tokens", 3), ("--forgetting.task", "choice")):
        assert run_here("evaluate", folder / "run", *flag).returncode == 2


def test_rows_of_a_public_source_are_named(folder: Path, tmp_path: Path) -> None:
    row = {"QUESTION": "Why?", "LONG_ANSWER": "Because."}
    file = write(tmp_path / "rows.jsonl", [row] * 3)
    comparison = toolkit.evaluate(["base", folder / "run"], file, task="pubmedqa")
    assert comparison.contamination is not None
    assert comparison.contamination.startswith("Rows come from PubMed, public before the base was made")
    assert list(report(comparison))[-1] == comparison.contamination
    assert comparison.as_dict()["contamination"] == comparison.contamination
    own = {"name": "long_answer", "public_source": "our wiki"}
    assert "come from our wiki," in str(toolkit.evaluate(folder / "model", file, task=own).contamination)
    assert toolkit.evaluate(folder / "model", file).contamination is None


def test_a_public_source_is_also_told_by_the_path_of_rows() -> None:
    task = load_task("long_answer")
    sample = task.read({"QUESTION": "Why?", "LONG_ANSWER": "Because."})
    for origin, is_public in (("qiaojin/PubMedQA[train] row 1", True), ("rows.jsonl line 1", False)):
        assert bool(public_sources([RowSample(origin, sample, task)])) is is_public
