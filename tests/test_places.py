"""Directories, patterns, saved sets and mixtures: which files are read, of which split, and how often each row."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_files import READ, ROWS, as_csv, as_jsonl, as_zip
from helpers import ENGLISH, make_tokenizer, run_here, tiny_flags
from test_sources import put, with_lists

from toolkit.config.schema import DataConfig
from toolkit.data.column_text import column_text, label_of
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.mixture import draw_rows
from toolkit.data.readers.places import place_of_pattern
from toolkit.data.readers.row import ReadOptions
from toolkit.data.sources import Source, iter_rows, read_rows, sources_of, task_of
from toolkit.runtime.errors import DataError


def test_a_directory_is_its_files_in_order_without_hidden_ones_and_what_describes_them(tmp_path: Path) -> None:
    put(tmp_path / "d" / "sub" / "1.jsonl", as_jsonl(ROWS[3:]))
    put(tmp_path / "d" / "0.JSONL.gz", READ["rows.jsonl.gz"])
    put(tmp_path / "d" / "empty.jsonl", "")
    for name in (
        "README.md",
        ".hidden.jsonl",
        "_SUCCESS",
        ".git/x.jsonl",
        "dataset_infos.json",
        "LICENSE.txt",
        "~$0.jsonl",
    ):
        put(tmp_path / "d" / name, "{}")
    source = Source(str(tmp_path / "d"))
    assert with_lists(list(iter_rows(source))) == [*ROWS, *ROWS[3:]]
    assert [file.name for file in source.files] == ["0.JSONL.gz", "empty.jsonl", "1.jsonl"]


def test_links_are_followed_once_and_a_file_by_two_names_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "rows.jsonl", as_jsonl())
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "again.jsonl").symlink_to(tmp_path / "elsewhere" / "rows.jsonl")
    assert with_lists(read_rows(str(tmp_path / "d"))) == ROWS


@pytest.mark.parametrize(("written", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_found_in_any_unicode_form(tmp_path: Path, written: str, asked: str) -> None:
    """A Mac writes decomposed names, and a recipe holds what a keyboard gives."""
    there, meant = (str(tmp_path / unicodedata.normalize(form, "결과/환자")) for form in (written, asked))
    put(Path(f"{there}.jsonl"), as_jsonl())
    for path in (f"{meant}.jsonl", f"{meant}*.jsonl", str(Path(meant).parent), f"{Path(meant).parent}/*"):
        assert with_lists(read_rows(path)) == ROWS, path
    folder = unicodedata.normalize(asked, "결과")
    assert with_lists(list(iter_rows(Source(str(tmp_path), configuration=folder)))) == ROWS
    config = DataConfig(path=[{"path": f"{there}.jsonl", "task": "text"}])
    assert task_of(config, f"{meant}.jsonl") == "text", "it is the file that the recipe names"


def test_a_folder_that_is_there_is_no_part_of_a_pattern(tmp_path: Path) -> None:
    put(tmp_path / "d[12]" / "rows.jsonl", as_jsonl())
    put(tmp_path / "d1" / "other.jsonl", as_jsonl(ROWS[:1]))
    for pattern in ("d[12]/*.jsonl", "d[12]/**", "./d[12]//*", "d?12]/*"):
        assert with_lists(read_rows(f"{tmp_path}/{pattern}")) == ROWS, pattern
    assert with_lists(read_rows(str(tmp_path / "d[13]/*"))) == ROWS[:1]
    with pytest.raises(DataError, match="matches no file"):
        read_rows(f"{tmp_path}/d*/*/")


@pytest.mark.parametrize("name", ["train-00001-of-00003.jsonl", "b.csv.gz", "more"])
def test_a_link_to_what_is_not_there_is_named_and_no_row_lost_in_silence(tmp_path: Path, name: str) -> None:
    put(tmp_path / "d" / "train-00000-of-00003.jsonl", as_jsonl(ROWS[:2]))
    put(tmp_path / "d" / "train-00002-of-00003.jsonl", as_jsonl(ROWS[2:]))
    (tmp_path / "d" / name).symlink_to(tmp_path / "nowhere")
    for path in ("d", "d/*"):
        with pytest.raises(DataError, match=f"{name} is a link to .*/nowhere, which cannot be reached; restore"):
            read_rows(str(tmp_path / path))


def test_a_link_that_holds_no_rows_may_lead_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "d" / "rows.jsonl", as_jsonl())
    for name in ("README.md", ".hidden.jsonl"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "nowhere")
    assert with_lists(read_rows(str(tmp_path / "d"))) == ROWS


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl.gz"), "train-00001-of-00003 is not there"),
        (("a-1-of-3.jsonl", "a-3-of-3.jsonl"), "a-2-of-3 is not there"),
        (("x/rows_00001_of_00002.jsonl",), "rows_00000_of_00002 or .*rows_00002_of_00002 is not there"),
        (("00000-of-00003.jsonl", "00000-of-00003.txt.part"), "00001-of-00003, 00002-of-00003 are not there"),
    ],
)
def test_a_numbered_file_that_is_missing_is_named(tmp_path: Path, names: tuple[str, ...], missing: str) -> None:
    files = {name: READ["rows.jsonl.gz" if name.endswith("gz") else "rows.jsonl"] for name in names}
    for name, written in files.items():
        put(tmp_path / "d" / name, written)
    put(tmp_path / "d.zip", as_zip(files))
    for path in ("d", "d.zip", "d/**/*.jsonl*"):
        with pytest.raises(
            DataError, match=f"{missing}, and other files are numbered .* or name the files to read one"
        ):
            read_rows(str(tmp_path / path))


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001-a09b74b3ef9c3b56.jsonl", "test-00000-of-00002.jsonl"),
        tuple(f"rows-{number}-of-12.jsonl" for number in range(1, 13)),
        ("visit-3-of-10.jsonl",),
    ],
)
def test_numbered_files_that_are_all_there_are_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        put(tmp_path / name, as_jsonl())
    assert len(read_rows(str(tmp_path))) == 6 * sum(not name.startswith("test") for name in names)


def test_a_pattern_may_take_some_of_numbered_files(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"train-0000{number}-of-00003.jsonl", as_jsonl(ROWS[number : number + 1]))
    assert with_lists(read_rows(str(tmp_path / "train-0000[12]*"))) == ROWS[1:3]
    (tmp_path / "train-00000-of-00003.jsonl").unlink()
    with pytest.raises(DataError, match="train-00000-of-00003 or train-00003-of-00003 is not there"):
        read_rows(str(tmp_path / "train-*.jsonl"))


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl", "dev.jsonl"),
        ("data/Train-00000-of-00001.jsonl", "data/TEST-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("training/a.jsonl", "testing/a.jsonl", "val/a.jsonl"),
        ("my_train_set.jsonl", "my_test_set.jsonl", "my_valid_set.jsonl"),
        ("학습.jsonl", "평가.jsonl", "검증.jsonl"),
        ("진료_훈련용데이터.jsonl", "시험-00000-of-00001.jsonl", "검증셋1.jsonl"),
        ("학습데이터/a.jsonl", "테스트/a.jsonl", unicodedata.normalize("NFD", "검증") + "/a.jsonl"),
    ],
)
def test_files_and_folders_named_after_splits_are_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        put(tmp_path / name, as_jsonl(ROWS[number : number + 1]))
    put(tmp_path / "all.zip", as_zip({name: as_jsonl(ROWS[n : n + 1]) for n, name in enumerate(names)}))
    for path in (tmp_path / "all.zip", tmp_path):
        if path == tmp_path:
            (tmp_path / "all.zip").unlink()
        for number, split in enumerate(("train", "test", "validation")):
            assert with_lists(read_rows(str(path), split)) == [ROWS[number]]
        assert with_lists(read_rows(str(path))) == [ROWS[0]]
        assert with_lists(read_rows(str(path), default_split="validation")) == [ROWS[2]]
        with pytest.raises(DataError, match=r"has no split 'nope'; set data\.split to one of: test, train, validation"):
            read_rows(str(path), "nope")


class WindowsName(zipfile.ZipInfo):
    """A member whose name is written in an encoding that no flag tells, as Windows and macOS do."""

    encoding = "cp949"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(self.encoding), 0


@pytest.mark.parametrize("encoding", ["cp949", "utf-8", "shift_jis"])
def test_members_are_told_apart_by_their_names_in_any_encoding(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "frostline")
    monkeypatch.setattr(WindowsName, "encoding", encoding)
    names = ("감염", "간염", "폐렴") if encoding != "shift_jis" else ("肝炎", "肺炎", "感染")
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        for at, name in enumerate(sorted(names)):
            archive.writestr(WindowsName(f"{name}.jsonl"), as_jsonl(ROWS[at : at + 1]))
    found = read_rows(str(tmp_path / "rows.zip"))
    assert sorted(map(str, with_lists(found))) == sorted(map(str, ROWS[:3]))
    if encoding != "shift_jis":
        assert f"{tmp_path}/rows.zip:간염.jsonl line 1" in [row.origin for row in found]
        assert "감염.jsonl" in caplog.text


def test_members_whose_names_differ_in_a_mark_or_far_from_their_end_are_two_files(tmp_path: Path) -> None:
    for at, names in enumerate((("진료:1", "진료;1", "진료[1]"), ("가" * 210 + "/1", "나" * 210 + "/1", "a\x1b[1m"))):
        members = {f"{name}.jsonl": as_jsonl(ROWS[n : n + 1]) for n, name in enumerate(names)}
        found = read_rows(put(tmp_path / f"{at}.zip", as_zip(members)))
        assert len(found) == 3
        assert not any("\x1b" in row.origin for row in found)


def test_custom_splits_are_those_of_sharded_names(tmp_path: Path) -> None:
    for number, split in enumerate(("pqa_a", "pqa_b")):
        put(tmp_path / f"{split}-00000-of-00001.jsonl", as_jsonl(ROWS[number : number + 1]))
    assert with_lists(read_rows(str(tmp_path), "pqa_b")) == [ROWS[1]]
    with pytest.raises(DataError, match=r"has the splits pqa_a, pqa_b, and data\.split names none"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("a.jsonl", "b.csv"), r"several formats \(.csv, .jsonl\).*name those to read, such as .*/\*\.jsonl"),
        (("a.csv", "a.csv.gz"), "have one name, so they may be the same rows"),
        (("train.jsonl", "more.jsonl"), "more.jsonl belongs to no split, and other files belong to train"),
        (("README.md", "run.py"), r"holds no data file \(README.md, run.py\)"),
        ((), r"holds no data file \(nothing\)"),
        (("a.xls", "b.jsonl.7z"), "holds no data file"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        put(tmp_path / "d" / name, READ["rows.csv.gz" if name.endswith("gz") and False else "rows.jsonl"])
    (tmp_path / "d").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / "d"))


def test_a_file_has_one_split_and_a_directory_without_named_files_too(tmp_path: Path) -> None:
    put(tmp_path / "d" / "rows.jsonl", as_jsonl())
    assert len(read_rows(str(tmp_path / "d"), "train")) == 6
    with pytest.raises(DataError, match=r"no file of .* is named after a split; leave data\.split out"):
        read_rows(str(tmp_path / "d"), "test")
    with pytest.raises(DataError, match="is a file, and files have one split only: train"):
        read_rows(str(tmp_path / "d" / "rows.jsonl"), "test")


def test_a_pattern_is_the_files_that_it_matches(tmp_path: Path) -> None:
    put(tmp_path / "d" / "a.jsonl", as_jsonl(ROWS[:2]))
    put(tmp_path / "d" / "deep" / "b.jsonl", as_jsonl(ROWS[2:]))
    put(tmp_path / "d" / "a.csv", as_csv())
    assert with_lists(read_rows(str(tmp_path / "d" / "*.jsonl"))) == ROWS[:2]
    assert with_lists(read_rows(str(tmp_path / "d" / "**" / "*.jsonl"))) == ROWS
    assert with_lists(read_rows(put(tmp_path / "odd[1].jsonl", as_jsonl()))) == ROWS
    with pytest.raises(DataError, match="matches no file"):
        read_rows(str(tmp_path / "*.parquet"))


def test_a_saved_set_and_its_splits_are_read(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": whole, "test": whole.select([5, 4])}).save_to_disk(str(tmp_path / "both"))
    assert with_lists(read_rows(str(tmp_path / "one"))) == ROWS
    assert len(Source(str(tmp_path / "one")).files) == 2
    assert with_lists(read_rows(str(tmp_path / "both"), "test")) == [ROWS[5], ROWS[4]]
    assert with_lists(read_rows(str(tmp_path / "both" / "test"))) == [ROWS[5], ROWS[4]]
    assert len(read_rows(str(tmp_path / "both"))) == 6
    with pytest.raises(DataError, match=r"has no split 'x'; set data\.split to one of: train, test"):
        read_rows(str(tmp_path / "both"), "x")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"not a readable directory of Dataset\.save_to_disk"):
        read_rows(str(tmp_path / "one"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved set of splits, with what ``map`` keeps beside them; its splits alone lie in another folder."""
    whole = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict({"train": whole, "pqa": whole.select([1])})
    both.save_to_disk(str(tmp_path / "up" / "both"), num_shards={"train": 3, "pqa": 1})
    train = tmp_path / "up" / "both" / "train"
    loaded = datasets.load_from_disk(str(train))
    loaded.map(lambda row: {"CONTEXTS": ["x"]}, cache_file_name=str(train / "cache-0123456789abcdef.arrow"))
    shutil.copy(train / "cache-0123456789abcdef.arrow", train / "tmpab12cd34.arrow")
    shutil.copytree(train, tmp_path / "alone" / "train")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "split"),
    [("up", "train"), ("up", "pqa"), ("up/both", "train"), ("up/both", "pqa"), ("alone", "train"),
     ("up/both/train", "train"), ("up/both/train/*.arrow", "train"), ("alone/**/*.arrow", "train")],
)  # fmt: skip
def test_caches_beside_a_saved_set_are_no_rows_and_its_splits_are_read_from_anywhere(
    saved: Path, path: str, split: str
) -> None:
    expected = ROWS if split == "train" else [ROWS[1]]
    assert with_lists(read_rows(str(saved / path), split)) == expected
    assert not any(file.name.startswith(("cache", "tmp")) for file in Source(str(saved / path), split).files)
    if "*" not in path:
        archive = shutil.make_archive(str(saved / "zipped"), "zip", saved / path)
        assert with_lists(read_rows(archive, split if path.startswith("up") and path != "up/both/train" else None)) == (
            expected
        )


