"""Test rows are for reporting alone; what belongs together stays on one side; a split that cannot be is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, KOREAN, make_tokenizer, run_here, tiny_flags, train

from toolkit.config.schema import DataConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.runtime.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """The English rows, each with a patient of two rows, and a label of which every fourth is rare."""
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["meta"] = {"patient": number // 2, "label": "rare" if number % 4 == 0 else "common"}
    path = tmp_path / "patients.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(path: Path, tokenizer: Any, **data: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **data), tokenizer, seed=1)


def lines(examples: tuple[Any, ...]) -> list[int]:
    return [int(example.origin.split()[-1]) for example in examples]


def test_test_rows_are_drawn_before_validation_rows_and_fractions_are_of_all_rows(tokenizer: Any) -> None:
    dataset = load(ENGLISH, tokenizer, validation=0.25, test=0.25)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (10, 5, 5)
    assert sorted(lines(dataset.train) + lines(dataset.validation) + lines(dataset.test)) == list(range(1, 21))
    assert lines(dataset.test) == lines(load(ENGLISH, tokenizer, validation=0.25).validation)
    assert "5 validation rows, 5 test rows;" in dataset.summary()


def test_a_test_set_of_its_own_changes_nothing_in_what_is_trained_on(tokenizer: Any) -> None:
    dataset = load(ENGLISH, tokenizer, validation=0.25, test=str(KOREAN))
    assert len(dataset.test) == 64
    assert dataset.fingerprint == load(ENGLISH, tokenizer, validation=0.25).fingerprint


@pytest.mark.parametrize("part", ["training", "validation"])
def test_test_rows_that_are_used_otherwise_are_refused(tmp_path: Path, tokenizer: Any, part: str) -> None:
    dataset = load(ENGLISH, tokenizer, validation=0.25)
    used = lines(dataset.train if part == "training" else dataset.validation)[2]
    (tmp_path / "test.jsonl").write_text(ENGLISH.read_text(encoding="utf-8").splitlines()[used - 1])
    with pytest.raises(DataError, match=rf"1 of 1 test rows are {part} rows as well .* a test says nothing then"):
        load(ENGLISH, tokenizer, validation=0.25, test=str(tmp_path / "test.jsonl"))


def test_identical_rows_are_never_parted_into_training_and_test(tmp_path: Path, tokenizer: Any) -> None:
    text = ENGLISH.read_text(encoding="utf-8").splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*text, *text]))
    for part in ({"test": 0.25}, {"folds": 4, "fold": 1}):
        dataset = load(tmp_path / "twice.jsonl", tokenizer, **part)
        assert len(dataset.test) == 10
        assert set(Counter(example.token_ids for example in dataset.test).values()) == {2}


def test_long_texts_stay_whole_beside_their_copies_and_a_part_in_common_is_logged(
    tmp_path: Path, tokenizer: Any, said: list[str]
) -> None:
    texts = [" ".join(f"{letter}{word}" for word in range(120)) for letter in "abcdefgh"]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*texts, *texts[:4]]))
    for fold in range(4):
        dataset = load(path, tokenizer, max_length=64, folds=4, fold=fold)
        assert {line % 8 for line in lines(dataset.train)}.isdisjoint(line % 8 for line in lines(dataset.test))
    said.clear()
    with_foot = [f"{letter} " * 40 + "the same foot of all " * 20 for letter in "abcdefgh"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in with_foot))
    assert load(path, tokenizer, max_length=40, test=0.25).test
    assert any("as parts of different texts; the test loss is in part" in line for line in said)


def test_what_belongs_together_is_on_one_side(patients: Path, tokenizer: Any) -> None:
    dataset = load(patients, tokenizer, validation=0.2, test=0.3, group_by="meta.patient")
    sides = [{(line - 1) // 2 for line in lines(part)} for part in (dataset.train, dataset.validation, dataset.test)]
    assert [len(side) for side in sides] == [5, 2, 3]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 10


def test_blanks_around_a_value_are_no_other_patient_or_label(tmp_path: Path, tokenizer: Any) -> None:
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    own = [
        {
            **row,
            "patient": f"{' ' * (at % 3)}P-{at // 4}{chr(0xA0) * (at % 2)}",
            "label": ["yes", " yes ", "no", "no\t"][at % 4],
        }
        for at, row in enumerate(rows)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, own)))
    dataset = load(path, tokenizer, validation=0.4, group_by="patient", stratify_by="label")
    sides = [{(line - 1) // 4 for line in lines(part)} for part in (dataset.train, dataset.validation)]
    assert [len(side) for side in sides] == [3, 2]
    assert sides[0].isdisjoint(sides[1])
    numbered = [{**row, "patient": [at // 4, f"{at // 4}", at / 4 // 1][at % 3]} for at, row in enumerate(rows)]
    path.write_text("\n".join(map(json.dumps, numbered)))
    dataset = load(path, tokenizer, validation=0.4, group_by="patient")
    sides = [{(line - 1) // 4 for line in lines(part)} for part in (dataset.train, dataset.validation)]
    assert sides[0].isdisjoint(sides[1]), "1, 1.0 and '1' are one patient"
    path.write_text("\n".join(json.dumps({**row, "patient": " "}) for row in rows))
    with pytest.raises(DataError, match="20 of 20 rows have no value there"):
        load(path, tokenizer, validation=0.4, group_by="patient")


def test_a_set_of_its_own_may_not_hold_a_group_that_is_trained_on(
    patients: Path, tmp_path: Path, tokenizer: Any
) -> None:
    row = json.loads(KOREAN.read_text(encoding="utf-8").splitlines()[0])
    (tmp_path / "other.jsonl").write_text(json.dumps({**row, "meta": {"patient": 4}}))
    for part in ("validation", "test"):
        with pytest.raises(
            DataError, match=rf"1 of 1 {part} rows have a meta.patient \(data.group_by\) that other rows"
        ):
            load(patients, tokenizer, **{part: str(tmp_path / "other.jsonl")}, group_by="meta.patient")


def test_a_validation_and_a_test_set_may_not_share_a_group(patients: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = [json.loads(line) for line in KOREAN.read_text(encoding="utf-8").splitlines()]
    for part, row in (("validation", rows[0]), ("test", rows[1]), ("without", {**rows[1], "meta": {}})):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"meta": {"patient": 99}, **row}))
    both = {part: str(tmp_path / f"{part}.jsonl") for part in ("validation", "test")}
    with pytest.raises(DataError, match=r"test.jsonl line 1, which has that of \S*validation.jsonl line 1. Take them"):
        load(patients, tokenizer, **both, group_by="meta.patient")
    with pytest.raises(DataError, match=r"1 of 1 rows have no value there; .* which has: meta, QUESTION, CONTEXTS"):
        load(patients, tokenizer, test=str(tmp_path / "without.jsonl"), group_by="meta.patient")


def test_labels_keep_their_share(patients: Path, tokenizer: Any) -> None:
    dataset = load(patients, tokenizer, validation=0.2, test=0.2, stratify_by="meta.label")
    for part in (dataset.validation, dataset.test):
        assert sum((line - 1) % 4 == 0 for line in lines(part)) == 1
        assert len(part) == 4


def test_a_column_that_is_not_in_every_row_is_refused_by_the_first(patients: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data.group_by is 'meta.pid', and 20 of 20 rows .* line 1, which has: QUEST"):
        load(patients, tokenizer, validation=0.2, group_by="meta.pid")
    with pytest.raises(DataError, match=r"data.stratify_by is 'nan', and 20 of 20 rows have no value there"):
        load(patients, tokenizer, validation=0.2, stratify_by="nan")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test": 1.5}, "test is 1.5; as a fraction it lies between 0 and 1"),
        ({"test_split": "test"}, "test_split is 'test', but test is none; expected the Hub id"),
        ({"validation": 0.5, "test": 0.5}, "validation 0.5 and test 0.5 leave no row to train on"),
        ({"folds": 5, "test": 0.1}, "the part that a fold holds out is its test; leave out test"),
        ({"fold": 1}, "fold is 1, but folds is none; expected a number below folds"),
        ({"folds": 5, "fold": 5}, "fold is 5, but folds is 5; expected a number below folds, counted from 0"),
        ({"group_by": "pid"}, "group_by is set, but nothing is held out"),
        ({"stratify_by": "label", "validation": "x.jsonl"}, "stratify_by is set, but nothing is drawn"),
        ({"identifier_patterns": ["("]}, "is not a regular expression"),
        ({"identifier_patterns": ["[A-Z]*"]}, "matches the empty text; expected a pattern of an identifier"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_evaluate_reads_test_rows_when_asked(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--data.validation", "0.2", "--data.test", "0.3", "--train.epochs", "1")
    assert train(*tiny_flags(tiny_model, run, *flags)) == 0
    said = run_here("launch/evaluate.py", run, "--part", "test")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    assert (found["rows"], found["held_out"]) == (6, True)
    assert found["data"].endswith("(data.test 0.3)")
    assert json.loads(run_here("launch/evaluate.py", run).stdout.splitlines()[-1])["rows"] == 4
    none = tmp_path / "none"
    assert train(*tiny_flags(tiny_model, none, "--data.test", "0.3", "--train.max_steps", "1")) == 0
    assert (
        "held no rows out; evaluate the others with --part test, or name" in run_here("launch/evaluate.py", none).stderr
    )
    both = run_here("launch/evaluate.py", run, "--part", "test", "--data.path", ENGLISH)
    assert (both.returncode, "leave out one of the two" in both.stderr) == (2, True)


def test_training_rows_of_one_label_are_said_to_need_no_oversampling(
    patients: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load(patients, tokenizer, validation=0.2, group_by="meta.label", oversample="meta.label")
    assert len({(line - 1) % 4 == 0 for line in lines(dataset.train)}) == 1
    assert len(dataset.train) == 15
    assert "data.oversample: all training rows have the label common, so none is taken more often" in caplog.text


def test_a_small_weight_leaves_a_source_at_least_one_row(tmp_path: Path, tokenizer: Any) -> None:
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()
    one.write_text(rows[0])
    many.write_text("\n".join(rows[1:]))
    paths = [{"path": str(one), "weight": 0.1}, {"path": str(many), "weight": 0.5}]
    assert len(load_dataset(DataConfig(path=paths), tokenizer, seed=1).train) == 11
