"""Runs of every kind of task through training, evaluation, generation and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversation_templates import FAMILIES
from helpers import make_tiny_model, metrics, tiny_flags, train
from transformers import AutoTokenizer

import toolkit
from toolkit.inference.open_model import open_model

CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"what is {name}?"}, {"role": "assistant", "content": f"it is {name}."},
            {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes."},
        ]
    }
    for name in ("one", "two", "three", "four")
]  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": CHAT,
    "prompt_completion": [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in CHAT],
    "text": [{"text": f"{name} " * 90} for name in ("one", "two", "three", "four")],
    "choice": [{"question": f"which? {n}", "A": "x", "B": "y", "answer": 1 + n % 2} for n in range(4)],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_every_kind_of_task_trains_evaluates_generates_and_exports(tmp_path: Path, task: str, said: list[str]) -> None:
    model, path = make_tiny_model(tmp_path / "model"), write(tmp_path / "rows.jsonl", ROWS[task])
    run = tmp_path / "run"
    more = ("--data.validation", "0.25", "--data.max_length", "64", "--output.sample_answers", "1")
    assert train(*tiny_flags(model, run, "--data.path", path, "--train.epochs", "1", *more)) == 0
    assert [line for line in said if f"data.task: auto takes {task}" in line]
    (validated,) = metrics(run, "eval_loss")
    assert toolkit.evaluate(run).loss == pytest.approx(validated, rel=1e-3)
    assert json.loads((run / "rendering.json").read_text())["task"] == task
    asked = toolkit.generate(run, ROWS[task][:1], max_new_tokens=3)
    if task != "choice":
        asked += toolkit.generate(run, ["what is one?"], max_new_tokens=3)
    assert all(isinstance(answer, str) for answer in asked)
    toolkit.export(run, tmp_path / "export")
    assert toolkit.evaluate(tmp_path / "export", path).loss > 0


@pytest.mark.slow
def test_a_template_and_its_switches_go_with_the_run_and_with_its_exports(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% if loud %}LOUD {% endif %}" + FAMILIES["chatml"].plain)
    model, path, run = make_tiny_model(tmp_path / "model"), write(tmp_path / "rows.jsonl", CHAT), tmp_path / "run"
    more = ("--data.chat_template", template, "--data.template_kwargs", "{loud: true}", "--data.validation", "0.25")
    flags = tiny_flags(model, run, "--data.path", path, *more)
    assert train(*flags, "--train.epochs", "1") == 0
    template.unlink()
    opened = open_model(str(run))
    first = opened.encoder.prompt_ids(toolkit_sample())
    assert opened.loaded.tokenizer.decode(first).startswith("LOUD <|im_start|>user")
    assert toolkit.evaluate(run).loss > 0
    toolkit.export(run, tmp_path / "export")
    toolkit.export(run, tmp_path / "delta", delta=True)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    messages = [{"role": "user", "content": "q"}]
    assert exported.apply_chat_template(messages, tokenize=False).startswith("LOUD ")
    assert exported.apply_chat_template(messages, tokenize=False, loud=False).startswith("<|im_start|>")
    assert open_model(str(tmp_path / "delta")).encoder.prompt_ids(toolkit_sample()) == first


def toolkit_sample() -> Any:
    from toolkit.tasks.sample import ask

    return ask("q")
