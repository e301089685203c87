"""A task for each source of a mixture: what is read by which, what is refused, and what a run makes of it later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import make_tiny_model, make_tokenizer, metrics, tiny_flags, train

import toolkit
from toolkit.checkpoint.state import read_state, recipe_differences
from toolkit.config.recipe import build_config
from toolkit.config.schema import DataConfig
from toolkit.data import token_cache
from toolkit.data.dataset import load_dataset
from toolkit.data.sources import sources_of, task_of
from toolkit.inference.open_model import data_settings
from toolkit.runtime.errors import DataError, UsageError

OWN = {"name": "prompt_completion", "columns": {"prompt": "ask", "completion": "say"}}
LABELS = {"name": "choice", "output": {"labels": ["yes", "no"]}, "columns": {"answer": "decision"}}
ROWS = [
    {
        "question": f"is {name} safe?",
        "long_answer": f"{name} is safe.",
        "decision": "yes",
        "ask": f"{name}?",
        "say": "s",
    }
    for name in ("one", "two", "three", "four")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        lines = [json.dumps({**row, "question": f"{name}: {row['question']}"}) for row in ROWS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def data(folder: Path, *tasks: Any, **more: Any) -> DataConfig:
    named = [{"path": str(folder / f"{name}.jsonl"), "task": task} for name, task in zip("ab", tasks, strict=False)]
    return DataConfig.model_validate({"path": named, **more})


def texts(rows: Any) -> list[str]:
    tokenizer = make_tokenizer()
    return [tokenizer.decode(row.token_ids[slice(*row.spans[0])]).split("<|end|>")[0] for row in rows]


def test_each_source_is_read_by_its_own_task_and_the_others_by_that_of_the_recipe(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "own.yaml").write_text("columns: {q: ask, a: say}\nprompt: '{{ q }}'\ntarget: 'own {{ a }}'\n")
    with caplog.at_level("INFO", "frostline"):
        rows = load_dataset(data(folder, LABELS, None), make_tokenizer(), 0)
    assert texts(rows.train) == ["yes"] * 4 + [row["long_answer"] for row in ROWS]
    assert f"{folder / 'a.jsonl'}: the rows are read by the source's own task, choice" in caplog.messages
    assert [line for line in caplog.messages if line.startswith("data.task: auto takes long_answer for")]
    both = load_dataset(data(folder, str(folder / "own.yaml"), OWN, task=LABELS), make_tokenizer(), 0)
    assert texts(both.train) == ["own s"] * 4 + ["s"] * 4
    assert texts(load_dataset(data(folder, None, "auto", task=OWN), make_tokenizer(), 0).train)[4] == "one is safe."


def test_one_file_may_be_two_sources_of_two_tasks_and_each_has_a_store_of_its_own(folder: Path) -> None:
    path = str(folder / "a.jsonl")
    config = DataConfig.model_validate({"path": [{"path": path, "task": LABELS}, {"path": path, "task": OWN}]})
    first, second = (texts(load_dataset(config, make_tokenizer(), 0).train) for _ in range(2))
    assert first == second == ["yes"] * 4 + ["s"] * 4


def test_a_store_of_a_source_without_a_task_is_that_of_its_file_alone(folder: Path) -> None:
    alone = load_dataset(DataConfig(path=str(folder / "b.jsonl")), make_tokenizer(), 0)
    built = len(list(token_cache.root().glob("*.tokens")))
    mixed = load_dataset(data(folder, LABELS, None), make_tokenizer(), 0)
    assert len(list(token_cache.root().glob("*.tokens"))) == built + 1
    assert mixed.train[4:].stores[1].path == alone.train.stores[0].path
    same = load_dataset(data(folder, "long_answer", "long_answer"), make_tokenizer(), 0)
    named = load_dataset(data(folder, None, None, task="long_answer"), make_tokenizer(), 0)
    assert same.fingerprint == named.fingerprint != mixed.fingerprint


def test_held_out_rows_may_have_a_task_too_and_take_that_of_the_training_source_at_their_path(folder: Path) -> None:
    config = data(folder, LABELS, validation=[{"path": str(folder / "b.jsonl"), "task": OWN}])
    rows = load_dataset(config, make_tokenizer(), 0)
    assert (texts(rows.train)[0], texts(rows.validation)[0]) == ("yes", "s")
    same = data(folder, LABELS, validation=str(folder / "a.jsonl"))
    assert [source.task for source in sources_of(same, "validation")] == [LABELS]
    assert [source.task for source in sources_of(data(folder, LABELS, test="other.jsonl"), "test")] == [None]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "chioce",
            r"task of \S*b.jsonl is chioce, which is no task and no file; expected .* \(did you mean choice\?\)",
        ),
        (
            {"name": "choice", "colums": {}},
            r"1 fault in the task of \S*b.jsonl of the recipe:\n  - colums: unknown key",
        ),
        ("messages", r"b.jsonl: task messages needs the column messages; .* task of \S*b.jsonl: long_answer would fit"),
        ({"name": "alpaca", "columns": {"output": "say"}}, r"b.jsonl: task alpaca needs the column instruction"),
    ],
)
def test_a_task_that_cannot_be_used_is_named_with_its_source(folder: Path, task: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(data(folder, None, task), make_tokenizer(), 0)


def test_all_wrong_tasks_are_named_at_once_before_any_row_is_tokenised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.data.dataset.find_store", lambda *_: pytest.fail("rows were tokenised"))
    with pytest.raises(DataError, match=r"(?s)a.jsonl is one.*b.jsonl is two"):
        load_dataset(data(folder, "one", "two"), make_tokenizer(), 0)
    with pytest.raises(UsageError, match=r"data\.path\.0\.task: 3 is no task; expected auto, a name"):
        build_config({"data": {"path": [{"path": "a", "task": 3}]}}, "recipe")


def test_rows_named_beside_a_recipe_are_read_by_the_task_of_their_path_or_of_the_first_source(folder: Path) -> None:
    config = data(folder, LABELS, None, task="alpaca")
    assert task_of(config) == task_of(config, "elsewhere.jsonl") == LABELS
    assert task_of(config, str(folder / "b.jsonl")) == "alpaca"
    assert task_of(DataConfig()) == "auto"
    held_out = {
        "validation": "v.jsonl",
        "test": [{"path": "t.jsonl", "task": "text"}, {"path": str(folder / "a.jsonl")}],
    }
    config = DataConfig(**{**config.model_dump(), **held_out})
    assert task_of(config, "./v.jsonl") == "alpaca", "as the run reads them"
    assert task_of(config, "t.jsonl") == "text"
    assert task_of(config, str(folder / "a.jsonl")) == task_of(config, "elsewhere.jsonl") == LABELS


@pytest.mark.slow
def test_a_run_goes_on_evaluates_checks_and_answers_by_the_tasks_of_its_sources(folder: Path, said: list[str]) -> None:
    run, model = folder / "run", make_tiny_model(folder / "model")
    paths = [f"{{path: {folder / 'a.jsonl'}, task: {json.dumps(OWN)}}}", folder / "b.jsonl"]
    flags = tiny_flags(model, run, "--data.path", *paths, "--data.validation", "0.25", "--output.save_every_steps", 3)
    assert train(*flags, "--train.epochs", "1") == 0
    assert train(*flags, "--train.epochs", "2", "--resume-override") == 0
    assert len(metrics(run, "eval_loss")) == 2
    state = read_state(next((run / "checkpoints").glob("step-*")))
    (entry, _) = state.recipe["data"]["path"]
    config = build_config({**state.recipe, "output": {}}, "recipe")
    del entry["task"]  # as in a checkpoint of a version before sources had tasks
    assert not [line for kind in recipe_differences(state, config, 1) for line in kind if "data.path" in line]
    asked = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    assert [data_settings(str(run), path)[0].task for path in asked] == [OWN, "auto"]
    for path in asked:
        assert toolkit.evaluate(run, path).rows == 4
    assert toolkit.evaluate(run).rows == 2
    assert len(toolkit.generate(run, [{"ask": "why?"}, "why?"], max_new_tokens=2)) == 2
    assert toolkit.data_check(config).rows == {"train": 6, "validation": 2, "test": 0}


def test_rows_at_the_path_of_a_source_take_its_task_however_the_path_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "link.jsonl").symlink_to("b.jsonl")
    named = [{"path": "a.jsonl", "task": LABELS}, {"path": "./b.jsonl", "task": OWN}]
    for written in ("b.jsonl", "./b.jsonl", f"{folder}/b.jsonl", f"../{folder.name}/b.jsonl", "link.jsonl"):
        config = DataConfig.model_validate({"path": named, "validation": written})
        assert [source.task for source in sources_of(config, "validation")] == [OWN]
        assert task_of(config, written) == OWN
    assert task_of(config, "c.jsonl") == LABELS


def test_rows_of_two_tasks_with_the_same_tokens_are_on_one_side(tmp_path: Path) -> None:
    rows = [
        [{"role": role, "content": f"{role} {n} {turn}"} for turn in (1, 2) for role in ("user", "assistant")]
        for n in range(10)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    whole = {"path": str(path), "task": "messages"}
    last = {"path": str(path), "task": {"name": "messages", "train_on": "last"}}
    found = load_dataset(DataConfig.model_validate({"path": [whole, last], "test": 0.3}), make_tokenizer(), 0)
    assert not {row.token_ids for row in found.train} & {row.token_ids for row in found.test}
    assert len(found.test) == 6
    with pytest.raises(DataError, match="10 of 10 test rows are training rows as well"):
        load_dataset(DataConfig.model_validate({"path": [whole], "test": [last]}), make_tokenizer(), 0)