def test_a_cache_is_left_out_also_where_no_state_names_the_files(saved: Path) -> None:
    (saved / "alone" / "train" / "state.json").unlink()
    assert with_lists(read_rows(str(saved / "alone"))) == ROWS


@pytest.mark.parametrize("path", ["up", "alone", "up/both/train"])
def test_a_file_of_a_saved_set_that_is_not_there_is_named(saved: Path, path: str) -> None:
    next((saved / path).rglob("data-00001-of-00003.arrow")).unlink()
    with pytest.raises(DataError, match=r"train/data-00001-of-00003\.arrow"):
        read_rows(str(saved / path), "train")
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow is not there, and state\.json beside it"):
        read_rows(shutil.make_archive(str(saved / "zipped"), "zip", saved / path))


def test_a_name_is_a_folder_of_a_directory(tmp_path: Path) -> None:
    put(tmp_path / "labeled" / "train.jsonl", as_jsonl(ROWS[:1]))
    put(tmp_path / "artificial" / "train.jsonl", as_jsonl(ROWS[1:]))
    assert with_lists(list(iter_rows(Source(str(tmp_path), configuration="labeled")))) == ROWS[:1]
    with pytest.raises(DataError, match=r"data\.name is 'x', but .* set it to one of: artificial, labeled"):
        list(iter_rows(Source(str(tmp_path), configuration="x")))


