"""Lists that were printed into a table's field come back text by text, or the row says why they cannot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.sources import read_rows
from toolkit.tasks.choose import load_task
from toolkit.tasks.printed_lists import PrintedListError, parse_printed_list
from toolkit.tasks.sample import RowFaultError

read = load_task("pubmedqa").read


def as_array(texts: list[str]) -> Any:
    array = numpy.empty(len(texts), dtype=object)
    array[:] = texts
    return array


FORMS: dict[str, Callable[[list[str]], str]] = {
    "python": str,
    "tuple": lambda texts: str(tuple(texts)),
    "json": lambda texts: json.dumps(texts),
    "json in unicode": lambda texts: json.dumps(texts, ensure_ascii=False, indent=1),
    "numpy": lambda texts: str(as_array(texts)),
    "numpy of strings": lambda texts: f"[{', '.join(f'np.str_({text!r})' for text in texts)}]",
    "array": lambda texts: repr(as_array(texts)),
    "dict": lambda texts: str({"contexts": texts, "labels": ["A"]}),
    "dict of arrays": lambda texts: str({"contexts": as_array(texts), "labels": as_array(["A"])}),
}
TEXT = st.text(
    st.sampled_from("'\"\\[](){},:; \n\tabn…가😀\x00") | st.characters(exclude_categories=["Cs"]), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXT, max_size=6), form=st.sampled_from(sorted(FORMS)))
def test_what_was_printed_is_read_back_exactly(texts: list[str], form: str) -> None:
    table = io.StringIO(newline="")
    csv.writer(table).writerow([FORMS[form](texts)])
    ((field,),) = csv.reader(io.StringIO(table.getvalue(), newline=""), strict=True)
    found = parse_printed_list(field)
    assert (found["contexts"] if isinstance(found, dict) else found) == texts


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=2, max_size=5), cut=st.integers(1, 10_000), form=st.sampled_from(["python", "numpy"])
)
def test_a_list_that_was_cut_off_is_never_a_shorter_one(texts: list[str], cut: int, form: str) -> None:
    whole = FORMS[form](texts)
    shorter = whole[: 1 + cut % (len(whole) - 1)]
    try:
        found = parse_printed_list(shorter)
    except PrintedListError:
        return
    assert found == shorter


@pytest.mark.parametrize(
    "text",
    [
        "[1] Fever is common.",
        "[BACKGROUND] One. [CONCLUSION] Two.",
        "['Tis the season] for colds, isn't it",
        '["Aspirin" was given] and it helped',
        '["Aspirin" versus "placebo" in colds]',
        '["Aspirin" versus "placebo"]',
        '("quoted") words (in brackets)',
        "('one')",
        "{x in R} is 'open'",
        "['a'] is a list of one",
        "a; b",
        '("A군", "B군")을 비교하였다. 차이는 없다.',
        "['위약', '아스피린'] 두 군을 비교하였다.",
        '{"key": "value"} 형식의 응답을 받았다.',
        "['a', 'b'] are the groups.",
        'c("x") makes a vector.',
        'c("x", "y")는 벡터를 만든다.',
        'print("hello")',
        'read_csv("x.csv", sep=",")',
        "[“Aspirin”] was given",
        "(“A군”, “B군”)을 비교하였다.",
        "[“A”, said one, “B”] and more",
        "[r for r in rows] is a list",
        "shape: round; Series: none",
    ],
)
def test_prose_that_begins_like_a_list_stays_text(text: str) -> None:
    assert parse_printed_list(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("['a' 'b' ... 'y' 'z']", "was shortened with … when it was printed"),
        ("['a' 'b', 'c']", "separates some texts by commas and others by blanks"),
        ("['a''b']", "quotes in a text escaped"),
        ("('a' 'b')", "one text to Python"),
        ("['don't', 'b']", "quotes in a text escaped"),
        ('[\n  "a "q" z",\n  "b"\n]', "quotes in a text escaped"),
        ("{'a', 'b'}", "is a set"),
        ('{"a b",c}', "is a set"),
        ("['x, y', z]", "has 'z' where a text is expected"),
        ("[b'a', b'b']", "holds bytes"),
        ("['\\alpha', 'b']", r"has '\\\\a' in a text"),
        ("Index(['a', 'b'], dtype='str')", "is printed as Index"),
        ("<ArrowStringArray>\n['a', 'b']\nLength: 2, dtype: str", "where a text is expected"),
        ("['a', 'b'] and more", "is followed by 'and more'"),
        ("['a'], ['b']", "is followed by"),
        ("['a'; 'b']", "expected a comma or a blank"),
        ("['a', 'b", "was cut off"),
        ("['only one, and lo", "was cut off"),
        ("0    a\n1    b\ndtype: object", "is a printed pandas Series"),
        ("0    a\n1    b\nName: CONTEXTS, dtype: str", "is a printed pandas Series"),
        ("['a long context of the row, which is no name', 'b'] and this.", "is followed by 'and this.'"),
        ("0    a\n1    b\nName: c, dtype: category\nCategories (2, object): ['a', 'b']", "is a printed pandas Series"),
        ('shape: (2,)\nSeries: \'\' [str]\n[\n\t"a"\n\t"b"\n]', "is a printed polars Series"),
        ('c("a", "b")', r"is printed as c\(…\)"),
        ('c(x = "a", y = "b")', r"is printed as c\(…\)"),
        ('c("a", "b"), c("d")', r"is printed as c\(…\)"),
        ('c("a", "b', r"is printed as c\(…\)"),
        ('list("a", "b")', r"is printed as list\(…\)"),
        ("array('a', 'b')", r"is printed as array\(…\)"),
        ('String["a", "b"]', r"is printed as String\[…\]"),
        ('Any["a", "it\'s"]', r"is printed as Any\[…\]"),
        ('List("a, (b)", "c")', r"is printed as List\(…\)"),
        ("[r'a\\d', 'b']", "holds a text with the prefix r"),
        ("[rb'a', rb'b']", "has 'rb' where a text is expected"),
        ("defaultdict(<class 'list'>, {'contexts': ['a', 'b']})", r"is printed as defaultdict\(…\)"),
        ('<pyarrow.lib.StringArray object at 0x7f>\n[\n  "a",\n  "b"\n]', "where a text is expected"),
        ("[“a”, “it’s b”]", "has typographic quotes around its texts"),
        ("[‘a’, ‘b", "has typographic quotes around its texts"),
        ("[" * 12 + "'a'" + "]" * 12, "is nested more than 8 times"),
    ],
)
def test_a_list_that_cannot_be_read_back_is_a_bad_row_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(PrintedListError, match=reason):
        parse_printed_list(text)
    with pytest.raises(RowFaultError, match=r"a printed list that .*; save the rows as JSON lines or Parquet"):
        read({"QUESTION": "q", "CONTEXTS": text, "LONG_ANSWER": "a"})


@pytest.mark.parametrize(
    ("value", "contexts"),
    [
        ("['a' 'b']", ("a", "b")),
        ("[u'a', u'b']", ("a", "b")),
        ("\"['a', 'b']\"", ("a", "b")),
        (json.dumps(json.dumps(["a", "b"])), ("a", "b")),
        ('"a" is one text', ('"a" is one text',)),
        ("nan", ()),
        ("None", ()),
        ("", ()),
        ("[]", ()),
        ("array([], dtype=object)", ()),
        ({"contexts": ["a", "b"], "labels": ["L"]}, ("a", "b")),
        ({"contexts": "['a' 'b']"}, ("a", "b")),
    ],
)
def test_contexts_are_what_the_field_holds(value: Any, contexts: tuple[str, ...]) -> None:
    assert read({"QUESTION": "q", "CONTEXTS": value, "LONG_ANSWER": "a"}).contexts == contexts


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("[array(['a', 'b'], dtype=object)]", r"has \['list'\] in CONTEXTS"),
        ("['a' nan]", r"has \['float', 'str'\] in CONTEXTS"),
        ("{'labels': ['a']}", "an object with labels; expected text, a list of texts, or an object with"),
        ({"labels": ["a"]}, "an object with labels"),
    ],
)
def test_other_contents_are_named(value: Any, fault: str) -> None:
    with pytest.raises(RowFaultError, match=fault):
        read({"QUESTION": "q", "CONTEXTS": value, "LONG_ANSWER": "a"})


def test_numbers_are_what_was_printed_also_in_tool_calls_and_flags() -> None:
    value = {"i": 1, "f": -2.5, "e": 1e-07, "l": [3, "4", None, True], "array": as_array(["a"])}
    found = parse_printed_list(str(value))
    assert found == {**value, "array": ["a"]}
    assert [type(found["i"]), type(found["f"])] == [int, float]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 1},
    ]
    sample = load_task("messages").read({"messages": str(messages)})
    assert sample == load_task("messages").read({"messages": messages})
    options = {"question": "q", "options": str({"A": "five", "B": "six", "C": 7}), "answer": "C"}
    assert "C. 7" in str(load_task("choice").read(options))


@pytest.mark.parametrize(
    "text",
    [
        "['a" + "' " * 300_000 + "]",
        "['a'" + " " * 1_000_000 + "x]",
        "['a' x'" + " " * 1_000_000 + ", y",
        "['a' x" + " dtype=]" * 100_000 + "]" * 300_000 + "x",
        "['a' x" + "dtype=" * 200_000,
        "(" * 300_000,
        "[ " * 300_000 + "x",
        "0  a" + "\ndtype: a  " * 100_000 + "x",
        'c("' + '\\"' * 300_000,
        'c("a"' + '  ,  "b"' * 200_000 + "  x",
        "[“a”" + "  ,  “b”" * 200_000 + " " * 300_000 + "x]",
        "a." * 300_000 + '("',
    ],
    ids=[
        "quotes",
        "blanks",
        "blanks behind a quote",
        "brackets",
        "dtypes",
        "round",
        "square",
        "series",
        "escapes",
        "a call",
        "typographic",
        "a name",
    ],
)
def test_a_long_run_of_one_character_is_gone_through_once(text: str) -> None:
    """A pattern that goes back for each of a million blanks would take hours."""
    try:
        assert parse_printed_list(text) == text
    except PrintedListError as error:
        assert str(error)


def test_a_table_that_datasets_wrote_keeps_every_context_apart(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [
        {"QUESTION": f"q{n}", "CONTEXTS": [f'It\'s "{n}", said one. ' * 9, "x" * n, "둘째\n줄"], "LONG_ANSWER": "a"}
        for n in range(1, 20)
    ]
    Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    found = [read(row.values).contexts for row in read_rows(str(tmp_path / "rows.csv"))]
    assert found == [tuple(text.strip() for text in row["CONTEXTS"]) for row in rows]
