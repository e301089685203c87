"""Runs on templates with a will of their own: dates, thoughts, turns without an end."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import STYLES, Style
from helpers import metrics, tiny_flags, tiny_llama, train

import toolkit
from toolkit.inference.answering import Answerer
from toolkit.inference.open_model import open_model
from toolkit.models.source_files import SourceFiles
from toolkit.runtime.errors import DataError
from toolkit.tasks.sample import ask

ROWS = [
    {"QUESTION": f"what is {name}?", "CONTEXTS": [f"about {name}."], "LONG_ANSWER": f"{name} is {name}."}
    for name in ("one", "two", "three", "four")
]


def make_model(directory: Path, style: Style, ends: list[int] | None = None, template: str | None = None) -> Path:
    model, tokenizer = tiny_llama(), style.tokenizer()
    tokenizer.chat_template = template or style.template
    model.generation_config.eos_token_id = ends or tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def memorise(model: Path, run: Path, rows: Path, *more: str) -> list[str]:
    """What the model answers to the rows that it was trained on until it knows them."""
    flags = tiny_flags(model, run, "--data.path", rows, "--mask.train", "all", "--train.epochs", "40", *more)
    assert train(*flags, "--mask.tied", "both", "--train.learning_rate", "5e-3", "--prefix.cache", "off") == 0
    opened = open_model(str(run))
    asked = [ask(row["QUESTION"], tuple(row["CONTEXTS"])) for row in map(json.loads, rows.read_text().splitlines())]
    answerer = Answerer(opened.loaded, 512, 60, rendering=opened.rendering)
    return [answerer.answer(sample) for sample in asked]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm", "qwen3", "deepseek-r1"])
def test_memorised_answers_are_given_as_they_were_learned(tmp_path: Path, name: str, said: list[str]) -> None:
    style = STYLES[name]
    model = make_model(tmp_path / "model", style, ends=[0, 3] if name == "glm" else None)
    given = memorise(model, tmp_path / "run", write(tmp_path / "rows.jsonl", ROWS))
    assert given == [row["LONG_ANSWER"] for row in ROWS]
    assert [line for line in said if "is appended and trained" in line or "before answers" in line]


@pytest.mark.slow
def test_memorised_thoughts_are_given_before_their_answers(tmp_path: Path) -> None:
    rows = [
        {**row, "LONG_ANSWER": f"<think>\nabout {n}\n</think>\n\n{row['LONG_ANSWER']}"} for n, row in enumerate(ROWS)
    ]
    for name in ("qwen3", "deepseek-r1"):
        model = make_model(tmp_path / name, STYLES[name])
        given = memorise(model, tmp_path / f"{name}-run", write(tmp_path / "rows.jsonl", rows))
        assert given == [row["LONG_ANSWER"] for row in rows]


def test_a_run_goes_on_and_is_evaluated_with_the_date_on_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Past:
            return cls(2001, 2, 3)

    style = STYLES["chatml"]
    model = make_model(tmp_path / "model", style, template="Today: {{ strftime_now('%x') }}\n" + style.template)
    flags = tiny_flags(model, tmp_path / "run", "--data.validation", "0.25", "--output.save_every_steps", "5")
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.training.loading.datetime", Past)
        assert train(*flags, "--train.epochs", "1") == 0
    assert toolkit.evaluate(tmp_path / "run").loss > 0
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert open_model(str(checkpoint)).rendering.now == datetime.datetime(2001, 2, 3)
    assert train(*flags, "--train.epochs", "2", "--resume-override") == 0
    assert len(metrics(tmp_path / "run", "eval_loss")) == 2
    (tmp_path / "run" / "rendering.json").unlink()
    with pytest.raises(DataError, match="have changed since"):
        toolkit.evaluate(tmp_path / "run")


def test_rows_of_a_model_that_prints_the_date_are_rendered_anew_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Tomorrow:
            return cls(2101, 2, 3)

    style, rows = STYLES["chatml"], write(tmp_path / "rows.jsonl", ROWS)
    model = make_model(tmp_path / "model", style, template="Today: {{ strftime_now('%x') }}\n" + style.template)
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    for stores in (1, 1, 2):
        if stores == 2:
            monkeypatch.setattr("toolkit.data.token_key.datetime", Tomorrow)
        assert toolkit.evaluate(model, rows).rows == 4
        assert len(list((tmp_path / "cache" / "tokens").glob("*.tokens"))) == stores


def test_the_models_list_of_ends_is_read_before_its_weights(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "text_config": {"eos_token_id": [3, 9]}}')
    assert SourceFiles(str(tmp_path), None).end_tokens() == (5, 3, 7, 9)
    (tmp_path / "generation_config.json").write_text("[")
    assert SourceFiles(str(tmp_path), None).end_tokens() == (7, 3, 9)
    (tmp_path / "config.json").unlink()
    assert SourceFiles(str(tmp_path), None).end_tokens() == ()


def test_rows_that_hold_control_tokens_are_counted_and_the_first_is_named(tmp_path: Path, said: list[str]) -> None:
    rows = [*ROWS, {**ROWS[0], "LONG_ANSWER": "it ends with <|im_end|> there."}]
    model = make_model(tmp_path / "model", STYLES["chatml"])
    path = write(tmp_path / "rows.jsonl", rows)
    assert train(*tiny_flags(model, tmp_path / "run", "--data.path", path, "--train.epochs", "1")) == 0
    (line,) = [line for line in said if "control token" in line]
    assert line.startswith("1 row holds the text of a control token (first: '<|im_end|>' in")
    assert "rows.jsonl line 5" in line