def load(**data: Any) -> Dataset:
    return load_dataset(DataConfig.model_validate(data), make_tokenizer(), seed=1)


def questions(dataset: Dataset, part: str = "train") -> Counter[str]:
    return Counter(example.origin.rpartition("/")[2] for example in getattr(dataset, part))


@pytest.fixture
def two(tmp_path: Path) -> list[dict[str, Any]]:
    many = [{**ROWS[0], "QUESTION": f"질문 {n}", "LABEL": "yes" if n % 4 else "no"} for n in range(40)]
    few = [{**ROWS[0], "QUESTION": f"물음 {n}", "label": "maybe"} for n in range(4)]
    return [
        {"path": put(tmp_path / "many.jsonl", as_jsonl(many)), "weight": 0.5},
        {"path": put(tmp_path / "few.csv", as_csv(rows=few)), "weight": 2.25},
    ]


def test_weights_say_how_often_rows_are_taken(two: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "frostline")
    dataset = load(path=two)
    counts = questions(dataset)
    assert sorted(count for name, count in counts.items() if "many" in name) == [1] * 20
    assert sorted(count for name, count in counts.items() if "few" in name) == [2, 2, 2, 3]
    assert "many.jsonl: an epoch takes 20 rows of 40 (weight 0.5)" in caplog.text
    assert "few.csv: an epoch takes 9 rows of 4 (weight 2.25)" in caplog.text
    assert load(path=two).fingerprint == dataset.fingerprint
    assert (
        load_dataset(DataConfig.model_validate({"path": two}), make_tokenizer(), 2).fingerprint != dataset.fingerprint
    )


