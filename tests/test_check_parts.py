"""Parts, counts and lengths of a data check are those of the run that it is a look ahead at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, make_tokenizer
from test_data_check import check

from toolkit.config.schema import DataConfig
from toolkit.data.dataset import load_dataset


@pytest.mark.parametrize("on_identifier", ["warn", "mask"])
def test_lengths_and_parts_are_those_of_training_whether_it_masks_or_not(
    tiny_model: Path, tmp_path: Path, on_identifier: Any
) -> None:
    rows = [{"QUESTION": f"why {at}?", "CONTEXTS": [], "LONG_ANSWER": f"answer {at}"} for at in range(10)]
    rows += [{**rows[0], "CONTEXTS": [f"010-0000-000{at}"]} for at in range(10)]  # identical where masked
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"on_identifier": on_identifier, "folds": 4, "fold": 1}
    found = check(tiny_model, path, **data)
    tokenizer = make_tokenizer()
    trained = load_dataset(DataConfig(path=str(path), validation=None, **data), tokenizer, 1)
    assert (found.rows["train"], found.rows["test"]) == (len(trained.train), len(trained.test))
    supervised = [int(part.supervised.sum()) for part in (trained.train, trained.test)]
    assert [found.lengths[part].supervised for part in ("train", "test")] == supervised
    assert [found.lengths[part].longest for part in ("train", "test")] == [
        int(part.lengths.max()) for part in (trained.train, trained.test)
    ]
    assert "0000" not in json.dumps(found.as_dict()).replace(str(tmp_path), "")


def test_what_max_length_cuts_is_counted_in_rows_and_tokens(tiny_model: Path) -> None:
    whole, cut = check(tiny_model, ENGLISH), check(tiny_model, ENGLISH, max_length=250)
    assert not whole.cut
    assert len(cut.cut) > 3
    assert cut.lengths == whole.lengths
    assert cut.cut_tokens == sum(int(found.what.split("which ")[1].split()[0]) for found in cut.cut) > 0


def test_rows_that_an_epoch_never_takes_are_left_out(tiny_model: Path) -> None:
    limited = {"limit": 5, "validation": 0.2}
    found = check(tiny_model, ENGLISH, **limited)
    trained = load_dataset(DataConfig(path=str(ENGLISH), **limited), make_tokenizer(), 42)
    assert found.rows == {"train": 5, "validation": 4, "test": 0}
    assert found.lengths["train"].supervised == int(trained.train.supervised.sum())
    assert found.lengths["train"].longest == int(trained.train.lengths.max())
    assert found.example_row in {row.origin for row in trained.train}
    assert found.notes[0].startswith("an epoch takes 5 rows of 16 to train on (data.limit")
    assert not check(tiny_model, ENGLISH, limit=20).notes


def test_rows_of_a_mixture_count_once_however_often_they_are_taken(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    rows = [{"QUESTION": f"why {n}?", "LONG_ANSWER": "a", "kind": "rare" if n == 3 else "usual"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [{"path": str(ENGLISH), "weight": 0.5}, {"path": str(path), "weight": 3}]
    found = check(tiny_model, named)
    assert found.rows["train"] == 10 + 4
    assert found.notes[0].startswith("an epoch takes 22 rows of 24 to train on")
    assert check(tiny_model, path, oversample="kind").notes[0].startswith("an epoch takes 6 rows of 4 to train on")
