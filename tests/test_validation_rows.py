"""Validation rows: held out by a fraction or from a set of their own, and never trained on without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, KOREAN, make_tokenizer

from toolkit.config.schema import DataConfig
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.runtime.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def load(path: Path, tokenizer: Any, **data: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **data), tokenizer, seed=1)


def test_a_validation_fraction_holds_out_rows_that_are_not_trained_on(tokenizer: Any) -> None:
    dataset = load(ENGLISH, tokenizer, validation=0.25)
    assert (len(dataset.train), len(dataset.validation)) == (15, 5)
    assert not {e.token_ids for e in dataset.train} & {e.token_ids for e in dataset.validation}
    again = load(ENGLISH, tokenizer, validation=0.25)
    assert again == dataset


def test_validation_rows_may_come_from_their_own_file(tokenizer: Any) -> None:
    dataset = load(ENGLISH, tokenizer, validation=str(KOREAN))
    assert (len(dataset.train), len(dataset.validation)) == (20, 64)


def test_rows_of_a_validation_set_that_are_trained_on_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "link.jsonl").symlink_to(ENGLISH)
    lines = ENGLISH.read_text(encoding="utf-8").splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join([KOREAN.read_text(encoding="utf-8").strip(), lines[3], lines[5]]))
    for path in (ENGLISH, tmp_path / "link.jsonl"):
        with pytest.raises(
            DataError, match=r"20 of 20 validation rows are training rows as well \(.* line 1 is .* line 1\)"
        ):
            load(ENGLISH, tokenizer, validation=str(path))
    with pytest.raises(DataError) as error:
        load(ENGLISH, tokenizer, validation=str(tmp_path / "some.jsonl"))
    assert (
        f"2 of 66 validation rows are training rows as well ({tmp_path}/some.jsonl line 65 is {ENGLISH} line 4)"
        in str(error.value)
    )
    assert "Take them out of one of the two" in str(error.value)


def test_rows_that_stand_twice_in_one_set_are_counted_where_a_fraction_parts_them(
    tmp_path: Path, tokenizer: Any, said: list[str]
) -> None:
    lines = ENGLISH.read_text(encoding="utf-8").splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, *lines]))
    dataset = load(tmp_path / "twice.jsonl", tokenizer, validation=0.25)
    assert (len(dataset.train), len(dataset.validation)) == (30, 10)
    assert "of 10 validation rows are training rows as well" in said[-1]
    assert "in part that of rows that are trained on" in said[-1]


@pytest.mark.parametrize("validation", [None, 0.1])
def test_a_split_of_no_validation_set_is_refused(validation: float | None) -> None:
    with pytest.raises(
        ValueError, match=r"validation_split is 'test', but validation is (none|0.1); expected the Hub id"
    ):
        DataConfig(validation=validation, validation_split="test")


def test_files_have_one_split_for_validation_too(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data.validation_split is 'test', but .* is a file"):
        load(ENGLISH, tokenizer, validation=str(KOREAN), validation_split="test")