def test_a_list_of_paths_is_all_their_rows_in_order(two: list[dict[str, Any]]) -> None:
    dataset = load(path=[two[1]["path"], two[0]["path"]])
    assert [example.origin.rpartition("/")[2].split()[0] for example in dataset.train] == ["few.csv"] * 4 + [
        "many.jsonl"
    ] * 40


def test_rows_are_held_out_before_any_is_taken_twice(
    two: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "frostline")
    dataset = load(path=two, validation=0.25, oversample="label")
    validation, train = questions(dataset, "validation"), questions(dataset)
    assert set(validation.values()) == {1}
    assert len(validation) == 11
    assert not validation.keys() & train.keys()
    assert "data.oversample: training rows by label were maybe" in caplog.text
    assert validation == questions(load(path=two, validation=0.25), "validation")


def test_a_limit_takes_some_rows_and_a_larger_one_the_same_and_more(two: list[dict[str, Any]]) -> None:
    path = two[0]["path"]
    five, ten = (questions(load(path=path, limit=limit)) for limit in (5, 10))
    assert (len(five), len(ten)) == (5, 10)
    assert five.keys() < ten.keys()
    assert questions(load(path=path, limit=100)) == questions(load(path=path))
    held_out = load(path=path, limit=5, validation=0.5)
    assert (len(held_out.train), len(held_out.validation)) == (5, 20)


