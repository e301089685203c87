"""What two sources read from one row of a file stays on one side of every split."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import make_tokenizer

import toolkit
from toolkit.config.schema import DataConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.examples import Example
from toolkit.data.rows import Rows
from toolkit.data.source_rows import connected, source_rows
from toolkit.data.sources import Source
from toolkit.data.token_file import EncodedRows
from toolkit.data.token_store import store_in_memory
from toolkit.runtime.errors import DataError

ASK = {"name": "prompt_completion", "columns": {"prompt": "ask", "completion": "say"}}
JUDGE = {"name": "prompt_completion", "columns": {"prompt": "say", "completion": "verdict"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [{"ask": f"ask {n}", "say": f"say {n}", "verdict": f"verdict {n}", "kind": n % 2} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    return tmp_path / "rows.jsonl"


def load(path: Path, *, other: str = "rows.jsonl", **data: Any) -> Dataset:
    named = [{"path": str(path), "task": ASK}, {"path": str(path.parent / other), "task": JUDGE}]
    return load_dataset(DataConfig.model_validate({"path": named, **data}), make_tokenizer(), 0)


def numbers(rows: Rows) -> list[int]:
    return [int(row.origin.split()[-1]) for row in rows]


@pytest.mark.parametrize(
    "data",
    [{"validation": 0.2}, {"test": 0.2}, {"validation": 0.2, "test": 0.3}, {"folds": 4, "fold": 2},
     {"folds": 4, "validation": 0.2}, {"validation": 0.2, "stratify_by": "kind"}],
)  # fmt: skip
@pytest.mark.parametrize("other", ["rows.jsonl", "./rows.jsonl", "link.jsonl"])
def test_a_row_read_by_two_tasks_is_not_parted(path: Path, data: dict[str, Any], other: str) -> None:
    rows = load(path, other=other, **data)
    parts = [set(numbers(part)) for part in (rows.train, rows.validation, rows.test)]
    assert sum(map(len, parts)) == 20
    assert len(rows.train) + len(rows.validation) + len(rows.test) == 40
    assert all(len(numbers(part)) == 2 * len(set(numbers(part))) for part in (rows.train, rows.validation, rows.test))


def test_a_member_of_an_archive_is_one_however_the_path_is_written(path: Path) -> None:
    with zipfile.ZipFile(path.parent / "my rows.zip", "w") as archive:
        archive.write(path, "part 1.jsonl")
        archive.writestr("part 2.jsonl", path.read_text().replace(" 1", " 7"))
    (path.parent / "link.zip").symlink_to("my rows.zip")
    rows = load(path.parent / "my rows.zip", other="link.zip", validation=0.2)
    parts = [{(row.origin.split(":")[1]) for row in part} for part in (rows.train, rows.validation)]
    assert (len(parts[0] | parts[1]), parts[0] & parts[1]) == (40, set())


def test_copies_of_a_row_stay_together_by_way_of_their_tasks(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "ask": f"ask {n % 10}", "say": f"say {n % 10}"} for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load(path, test=0.3)
    assert {n % 10 for n in numbers(found.test)}.isdisjoint({n % 10 for n in numbers(found.train)})
    assert connected(["a", "b", "c", "d"], ["x", "y", "y", "z"], ["m", "n", "o", "m"]) == ["0", "1", "1", "0"]


def test_rows_of_files_that_are_read_once_are_divided_as_ever(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_bytes(path.read_bytes())
    alone = load_dataset(
        DataConfig.model_validate({"path": str(path), "task": ASK, "validation": 0.2}), make_tokenizer(), 0
    )
    assert numbers(alone.validation) == [2, 9, 13, 14]
    apart = load(path, other="other.jsonl", validation=0.2)
    assert len(apart.validation) == 8
    assert set(numbers(apart.validation[:4])) != set(numbers(apart.validation[4:]))


def test_configurations_of_a_hub_set_have_rows_of_their_own() -> None:
    rows = [Example((1, 2), ((1, 2),), origin=f"org/name[train] row {n}") for n in range(3)]
    stores = [store_in_memory(EncodedRows.of(rows)) for _ in range(3)]
    for store, configuration in zip(stores, ("a", "a", "b"), strict=True):
        store.edition = Source("org/name", configuration=configuration).edition
    (found,) = source_rows(Rows.of_stores(stores)) or ()
    assert found.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert source_rows(Rows.of_stores(stores[1:])) is None


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_set_of_its_own_may_not_hold_rows_that_are_trained_on_by_another_task(path: Path, part: str) -> None:
    data = {
        "path": [{"path": str(path), "task": ASK}],
        part: [{"path": str(path.parent / "link.jsonl"), "task": JUDGE}],
    }
    with pytest.raises(DataError, match=rf"20 of 20 {part} rows come from a row of a file that is a training row as"):
        load_dataset(DataConfig.model_validate(data), make_tokenizer(), 0)


def test_a_split_that_is_impossible_does_not_speak_of_a_key_that_is_not_set(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(DataError, match=r"needs at least 4 groups \(parts and copies of a row\); the data has 3"):
        load(path, folds=4)


def test_keys_of_a_json_object_name_rows_too(path: Path) -> None:
    keyed = {f"id {n}": json.loads(line) for n, line in enumerate(path.read_text().splitlines())}
    path.write_text(json.dumps(keyed))
    found = load(path, other="link.jsonl", validation=0.25)
    held_out = numbers(found.validation)
    assert (len(held_out), len(set(held_out))) == (10, 5)


def test_the_check_of_data_divides_such_rows_as_training_does(path: Path, tiny_model: Path) -> None:
    named = [{"path": str(path), "task": ASK}, {"path": str(path), "task": JUDGE}]
    values = {"model.name_or_path": str(tiny_model), "data.path": named, "data.validation": 0.2}
    report = toolkit.data_check(None, values)
    assert report.rows == {"train": 32, "validation": 8, "test": 0}
    assert not [leak for leak in report.leaks if leak.row.split()[-1] == leak.other.split()[-1]]
