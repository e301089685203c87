"""The keys of a recipe, and the flags of commands, that say which rows are read and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_files import ROWS, as_csv, as_jsonl, as_workbook
from helpers import make_tiny_model
from test_bad_input import run_main
from test_sources import put

from toolkit.config import flags
from toolkit.config.data_schema import DataConfig, PathEntry
from toolkit.config.recipe import build_config
from toolkit.planning.workload import read_workload
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.shipped import shipped_file


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"path": [{"path": "a", "weigth": 2}]}, "data.path.0.weigth: unknown key (did you mean data.path.0.weight?)"),
        ({"path": [{"path": "a", "weight": 0}]}, "data.path.0.weight is 0; expected greater than 0"),
        ({"path": [{"weight": 2}]}, "data.path.0.path is missing"),
        ({"path": []}, "data.path is []; expected List should have at least 1 item"),
        ({"path": 3}, "data.path is 3; expected text, or a mapping with path and weight"),
        ({"path": [["a"]]}, "data.path.0 is ['a']; expected text, or a mapping with path and weight"),
        ({"validation": [{"path": "a", "weight": 2}]}, "each held-out row counts once, so leave it out"),
        ({"validation": [1]}, "data.validation.0 is 1; expected text"),
        ({"separator": "ab"}, "separator is 'ab'; expected one character, or tab"),
        ({"limit": 0}, "data.limit is 0; expected greater than or equal to 1"),
        ({"max_samples": 5}, "data.max_samples: unknown key (did you mean data.limit?)"),
        ({"subset": "x"}, "data.subset: unknown key (did you mean data.name?)"),
        ({"class_weights": [1]}, "data.oversample takes rows of rare labels more often"),
    ],
)  # fmt: skip
def test_a_fault_of_a_source_is_told_once(data: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config({"data": data}, "recipe")
    assert len(error.value.faults) == 1
    assert fault in error.value.faults[0]


@pytest.mark.parametrize(
    ("words", "path", "validation"),
    [
        (["--data.path", "a"], "a", 0.1),
        (["--data.path", "[odd].jsonl"], "[odd].jsonl", 0.1),
        (["--data.path", "a", "b"], ["a", "b"], 0.1),
        (["--data.path", "{path: a, weight: 2}", "b"], [PathEntry(path="a", weight=2), "b"], 0.1),
        (["--data.path", "{path: a}"], [PathEntry(path="a")], 0.1),
        (["--data.validation", "none"], DataConfig().path, None),
        (["--data.validation", "0.3"], DataConfig().path, 0.3),
        (["--data.validation", "v"], DataConfig().path, "v"),
        (["--data.validation", "v", "w"], DataConfig().path, ["v", "w"]),
    ],
)
def test_flags_name_one_source_or_several(words: list[str], path: Any, validation: Any) -> None:
    parsed = flags.parse(flags.create_parser(""), shipped_file("recipes/quickstart.yaml"), words).config.data
    assert (parsed.path, parsed.validation) == (path, validation)


def test_a_plan_reads_the_rows_of_a_mixture(tmp_path: Path) -> None:
    data = {"path": [{"path": put(tmp_path / "a.jsonl", as_jsonl()), "weight": 2}, put(tmp_path / "b.csv", as_csv())]}
    model = {"name_or_path": str(make_tiny_model(tmp_path / "model"))}
    lengths = read_workload(build_config({"data": data, "model": model}, "recipe"), None).lengths
    assert lengths is not None
    assert len(lengths) == 18
    gone = build_config({"data": {"path": "nowhere.jsonl"}, "model": model}, "recipe")
    assert "the data was not read: nowhere.jsonl: no such file" in read_workload(gone, None).source


@pytest.mark.parametrize("flag", ["split", "name", "revision", "encoding", "separator", "sheet"])
def test_a_flag_of_rows_goes_with_rows(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for script, words, message in (
        ("evaluate", [f"--data.{flag}", "x"], f"--data.{flag} goes with --data.path"),
        ("generate", ["--question", "q", f"--{flag}", "x"], f"--{flag} goes with --input"),
    ):
        assert run_main(monkeypatch, script, "model", *words) == 2
        assert message in capsys.readouterr().err


def test_evaluate_and_generate_read_what_the_flags_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(make_tiny_model(tmp_path / "model"))
    cells = [list(ROWS[0]), *([row["QUESTION"], "", row["LONG_ANSWER"]] for row in ROWS[:2])]
    book = put(tmp_path / "d" / "book.xlsx", as_workbook({"안내": [["x"], ["y"]], "자료": cells}))
    assert run_main(monkeypatch, "evaluate", model, "--data.path", book, "--data.sheet", "자료") == 0
    assert "of 2 rows" in capsys.readouterr().out
    text = put(tmp_path / "q.csv", as_csv("\t").encode("utf-16-le"))
    words = ["--separator", "tab", "--encoding", "utf-16", "--max-new-tokens", "2", "--limit", "2"]
    assert run_main(monkeypatch, "generate", model, "--input", text, *words) == 0
    assert ROWS[1]["QUESTION"] in capsys.readouterr().out
    assert run_main(monkeypatch, "evaluate", model, "--data.path", text, "--data.separator", "ab") == 2
    assert "the separator is 'ab'; expected one character, or tab" in capsys.readouterr().err