def test_labels_are_as_frequent_as_the_most_frequent(two: list[dict[str, Any]]) -> None:
    labels = ["yes"] * 6 + ["no"] * 2 + [None, "maybe"]
    drawn = list(draw_rows([0] * 10, [1.0], labels, None, 7))
    assert Counter(labels[row] for row in drawn) == {"yes": 6, "no": 6, "maybe": 6, None: 1}
    assert Counter(drawn)[6] == Counter(drawn)[7] == 3
    assert drawn == sorted(drawn) == list(draw_rows([0] * 10, [1.0], labels, None, 7))
    assert list(draw_rows([0] * 3, [1.0], None, None, 7)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"oversample": "nope"}, r"data\.oversample is 'nope', but a row has no such column; it has QUESTION"),
        ({"oversample": "QUESTION"}, "has 44 different values in 44 rows; expected a column of a few labels"),
        ({"oversample": "CONTEXTS"}, "but a row has a list there; expected a label"),
        ({"oversample": "LONG_ANSWER"}, r"has 1 value\(s\); expected at least 2"),
    ],
)
def test_a_column_that_holds_no_labels_is_refused(
    two: list[dict[str, Any]], data: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(path=two, **data)


def test_labels_are_found_in_any_case_and_blank_ones_are_none() -> None:
    assert label_of({"Final_Decision": " yes "}, "final_decision") == "yes"
    assert [label_of({"a": value}, "a") for value in ("", None, float("nan"), 3)] == [None, None, None, "3"]


def test_values_that_read_the_same_are_one_group_label_or_stratum() -> None:
    """Else a patient of two files stands on both sides of a split."""
    whole, parts = "부천", unicodedata.normalize("NFD", "부천")
    assert (
        column_text({"병원": parts}, "병원")
        == whole
        == column_text({unicodedata.normalize("NFD", "병원"): whole}, "병원")
    )
    assert {column_text({"n": value}, "n") for value in (7, 7.0, "7.0", " 7 ")} == {"7"}
    assert {label_of({"n": value}, "n") for value in (7, 7.0, "7.0", " 7 ")} == {"7"}
    assert (
        column_text({"meta": {"Patient": "a"}}, "Meta.patient")
        == "a"
        == column_text({"meta.patient": "a"}, "meta.patient")
    )
    assert column_text({"Patient": 1, "PATIENT": 2}, "patient") is None, "it is not clear which"
    with pytest.raises(DataError, match="no such column; it has Patient, PATIENT"):
        label_of({"Patient": 1, "PATIENT": 2}, "patient")


def test_what_was_read_is_recorded(two: list[dict[str, Any]], tmp_path: Path) -> None:
    dataset = load(path=two[0]["path"], validation=[two[1]["path"]])
    dataset.save_sources(tmp_path / "data_files.json")
    recorded = json.loads((tmp_path / "data_files.json").read_text())
    assert [(part["for"], part["files"][0]["path"]) for part in recorded] == [
        ("train", os.path.realpath(two[0]["path"])), ("validation", os.path.realpath(two[1]["path"])),
    ]  # fmt: skip
    assert recorded[0]["files"][0]["bytes"] == os.path.getsize(two[0]["path"])  # noqa: PTH202


def test_the_sources_of_a_recipe_have_its_options() -> None:
    config = DataConfig.model_validate(
        {
            "path": ["org/a", {"path": "org/b", "name": "own", "split": "s", "weight": 3}], "name": "n",
            "revision": "r", "split": "t", "encoding": "cp949", "separator": "tab", "sheet": "자료",
            "validation": ["org/a", {"path": "org/c"}], "validation_split": "v",
        }
    )  # fmt: skip
    first, second = sources_of(config, "train")
    assert (first.name, first.revision, first.weight, first.options.separator) == ("org/a:n[t]", "r", 1, "\t")
    assert (second.name, second.revision, second.weight) == ("org/b:own[s]", "r", 3)
    own, other = sources_of(config, "validation")
    assert (own.name, own.revision, own.key) == ("org/a:n[v]", "r", "data.validation_split")
    assert (other.name, other.revision, other.default_split) == ("org/c[v]", None, "validation")
    assert sources_of(config, "test") == []


def test_a_pattern_that_takes_long_says_what_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = threading.Event()
    caplog.handler.addFilter(lambda record: "waiting for the names that" not in record.getMessage() or not said.set())

    def endless(pattern: str, recursive: bool) -> list[str]:
        assert said.wait(60)
        return []

    monkeypatch.setattr("toolkit.runtime.signals._SAY_SECONDS", 0.0)
    monkeypatch.setattr("glob.glob", endless)
    with pytest.raises(DataError, match="matches no file"), caplog.at_level("WARNING", "frostline"):
        place_of_pattern("/**/*.jsonl", None, "data.split", "train", ReadOptions())
    assert "still waiting for the names that /**/*.jsonl matches" in caplog.text


def test_a_name_that_is_not_utf_8_is_written_down_as_text(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    shutil.copy(ENGLISH, os.fsencode(tmp_path / "rows") + b"/\xff.jsonl")
    done = run_here("train.py", *tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 1,
                                            "--data.path", tmp_path / "rows"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    [source] = json.loads((tmp_path / "run" / "data_files.json").read_text(encoding="utf-8"))
    assert source["files"][0]["path"].endswith("/rows/\\xff.jsonl")
