"""Options of a question in the forms that people have, and answers that name one of them."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.config.schema import DataConfig
from toolkit.tasks.choose import choose_task, load_task
from toolkit.tasks.sample import RowFaultError, Sample


def read(row: dict[str, Any], task: Any = "auto") -> Sample:
    return choose_task(DataConfig(task=task), list(row)).read(row)


def test_a_number_stays_a_number_beside_options_that_are_numbers_once_the_task_says_where_they_begin() -> None:
    row = {"question": "몇 개인가?", "choices": ["3", "1", "2"], "answer": 1}
    assert read(row, {"name": "choice", "first_number": 1}).label == "A"
    assert read(row, {"name": "choice", "first_number": 0}).label == "B"
    assert read({**row, "choices": ["1", "2", "3"]}).label == "A"
    labels = {"name": "choice", "first_number": 1, "output": {"labels": ["0", "1"]}}
    assert read({"question": "q", "answer": 1}, labels).label == "1"


def test_empty_options_at_the_end_are_none_and_letters_as_keys_decide_the_order() -> None:
    row = {"question": "q", "A": "x", "B": "y", "C": "z", "answer": 3}
    for rest in ({"D": None, "E": float("nan")}, {"D": "", "E": " "}, {}):
        assert read({**row, **rest}).options == ("A", "B", "C")
    sample = read({"question": "q", "options": {"b": "y", "A": "x", "C": None}, "answer_idx": "A"}, "choice")
    assert "A. x\nB. y" in sample.turns[0].content
    assert (sample.label, sample.options) == ("A", ("A", "B"))


@pytest.mark.parametrize("stem", ["option_", "option", "Option ", "choice"])
def test_numbered_options_are_options_and_never_left_out(stem: str) -> None:
    row = {"question": "q", f"{stem}1": "x", f"{stem}2": "y", f"{stem}3": "", "answer": "2"}
    assert (read(row).answer, read(row).options) == ("B", ("A", "B"))


def test_a_test_set_of_choices_with_labels_is_recognised() -> None:
    choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
    assert read({"question": "q", "choices": choices, "answerKey": "C"}).answer == "C"


def test_a_chain_of_thought_is_not_proposed_as_contexts() -> None:
    columns = ["question", "A", "B", "answer", "cot"]
    assert load_task("choice").notes(columns) == ["no column contexts: the rows have no contexts"]


def test_letters_apart_name_the_option_in_composed_letters_whatever_is_normalised() -> None:
    row = {"question": "q", "A": "\u1100\u1161", "B": "나", "answer": "\u1100\u1161"}
    for normalize in ("nfc", "off"):
        for answer in ("\u1100\u1161", "가"):
            data = DataConfig(normalize=normalize)
            assert choose_task(data, list(row)).read({**row, "answer": answer}).label == "A"


LABELS = {"name": "choice", "output": {"labels": ["negative", "positive"]}, "columns": {"answer": "label"}}


def test_a_number_for_a_fixed_label_needs_to_be_said_where_numbers_begin() -> None:
    """A label of 1 is negative if they count from 1 and positive if from 0, as most files do: neither was asked."""
    row = {"question": "q", "label": 1}
    with pytest.raises(RowFaultError, match=r"has 1 in label, a number, and .* negative, positive; state first_number"):
        read(row, LABELS)
    assert read(row, {**LABELS, "first_number": 0}).label == "positive"
    assert read(row, {**LABELS, "first_number": 1}).label == "negative"
    assert read({**row, "label": "Positive"}, LABELS).label == "positive"
    assert read({**row, "label": "B"}, LABELS).label == "positive"
    assert read({**row, "label": 2}, {**LABELS, "output": {"labels": ["3", "2"]}}).label == "2"


@pytest.mark.parametrize(("marks", "answer"), [("012", "1"), ("CAB", "A"), ("가나다", "나"), ([1, 0, 2], 0)])
def test_an_answer_names_the_option_that_the_row_itself_calls_so(marks: Any, answer: Any) -> None:
    """As in ARC, whose labels are A to D, or 1 to 4, as each row says."""
    row = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": list(marks)}, "answerKey": answer}
    assert read(row).label == "B"
    assert read({**row, "choices": {"text": ["x", "y", "z"], "label": ["A", "A", "B"]}, "answerKey": "3"}).label == "C"
    listed = [{"label": mark, "text": text} for mark, text in zip(marks, "xyz", strict=True)]
    task = {"name": "choice", "columns": {"options": "choices[].text"}}
    assert read({**row, "choices": listed}, task).label == "B"
