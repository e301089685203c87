"""Two models' answers rated by people: what the sheets hide, and what is read from them."""

from __future__ import annotations

import copy
import json
import random
import re
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from helpers import ENGLISH, run_here
from sklearn.metrics import cohen_kappa_score

from toolkit.evaluation.rating.filled import read_sheets
from toolkit.evaluation.rating.key import RatingKey, digest, read_key
from toolkit.evaluation.rating.pairs import pair_answers
from toolkit.evaluation.rating.result import summarise
from toolkit.evaluation.rating.sheet import SheetOptions, make_sheets
from toolkit.evaluation.rating.workbook import CELL_UNITS, cell_text
from toolkit.metrics.labels import cohen_kappa
from toolkit.runtime.errors import DataError, UsageError

CRITERIA = ("correct", "fluent")
Fill = Callable[[Any, str, int], Any]


def write_answers(folder: Path, count: int = 60, **answers: Callable[[int], str]) -> tuple[Path, Path]:
    """Two files as evaluate.py --predictions writes them, of models whose names tell."""
    given = {"secretbase": lambda at: f"plain {at}", "tunedmodel": lambda at: f"fine {at}"} | answers
    for name, answer in given.items():
        lines = [
            {"id": f"case-{at}", "QUESTION": f"Why {at}?", "CONTEXTS": [f"First {at}.", "Second."],
             "REFERENCE": f"As {at} is known.", "ANSWER": answer(at)}
            for at in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "secretbase.jsonl", folder / "tunedmodel.jsonl"


def make(folder: Path, *flags: object, **answers: Callable[[int], str]) -> Path:
    files = write_answers(folder, **answers)
    flags = ("--criteria", ",".join(CRITERIA), *flags)
    done = run_here("rate", "make", *files, "--output", folder / "sheets", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "sheets"


def change(path: Path, edit: Callable[[Any, dict[str, int]], None], to: Path | None = None) -> Path:
    """Edit the sheet of ratings of a workbook, given the column of each header."""
    book = openpyxl.load_workbook(path)
    sheet = book.worksheets[1]
    edit(sheet, {cell.value: cell.column for cell in sheet[1]})
    book.save(to or path)
    return to or path


def fill(sheets: Path, rating: Fill, key: RatingKey | None = None) -> list[Path]:
    """Fill all sheets: ``rating`` of key row, criterion or preference, and rater gives A's and B's, or a side."""
    key = key or read_key(sheets / "key.json")
    paths = []
    for known in key.sheets.values():

        def edit(sheet: Any, columns: dict[str, int], known: Any = known) -> None:
            for row in known.rows:
                for criterion in key.criteria:
                    a, b = rating(row, criterion, known.rater)
                    for answer, value in enumerate((a, b) if row.a_is_first else (b, a), start=1):
                        sheet.cell(row.number + 1, columns[key.columns[f"{criterion}/{answer}"]]).value = value
                side = rating(row, "preference", known.rater)
                place = {"a": 1, "b": 2}.get(side, side)
                if side in ("a", "b") and not row.a_is_first:
                    place = 3 - place
                sheet.cell(row.number + 1, columns[key.columns["preference"]]).value = place

        paths.append(change(sheets / known.file, edit))
    return paths


def a_is_better(row: Any, of: str, rater: int) -> Any:
    return "a" if of == "preference" else (4, 2)


def read(sheets: Path, *paths: Path, flags: tuple[object, ...] = ()) -> dict[str, Any]:
    done = run_here("rate", "read", *paths, "--key", sheets / "key.json", *flags)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "table": done.stdout, "said": done.stderr}


def refusal(sheets: Path, *paths: Path, key: Path | None = None) -> str:
    done = run_here("rate", "read", *paths, "--key", key or sheets / "key.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_planted_ratings_come_back_as_those_of_the_right_model(tmp_path: Path) -> None:
    sheets = make(tmp_path)
    plan = random.Random(0)
    planted = {
        (row, criterion, rater): (plan.choice([3, 4, 5]), plan.choice([1, 2, 3]))
        for row in range(1, 51) for criterion in CRITERIA for rater in (1, 2)
    }  # fmt: skip
    sides = {(row, rater): plan.choice(["a", "a", "b", "tie"]) for row in range(1, 51) for rater in (1, 2)}
    paths = fill(
        sheets, lambda row, of, rater: sides[row.row, rater] if of == "preference" else planted[row.row, of, rater]
    )
    found = read(sheets, *paths)
    assert (found["a"], found["b"]) == (str(tmp_path / "secretbase.jsonl"), str(tmp_path / "tunedmodel.jsonl"))
    for criterion in CRITERIA:
        a, b = (np.mean([both[side] for (_, of, _), both in planted.items() if of == criterion]) for side in (0, 1))
        measure = found["criteria"][criterion]
        assert (measure["a"]["value"], measure["b"]["value"]) == (pytest.approx(a), pytest.approx(b))
        of = measure["difference"]
        assert of["value"] == pytest.approx(a - b)
        assert of["low"] < of["value"] < of["high"]
        assert (measure["rows"], measure["verdict"]) == (50, "better")
    given = list(sides.values())
    assert found["preference"]["a"]["value"] == pytest.approx(given.count("a") / 100)
    assert found["preference"]["b"]["value"] == pytest.approx(given.count("b") / 100)
    assert found["ties"] == pytest.approx(given.count("tie") / 100)
    assert "A is better" in found["table"]
    for one in found["agreement"]:
        if one["of"] == "preference":
            ours, theirs = ([["a", "tie", "b"].index(sides[row, rater]) for row in range(1, 51)] for rater in (1, 2))
            expected = cohen_kappa_score(ours, theirs, weights="linear")
            assert one["weights"] == "linear"
        else:
            ours, theirs = (
                [rating for row in range(1, 51) for rating in planted[row, one["of"], rater]] for rater in (1, 2)
            )
            expected = cohen_kappa_score(ours, theirs, labels=range(1, 6), weights="quadratic")
            assert one["weights"] == "quadratic"
        assert (one["raters"], one["rows"], one["kappa"]) == ([1, 2], 50, pytest.approx(expected))
    assert [one["of"] for one in found["agreement"]] == [*CRITERIA, "preference"]


def test_the_other_model_is_found_better_where_it_is(tmp_path: Path) -> None:
    sheets = make(tmp_path, "--raters", 1)
    found = read(sheets, *fill(sheets, lambda row, of, rater: "b" if of == "preference" else (2, 5)))
    assert found["preference"]["verdict"] == found["criteria"]["fluent"]["verdict"] == "worse"
    assert "B is better" in found["table"]
    assert found["agreement"] == []


@pytest.mark.parametrize("power", [1, 2])
def test_kappa_is_scikit_learns(power: int) -> None:
    random = np.random.default_rng(power)
    for labels in (2, 3, 5):
        first = random.integers(0, labels, 40)
        second = np.where(random.random(40) < 0.5, first, random.integers(0, labels, 40))
        expected = cohen_kappa_score(first, second, labels=range(labels), weights=[None, "linear", "quadratic"][power])
        assert cohen_kappa(first, second, labels, power) == pytest.approx(expected)
    assert np.isnan(cohen_kappa(np.ones(4, int), np.ones(4, int), 3, power))
    assert np.isnan(cohen_kappa(np.zeros(0, int), np.zeros(0, int), 3, power))


def test_sides_are_balanced_and_turned_for_the_second_rater(tmp_path: Path) -> None:
    files = write_answers(tmp_path)
    for rows in (7, 50):
        key = make_sheets(*files, SheetOptions(rows=rows, raters=3)).key
        first, second, third = ({row.row: row.a_is_first for row in sheet.rows} for sheet in key.sheets.values())
        for sides in (first, second, third):
            assert sum(sides.values()) in ({rows // 2, rows - rows // 2})
        assert all(first[row] != second[row] for row in first)
        assert third not in (first, second)
        orders = [tuple(row.row for row in sheet.rows) for sheet in key.sheets.values()]
        assert len({*orders, tuple(range(1, rows + 1))}) == 4
        assert {row.id for row in key.sheets[next(iter(key.sheets))].rows} <= {f"case-{at}" for at in range(60)}


def test_the_draw_follows_from_the_seed_and_the_files_and_not_from_the_seed_alone(tmp_path: Path) -> None:
    files = write_answers(tmp_path)

    def drawn(seed: int) -> list[Any]:
        key = make_sheets(*files, SheetOptions(seed=seed)).key
        return [[(row.id, row.a_is_first) for row in sheet.rows] for sheet in key.sheets.values()]

    before = drawn(1)
    assert drawn(1) == before
    assert drawn(2) != before
    write_answers(tmp_path, tunedmodel=lambda at: f"fine {at}!")
    assert [[side for _, side in of] for of in drawn(1)] != [[side for _, side in of] for of in before]
    ids = [set(make_sheets(*files, SheetOptions(seed=1)).key.sheets) for _ in range(2)]
    assert not ids[0] & ids[1], "the sheets' ids are random"


def test_nothing_in_a_workbook_tells_which_answer_is_whose(tmp_path: Path) -> None:
    sheets = make(tmp_path, "--show-reference")
    key = read_key(sheets / "key.json")
    for known in key.sheets.values():
        with zipfile.ZipFile(sheets / known.file) as archive:
            parts = {name: archive.read(name).decode() for name in archive.namelist()}
        for name, text in parts.items():
            for secret in ("secretbase", "tunedmodel", "case-", str(tmp_path), tmp_path.name, "a_is_first"):
                assert secret not in text, f"{secret} in {name}"
                assert secret not in name
        assert not [name for name in parts if "comments" in name or "custom" in name]
        book = openpyxl.load_workbook(sheets / known.file)
        assert [(sheet.title, sheet.sheet_state) for sheet in book] == [
            ("Instructions", "visible"),
            ("Ratings", "visible"),
        ]
        assert not book.defined_names
        assert not [one for sheet in book for one in sheet.column_dimensions.values() if one.hidden]
        assert book.worksheets[1].freeze_panes == "C2"
        shown = [[cell.value for cell in row] for row in book.worksheets[1].iter_rows(min_row=2, max_col=6)]
        assert [row[0] for row in shown] == list(range(1, 51))
        for row, expected in zip(shown, known.rows, strict=True):
            at = expected.id.removeprefix("case-")
            answers = [f"plain {at}", f"fine {at}"] if expected.a_is_first else [f"fine {at}", f"plain {at}"]
            assert row[1:] == [f"Why {at}?", f"First {at}.\n\nSecond.", f"As {at} is known.", *answers]
    assert stat.S_IMODE((sheets / "key.json").stat().st_mode) == 0o600


def test_a_sheet_refuses_what_is_no_rating(tmp_path: Path) -> None:
    sheets = make(tmp_path, "--scale", "0-3", "--language", "ko")
    book = openpyxl.load_workbook(sheets / "rater_1.xlsx")
    assert book.sheetnames == ["안내", "평가"]
    whole, choice = book.worksheets[1].data_validations.dataValidation
    assert (whole.type, whole.operator, whole.formula1, whole.formula2) == ("whole", "between", "0", "3")
    assert (choice.type, choice.formula1) == ("list", '"1,2,동점"')
    headers = [cell.value for cell in book.worksheets[1][1]]
    rated = [f"{criterion}, 답변 {answer}" for criterion in ("정확성", "유창성") for answer in (1, 2)]
    assert headers == ["번호", "질문", "근거 글", "답변 1", "답변 2", *rated, "더 나은 답변", "의견"]
    assert {str(one) for one in whole.sqref.ranges} == {f"{letter}2:{letter}51" for letter in "FGHI"}
    assert str(choice.sqref) == "J2:J51"
    assert "0(가장 나쁨)부터 3(가장 좋음)" in " ".join(str(row[1].value) for row in book.worksheets[0].iter_rows())
    assert not any("{" in str(cell.value) for sheet in book for row in sheet.iter_rows() for cell in row)


ODD = ["=1+1", "=cmd|' /C calc'!A0", "+82 10", "-3 mmHg", "@SUM(A1)", "#N/A", "#REF!", "3", "TRUE", "1-5", "'quoted",
       "_x0041_ and _x000D_", "bell\x07 nul\x00 line\r\nend\r",
       "half \ud83d pair", "\ufffe\uffff", "  lead", "", "\t"]  # fmt: skip


def test_every_text_stays_a_text_and_is_known_again(tmp_path: Path) -> None:
    sheets = make(tmp_path, "--rows", "all", secretbase=lambda at: ODD[at] if at < len(ODD) else f"plain {at}")
    (path, _) = fill(sheets, a_is_better)
    book = openpyxl.load_workbook(path)
    cells = [cell for row in book.worksheets[1].iter_rows(min_row=2, min_col=2, max_col=5) for cell in row]
    assert {cell.data_type for cell in cells} == {"s"}
    quoted = {str(cell.value) for cell in cells if cell.quotePrefix}
    assert {"=1+1", "=cmd|' /C calc'!A0", "+82 10", "-3 mmHg", "@SUM(A1)"} <= quoted
    with zipfile.ZipFile(path) as archive:
        assert "<f>" not in archive.read("xl/worksheets/sheet2.xml").decode()
    texts = [str(cell.value) for cell in cells]
    assert "bell␇ nul␀ line\nend\n" in texts
    assert "half \ufffd pair" in texts
    assert "_x005F_x0041_ and _x005F_x000D_" in texts
    assert texts.count("(no answer)") == 2
    assert read(sheets, path)["raters"][0]["rated"] == 60


def test_a_text_is_the_same_however_a_program_saves_it() -> None:
    text = cell_text("_x0041_ a\r\nb  c_x000d_", "")
    for saved in (text, "_x0041_ a\nb c_x000d_", "_x0041_ a_x000D_\nb c_x000D_", "_x005F_x0041_ a b c"):
        assert digest(saved) == digest(text), saved
    assert digest("a b") != digest("a c")


@pytest.mark.parametrize("letter", ["x", "가", "😀"])
def test_a_text_that_no_cell_can_hold_is_cut_and_says_so(tmp_path: Path, letter: str) -> None:
    cut = cell_text(letter * 40_000, "[{count} more]")
    assert len(cut.encode("utf-16-le")) // 2 <= CELL_UNITS
    kept, count = re.fullmatch(rf"({letter}+) \[([\d,]+) more\]", cut).groups()  # type: ignore[union-attr]
    assert len(kept) + int(count.replace(",", "")) == 40_000
    whole = letter * (CELL_UNITS // (2 if letter == "😀" else 1))
    assert cell_text(whole, "[{count} more]") == whole
    files = write_answers(tmp_path, 4, tunedmodel=lambda at: letter * 40_000 if at == 2 else "fine")
    done = run_here("rate", "make", *files, "--output", tmp_path / "sheets")
    assert "1 texts were cut, visibly" in done.stderr
    (tmp_path / "sheets" / "rater_1.xlsx").stat()


def test_equal_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    sheets = make(tmp_path, tunedmodel=lambda at: f" plain  {at}\n" if at < 20 else f"fine {at}")
    files = tmp_path / "secretbase.jsonl", tmp_path / "tunedmodel.jsonl"
    done = run_here("rate", "make", *files, "--output", tmp_path / "again")
    assert "20 rows are left out: both answers are the same" in done.stderr
    assert "40 rows have two answers to compare, fewer than the 50 asked for" in done.stderr
    ids = {int(row.id.removeprefix("case-")) for row in next(iter(read_key(sheets / "key.json").sheets.values())).rows}
    assert ids == set(range(20, 60))
    found = read(sheets, *fill(sheets, a_is_better))
    assert {of["verdict"] for of in [found["preference"], *found["criteria"].values()]} == {"too few rows"}
    assert "too few rows" in found["table"]
    same = run_here(
        "rate", "make", *write_answers(tmp_path, tunedmodel=lambda at: f"plain {at}"), "--output", tmp_path / "c"
    )
    assert "all 60 rows have the same answer" in same.stderr
    assert not (tmp_path / "c").exists()


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    sheets = make(tmp_path)
    before = {path: path.read_bytes() for path in sheets.iterdir()}
    refused = run_here("rate", "make", *write_answers(tmp_path), "--output", sheets)
    assert (refused.returncode, "holds key.json, rater_1.xlsx, rater_2.xlsx; --overwrite" in refused.stderr) == (
        2,
        True,
    )
    assert {path: path.read_bytes() for path in sheets.iterdir()} == before
    paths = fill(sheets, a_is_better)
    result = tmp_path / "new" / "result.json"
    assert read(sheets, *paths, flags=("--output", result))["rows"] == 50
    assert json.loads(result.read_text())["rows"] == 50
    for output, said in ((result, "exists; --overwrite replaces it"), (sheets / "key.json", "is a file that is read")):
        refused = run_here("rate", "read", *paths, "--key", sheets / "key.json", "--output", output)
        assert (refused.returncode, said in refused.stderr) == (2, True)
    assert read(sheets, *paths, flags=("--output", result, "--overwrite"))
    assert run_here("rate", "make", *write_answers(tmp_path), "--output", sheets, "--overwrite").returncode == 0
    assert "which the key does not know" in refusal(sheets, change(paths[0], lambda *_: None, tmp_path / "x.xlsx"),
                                                    key=other_key(tmp_path))  # fmt: skip


def other_key(folder: Path) -> Path:
    (folder / "other").mkdir(exist_ok=True)
    return make(folder / "other") / "key.json"


def test_numbers_may_be_texts_rows_may_be_moved_and_columns_added(tmp_path: Path) -> None:
    sheets = make(tmp_path, "--raters", 1)
    shapes: list[Callable[[int], Any]] = [int, float, str, lambda n: f" {n}.0 ", lambda n: chr(0xFF10 + n)]

    def as_others_save(row: Any, of: str, rater: int) -> Any:
        shape = shapes[row.number % len(shapes)]
        return ["a", "tie", " Tie", "b"][row.number % 4] if of == "preference" else (shape(4), shape(2))

    (path,) = fill(sheets, as_others_save)
    plain = read(sheets, path)

    def move(sheet: Any, columns: dict[str, int]) -> None:
        rows = [[cell.value for cell in row] for row in sheet.iter_rows()]
        shuffled = rows[1:]
        random.Random(1).shuffle(shuffled)
        sheet.delete_rows(1, sheet.max_row)
        sheet.append(["a note above the headers"])
        for number, row in enumerate([rows[0], *shuffled, [None] * len(rows[0])]):
            preference = float(row[-2]) if isinstance(row[-2], int) else row[-2]
            counted = [str, float][number % 2](row[0]) if isinstance(row[0], int) else row[0]
            sheet.append(["extra", row[-1], preference, *row[1:-2], "sum", counted])

    moved = read(sheets, change(path, move, tmp_path / "moved.xlsx"))
    for name in ("criteria", "preference", "ties", "preferred_sides"):
        assert moved[name] == plain[name]
    assert plain["criteria"]["correct"]["a"]["value"] == 4
    counts = [["a", "tie", "tie", "b"][number % 4] for number in range(1, 51)]
    assert plain["ties"] == pytest.approx(counts.count("tie") / 50)


def test_blanks_are_counted_and_left_out(tmp_path: Path) -> None:
    sheets = make(tmp_path)

    def some(row: Any, of: str, rater: int) -> Any:
        if row.row <= 5 and rater == 2:
            return None if of == "preference" else (None, None)
        if row.row == 6 and of == "fluent":
            return (3, None)
        return "tie" if of == "preference" else (4, 2)

    paths = fill(sheets, some)
    change(paths[1], lambda sheet, columns: sheet.cell(2, columns["Comment"], " Both are wrong. "))

    def drop(sheet: Any, columns: dict[str, int]) -> None:
        sheet.delete_rows(51)

    change(paths[0], drop)
    found = read(sheets, *paths)
    first, second = (sheet.rows for sheet in read_key(sheets / "key.json").sheets.values())
    dropped = next(row.row for row in first if row.number == 50)
    in_part = [int(dropped != 6), 1]
    assert [(one["rated"], one["in_part"], one["unrated"]) for one in found["raters"]] == [
        (49, in_part[0], 1), (45, in_part[1], 5)
    ]  # fmt: skip
    assert f"rater 2: 45 of 50 rows rated, {in_part[1]} of them in part; 5 left out" in found["table"]
    assert found["criteria"]["fluent"]["rows"] == 50 - len({6} | ({dropped} if dropped <= 5 else set()))
    assert {one["of"]: one["rows"] for one in found["agreement"]}["correct"] == 50 - len({1, 2, 3, 4, 5, dropped})
    side = "a" if second[0].a_is_first else "b"
    said = {"rater": 2, "id": second[0].id, "answer_1": side, "comment": "Both are wrong."}
    assert found["comments"] == [said]
    assert found["preference"]["verdict"] == "no difference shown"
    assert {one["kappa"] for one in found["agreement"] if one["of"] == "preference"} == {None}
    only_correct = fill(
        sheets, lambda row, of, rater: None if of == "preference" else (4, 2) if of == "correct" else (None, 3)
    )
    found = read(sheets, only_correct[1])
    assert (found["criteria"]["fluent"], found["preference"], found["preferred_sides"]) == (None, None, None)
    assert "not rated" in found["table"]
    assert "1 of 2 sheets are read" in found["said"]
    blank = fill(sheets, lambda row, of, rater: None if of == "preference" else (None, None))
    assert "no row is rated in any of the sheets" in refusal(sheets, blank[1])


def test_every_cell_that_is_no_rating_is_named(tmp_path: Path) -> None:
    sheets = make(tmp_path, "--raters", 1)
    (path,) = fill(sheets, a_is_better)

    def spoil(sheet: Any, columns: dict[str, int]) -> None:
        for row, value in ((2, 6), (3, 0), (4, 2.5), (5, "good"), (6, True)):
            sheet.cell(row, columns["correct, answer 1"], value)
        sheet.cell(7, columns["Preferred answer"], 3)
        sheet.cell(8, columns["Question"], "Another question?")
        sheet.cell(9, columns["Answer 2"], sheet.cell(9, columns["Answer 1"]).value)
        sheet.cell(10, columns["No."], 9 - 1)
        sheet.cell(11, columns["No."], 51)
        sheet.cell(12, columns["No."]).value = None

    said = refusal(sheets, change(path, spoil))
    assert "11 faults in the sheets:" in said
    for cell, header, text in (
        ("F2", "correct, answer 1", "'6'; expected a whole number from 1 to 5, or nothing"),
        ("F3", "correct, answer 1", "'0'; expected"),
        ("F4", "correct, answer 1", "'2.5'; expected"),
        ("F5", "correct, answer 1", "'good'; expected"),
        ("F6", "correct, answer 1", "'True'; expected"),
        ("J7", "Preferred answer", "'3'; expected 1, 2, tie or nothing"),
        ("B8", "Question", "the text is not the one of row 7 that was sent out"),
        ("E9", "Answer 2", "the text is not the one of row 8 that was sent out"),
        ("A10", "No.", "row 8 stands here and in row 9; expected it once"),
        ("A11", "No.", "'51' is the number of no row; expected one from 1 to 50"),
        ("A12", "No.", "'' is the number of no row"),
    ):
        assert f"{path}, sheet Ratings, cell {cell} ({header}): {text}" in said, said

    change(path, lambda sheet, columns: [sheet.cell(row, 6, 9) for row in range(2, 52)])
    assert "… and " in refusal(sheets, path)


def test_sheets_that_are_not_those_of_the_key_are_refused(tmp_path: Path) -> None:
    sheets = make(tmp_path)
    one, two = fill(sheets, a_is_better)
    copied = change(one, lambda *_: None, tmp_path / "copy.xlsx")
    assert f"{one} and {copied} are both the sheet of rater 1" in refusal(sheets, one, copied)
    assert "which the key does not know" in refusal(sheets, one, key=other_key(tmp_path))
    lacking = change(two, lambda sheet, columns: sheet.delete_cols(6), tmp_path / "lacking.xlsx")
    assert "sheet Ratings: no column has the header 'correct, answer 1'" in refusal(sheets, lacking)
    twice = change(two, lambda sheet, columns: sheet.cell(1, 20, "Comment"), tmp_path / "twice.xlsx")
    assert "the header 'Comment' stands twice" in refusal(sheets, twice)
    book = openpyxl.load_workbook(two)
    book.copy_worksheet(book.worksheets[1])
    book.save(tmp_path / "kept.xlsx")
    assert "the sheets Ratings and Ratings Copy both have the headers" in refusal(sheets, tmp_path / "kept.xlsx")
    book.remove(book.worksheets[0])
    book.save(tmp_path / "bare.xlsx")
    assert "has no sheet id" in refusal(sheets, tmp_path / "bare.xlsx")
    (tmp_path / "text.xlsx").write_text("no workbook")
    assert "not a readable Excel workbook" in refusal(sheets, tmp_path / "text.xlsx")
    assert "cannot be read (No such file" in refusal(sheets, tmp_path / "none.xlsx")
    for content, said in (("{", "cannot be read"), ("[1]", "is no key of rating sheets"), ("{}", "is no key"),
                          ('{"frostline rating key": 1}', "is damaged"), (None, "cannot be read")):  # fmt: skip
        key = tmp_path / "bad.json"
        key.unlink(missing_ok=True)
        if content is not None:
            key.write_text(content)
        assert said in refusal(sheets, one, key=key)


def test_ratings_of_another_rater_do_not_pass_as_ones_own(tmp_path: Path) -> None:
    sheets = make(tmp_path)
    one, two = fill(sheets, a_is_better)
    theirs = openpyxl.load_workbook(two).worksheets[1]

    def replace_all(sheet: Any, columns: dict[str, int]) -> None:
        for row in theirs.iter_rows():
            for cell in row:
                sheet.cell(cell.row, cell.column).value = copy.copy(cell.value)

    assert "the text is not the one of row" in refusal(sheets, change(one, replace_all))


def test_rows_are_matched_by_id_or_else_by_question_and_contexts(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def write(path: Path, *rows: dict[str, Any]) -> None:
        path.write_text("\n".join(json.dumps({"ANSWER": path.stem, **row}) for row in rows), encoding="utf-8")

    write(a, {"pubid": 1, "QUESTION": "p", "CONTEXTS": ["c"]}, {"pubid": 2, "QUESTION": "q", "REFERENCE": "r"})
    write(b, {"id": "2", "QUESTION": "q", "CONTEXTS": []}, {"id": "1", "QUESTION": "p", "CONTEXTS": "c"})
    assert [(pair.id, pair.question, pair.reference, pair.answers) for pair in pair_answers(a, b)] == [
        ("1", "p", "", ("a", "b")), ("2", "q", "r", ("a", "b"))
    ]  # fmt: skip
    write(
        b, {"id": "rows.jsonl line 2", "QUESTION": "q"}, {"id": "rows.jsonl line 1", "QUESTION": "p", "CONTEXTS": ["c"]}
    )
    assert [pair.id for pair in pair_answers(a, b)] == ["row 1", "row 2"]
    faults = (
        ([{"id": 1, "QUESTION": "p", "CONTEXTS": ["c"]}], "1 rows are in .* only and 0 in .* only, matched by id"),
        ([{"QUESTION": "q"}, {"QUESTION": "z"}], "1 .* only and 1 in .* only, matched by question"),
        ([{"id": 1, "QUESTION": "p", "CONTEXTS": ["c"]}, {"id": 2, "QUESTION": "z"}], "id 2 has another question"),
        ([{"QUESTION": "q"}, {"QUESTION": "q"}], "1 rows of .*b.jsonl have question and contexts of another row"),
        ([{"QUESTION": "q", "CONTEXTS": 3}], "line 1: CONTEXTS is neither a text nor a list of texts"),
        ([{"QUESTION": None}], "line 1: QUESTION is NoneType; expected a text"),
        ([{"QUESTION": "q", "ANSWER": 1}], "line 1: ANSWER is int"),
        ([{}], "line 1: QUESTION is missing"),
        ([], "holds no rows"),
    )  # fmt: skip
    for rows, said in faults:
        write(b, *rows)
        with pytest.raises(DataError, match=said):
            pair_answers(a, b)
    for text, said in (("[1]", "line 1 holds a list"), ("x", "line 1 is not JSON")):
        b.write_text(text)
        with pytest.raises(DataError, match=said):
            pair_answers(a, b)
    with pytest.raises(DataError, match="cannot be read"):
        pair_answers(a, tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="is named twice"):
        pair_answers(a, a)
    write(b, {"pubid": 2, "QUESTION": "q"}, {"pubid": 1, "QUESTION": "p", "CONTEXTS": ["c"]})
    write(a, {"pubid": 1, "QUESTION": "p", "CONTEXTS": ["c"]}, {"pubid": 2, "QUESTION": "q"})
    with pytest.raises(DataError, match="--show-reference: no row"):
        make_sheets(a, b, SheetOptions(shows_reference=True))
    with pytest.raises(DataError, match="gives two columns one header"):
        make_sheets(*write_answers(tmp_path), SheetOptions(criteria=("correct", "정확성"), language="ko"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scale", "5-1"], "'5-1' is no scale"),
        (["--scale", "five"], "'five' is no scale"),
        (["--criteria", "correct,,x"], "'' is no name of a criterion"),
        (["--criteria", "x,x"], "names a criterion twice"),
        (["--rows", "0"], "--rows 0 leaves nothing to rate"),
        (["--raters", "0"], "'0' is not a whole number from 1"),
    ],
)
def test_flags_that_make_no_sheet_are_refused(tmp_path: Path, flags: list[str], said: str) -> None:
    done = run_here("rate", "make", *write_answers(tmp_path), "--output", tmp_path / "out", *flags)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_intervals_are_seeded(tmp_path: Path) -> None:
    sheets = make(tmp_path)
    paths = fill(sheets, lambda row, of, rater: "tie" if of == "preference" else (row.row % 5 + 1, 3))
    key = read_key(sheets / "key.json")
    filled = read_sheets(paths, key)
    first, again, other = (summarise(filled, key, seed).criteria["correct"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_answers_of_evaluate_and_generate_become_a_sheet(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--max-new-tokens", "4", "--batch-size", "4"]
    rows = ["--data.path", ENGLISH, "--data.task", "long_answer", "--answers", "4"]
    done = run_here("evaluate", tiny_model, *rows, *flags, "--predictions", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (scored,) = (tmp_path / "out").iterdir()
    sampled = ["--input", ENGLISH, "--limit", "4", "--temperature", "9", "--output", tmp_path / "answers.jsonl"]
    done = run_here("generate", tiny_model, *sampled, *flags)
    assert done.returncode == 0, done.stderr
    done = run_here("rate", "make", scored, tmp_path / "answers.jsonl", "--output", tmp_path / "sheets")
    assert done.returncode == 0, done.stderr
    key = read_key(tmp_path / "sheets" / "key.json")
    assert [len(sheet.rows) for sheet in key.sheets.values()] == [4, 4]
    found = read(tmp_path / "sheets", *fill(tmp_path / "sheets", a_is_better, key))
    assert found["preference"]["a"]["value"] == 1
