"""Questions of a file are read as they are answered: a few rows are held, in order, checked before a model loads."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here

from toolkit.config.schema import DataConfig
from toolkit.data import sources
from toolkit.data.questions import Questions
from toolkit.data.sources import Row
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import MOST_ROWS
from toolkit.tasks.sample import Sample


class Values(dict[str, Any]):
    """Values of a row that can be counted while they live."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most rows and samples alive at any time, once for each pass over the rows of a source."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: list[int] = []
    read = sources.iter_rows

    def counted(source: Any) -> Iterator[Row]:
        most.append(0)
        for row in read(source):
            values = Values(row.values)
            alive.add(values)
            most[-1] = max(most[-1], len(alive))
            yield Row(row.origin, values)

    monkeypatch.setattr("toolkit.commands.answers.iter_rows", counted)
    return most


def write(path: Path, count: int, **more: Any) -> Path:
    path.write_text("".join(json.dumps({"QUESTION": f"why {n}?", **more}) + "\n" for n in range(count)))
    return path


def count_samples() -> int:
    return sum(type(one) is Sample for one in gc.get_objects())


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answer without a model; the number of samples more than before that lived when each answer was given."""
    lived: list[int] = []
    gc.collect()
    before = count_samples()  # those of other tests

    class OneByOne:
        def in_order(self, samples: Iterable[tuple[int, Sample]]) -> Iterator[tuple[int, str]]:
            for row, sample in samples:
                if row % 100 == 0:
                    lived.append(count_samples() - before)
                yield row, f"answer to {sample.question}"

        def batches(self, samples: Iterable[tuple[int, Sample]]) -> Iterator[dict[int, str]]:
            for answer in self.in_order(samples):
                yield dict([answer])

        def report_control_tokens(self) -> None:
            pass

    monkeypatch.setattr("toolkit.commands.answers.make_answerer", lambda *_: OneByOne())
    monkeypatch.setattr("toolkit.commands.answers.open_model", lambda *_: None)
    return lived


@pytest.mark.parametrize("count", [300, 1200])
def test_as_many_rows_are_held_for_a_few_questions_as_for_many(
    tiny_model: Path, tmp_path: Path, living: list[int], answered: list[int], count: int
) -> None:
    path, output = write(tmp_path / "rows.jsonl", count, CONTEXTS=["c"]), tmp_path / "answers.jsonl"
    done = run_here("generate.py", tiny_model, "--input", path, "--output", output)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [
        {"QUESTION": f"why {n}?", "CONTEXTS": ["c"], "ANSWER": f"answer to why {n}?"} for n in range(count)
    ]
    check, passed = living
    assert check <= MOST_ROWS + 2
    assert passed <= 3
    assert len(answered) == count // 100
    assert max(answered) <= 4


def test_bad_rows_are_listed_before_a_model_loads_and_those_beyond_the_limit_are_not_asked(
    tiny_model: Path, tmp_path: Path, answered: list[int]
) -> None:
    path = write(tmp_path / "rows.jsonl", 4)
    path.write_text(path.read_text() + '{"QUESTION": ""}\n' * 12)
    done = run_here("generate.py", tiny_model, "--input", path)
    assert (done.returncode, answered) == (2, [])
    assert f"12 rows cannot be answered:\n  - {path} line 5 has an empty QUESTION" in done.stderr
    assert done.stderr.count("  - ") == 10
    done = run_here("generate.py", tiny_model, "--input", path, "--limit", 4)
    assert (done.returncode, done.stdout.count("A: answer to why")) == (0, 4)


def test_answers_may_take_the_place_of_the_questions(tiny_model: Path, tmp_path: Path, answered: list[int]) -> None:
    path = write(tmp_path / "rows.jsonl", 3)
    (tmp_path / "same.jsonl").symlink_to(path)
    done = run_here("generate.py", tiny_model, "--input", path, "--output", tmp_path / "same.jsonl", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["ANSWER"] for line in path.read_text().splitlines()] == [
        f"answer to why {n}?" for n in range(3)
    ]


def test_rows_that_change_between_check_and_answer_are_an_error() -> None:
    rows = [Row("line 1", {"QUESTION": "why?"})]
    questions = Questions(lambda: rows, DataConfig())
    for _ in range(2):
        assert [question.sample.question for question in questions] == ["why?"]
    rows[0] = Row("line 1", {"QUESTION": ""})
    with pytest.raises(DataError, match="line 1 has an empty QUESTION; expected text; the rows have changed since"):
        list(questions)


@pytest.mark.parametrize("later", [1, 3])
def test_rows_that_are_gone_or_new_since_the_check_are_an_error(later: int) -> None:
    rows = [Row("line", {"QUESTION": "why?"})] * 2
    questions = Questions(lambda: rows, DataConfig())
    rows[:] = rows[:1] * later
    with pytest.raises(DataError, match=f"{later} rows are there, and 2 were checked; the rows have changed since"):
        list(questions)
