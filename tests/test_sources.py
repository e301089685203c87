"""Each form of file gives its rows, or one error that names the file and says what to do."""

from __future__ import annotations

import gzip
import io
import json
import logging
import unicodedata
import zipfile
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from data_files import CELLS, DATED, READ, REFUSED, ROWS, as_csv, as_json, as_jsonl, as_workbook, as_zip
from helpers import KOREAN

from toolkit.data.readers import content, json_stream, text
from toolkit.data.readers.row import ReadOptions
from toolkit.data.sources import Row, Source, iter_rows, read_rows
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import load_task


def put(path: Path, data: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def with_lists(rows: list[Row]) -> list[Any]:
    """The values of rows, with lists that a table holds as JSON; a fault in place of what could not be read."""
    values = [row.fault or dict(row.values) for row in rows]
    for row in values:
        if isinstance(row, dict) and isinstance(row.get("CONTEXTS"), str):
            row["CONTEXTS"] = json.loads(row["CONTEXTS"])
        if isinstance(row, dict):
            row.pop("index", None)  # that pandas' table orient writes
    return values


@pytest.mark.parametrize("name", READ)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert with_lists(read_rows(put(tmp_path / name, READ[name]))) == ROWS


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_file_is_named_once_with_its_reason_and_none_of_its_rows(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, REFUSED[name][0])
    with pytest.raises(DataError, match=REFUSED[name][1]) as error:
        read_rows(path)
    assert path in str(error.value)
    assert "열이 나" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cp949.csv", "is read as cp949, as its bytes suggest; data.encoding names another"),
        ("utf16.jsonl", "is read as UTF-16, by its byte order mark"),
        ("utf16_be.csv", "is read as utf-16-be"),
        ("semicolons.csv", "is read with fields separated by ';'; data.separator names another"),
        ("commas.tsv", "is read with fields separated by ','"),
        ("lines.json", "is read as a row a line, by its content"),
        ("list.jsonl", "is read as one JSON value, by its content"),
        ("wrapped.json", "holds its rows under the key data"),
        ("pandas_columns.json", "holds columns, as pandas writes them"),
        ("parquet_named.csv", "is read as Parquet, by its content"),
        ("title.xlsx", "begins with a title, which is left out"),
        ("title_alone_semicolons.csv", "begins with a title, which is left out"),
        ("comments.csv", "begins with 2 lines above its header, which are left out"),
        ("csv_named.txt", "is read as CSV, by its content"),
        ("list_named.txt", "is read as JSON, by its content"),
        ("header_twice.csv", "row 4 repeats the header, and is left out"),
        ("hidden_sheet_first.xlsx", "has the sheets 숨김, 자료; 자료 is read, as data.sheet names none"),
        ("rows.zip", "1 other files are not read, such as README.md"),
    ],
)
def test_what_was_detected_is_said_once(tmp_path: Path, name: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "frostline")
    read_rows(put(tmp_path / name, READ[name]))
    assert caplog.text.count(said) == 1


def test_nothing_is_said_about_a_usual_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "frostline")
    for name in ("rows.jsonl", "one_line.json", "rows.csv", "rows.parquet", "rows.tsv", "rows.jsonl.gz", "rows.xlsx"):
        read_rows(put(tmp_path / name, READ[name]))
    assert not caplog.text


def read(path: str, **options: str) -> list[Row]:
    return list(iter_rows(Source(path, options=ReadOptions(**options))))


def test_encoding_separator_and_sheet_can_be_asked_for(tmp_path: Path) -> None:
    western = put(tmp_path / "western.csv", "a#b\nnoël, 37°C#x\n".encode("cp1252"))
    assert read(western, encoding="cp1252", separator="#")[0].values == {"a": "noël, 37°C", "b": "x"}
    assert with_lists(read(put(tmp_path / "k.csv", as_csv().encode("cp949")), encoding="euc-kr")) == ROWS
    assert with_lists(read(put(tmp_path / "u.csv", as_csv().encode("utf-16-be")), encoding="utf-16")) == ROWS
    assert read(put(tmp_path / "t.txt", "a;b\n1;2\n"), separator=";")[0].values == {"a": "1", "b": "2"}
    book = put(tmp_path / "book.xlsx", as_workbook({"안내": [["x"], ["y"]], "자료": CELLS}))
    assert with_lists(read(book, sheet="자료")) == ROWS
    assert with_lists(read(book, sheet=normalize("NFD", "자료"))) == ROWS
    with pytest.raises(DataError, match=r"data\.sheet is 'x', but .* set it to one of: 안내, 자료"):
        read(book, sheet="x")
    with pytest.raises(DataError, match=r"data\.encoding is 'nope', which is no encoding of text"):
        read(western, encoding="nope")
    with pytest.raises(DataError, match="is not utf-16-le text throughout"):
        read(put(tmp_path / "not.csv", as_csv().encode("cp949")), encoding="utf-16")


def test_a_file_on_one_long_line_is_read_whatever_its_encoding(tmp_path: Path) -> None:
    """The part of it that is looked at ends within a character."""
    rows = [{"q": "감염은 열을 낸다" * 50_000, "a": str(n)} for n in range(3)]
    for at, encoding in enumerate(("utf-8", "cp949", "utf-16")):
        written = "[" + " " * at + as_json(rows)[1:]
        assert [row.values for row in read_rows(put(tmp_path / "r.json", written.encode(encoding)))] == rows
        keyed = as_json({str(n): row for n, row in enumerate(rows)})
        assert [row.values for row in read_rows(put(tmp_path / "k.json", keyed.encode(encoding)))] == rows


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text",
    ["Что делать при высокой температуре?", "Τι κάνω με πυρετό;", "Làm gì khi bị sốt?", "ماذا أفعل عند الحمى؟",
     "열이 나면, 무엇을 하는가?", "발열 時、何をするか。", "Ĉu febro daŭras?"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_utf16_without_a_mark_is_detected_in_every_script(tmp_path: Path, text: str, encoding: str, form: str) -> None:
    rows = [{"q": unicodedata.normalize(form, text), "a": "1"}] * 3  # type: ignore[arg-type]
    for name, written in (("r.csv", as_csv(rows=rows)), ("r.jsonl", as_jsonl(rows))):
        found = read_rows(put(tmp_path / name, written.encode(encoding)))
        assert [unicodedata.normalize("NFC", str(row.values["q"])) for row in found] == [
            unicodedata.normalize("NFC", text)
        ] * 3


def test_a_damaged_character_does_not_hide_an_encoding(tmp_path: Path) -> None:
    written = as_csv(rows=ROWS * 20).encode("cp949") + b"\xff\xff,b,c\r\n"
    *rows, bad = read_rows(put(tmp_path / "rows.csv", written))
    assert with_lists(rows) == ROWS * 20
    assert bad.fault is not None
    assert bad.fault.startswith("is not cp949 text")


def test_text_that_is_neither_utf8_nor_korean_is_not_guessed(tmp_path: Path) -> None:
    """37°C in cp1252 is a valid cp949 syllable; a few broken lines of JSON are damage and no encoding."""
    (row,) = read_rows(put(tmp_path / "western.csv", "a,b\nfever of 37°C,x\n".encode("cp1252")))
    assert row.fault == "is not UTF-8 text; save the file as UTF-8, or name its encoding in data.encoding"
    broken = as_jsonl(ROWS[:4]).encode() + as_jsonl(ROWS[4:5]).encode("cp949")
    assert [row.fault is None for row in read_rows(put(tmp_path / "rows.jsonl", broken))] == [True] * 4 + [False]


CHINESE = "高血压是最常见的慢性病，也是心脑血管病最主要的危险因素。患者可以口服降压药，但必须定期复查肝功能。"
NOT_KOREAN = {
    "gbk": [CHINESE, "高血压患者可以长期服用阿司匹林预防脑卒中吗", "肺癌患者化疗后血压波动，怎么办？"],
    "gb18030": ["糖尿病患者感冒发热该怎么办", "可以。降低患者的血压水平可明显减少脑卒中"],
    "big5": ["高血壓患者可以服用阿司匹林嗎", "可以，定期複查"],
    "euc_jp": ["高血圧患者注意点、塩分制限、体重管理、定期検査", "高血圧の患者は何に注意しますか"],
    "shift_jis": ["高血圧の患者は何に注意しますか", "塩分制限、体重管理、定期検査"],
}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in NOT_KOREAN.items() for text in texts])
def test_chinese_and_japanese_are_not_read_as_korean(tmp_path: Path, encoding: str, text: str) -> None:
    rows = [{"q": text, "a": "1"}]
    for name, written in (("r.csv", as_csv(rows=rows * 3)), ("r.jsonl", as_jsonl(rows * 3))):
        found = read_rows(put(tmp_path / name, written.encode(encoding)))
        assert {row.fault for row in found} == {
            "is not UTF-8 text; save the file as UTF-8, or name its encoding in data.encoding"
        }
        assert [row.values for row in read(str(tmp_path / name), encoding=encoding)] == rows * 3


@pytest.mark.parametrize(
    "text",
    ["예, 아니오", "두통, 복통, 설사, 구토, 발열", "高血壓은 뇌졸중의 원인이 된다", "감기(感氣)에 물을 마신다.",
     "폐렴 양성 흉통 천식", "똠방각하 아저씨가 뷁이라고 하였다", "Pt. 37.5°C 발열 +, 기침 -"],
)  # fmt: skip
def test_short_korean_and_korean_with_hanja_are_read_in_cp949(tmp_path: Path, text: str) -> None:
    rows = [{"q": text, "a": "1"}]
    for name, written in (("r.csv", as_csv(rows=rows)), ("r.jsonl", as_jsonl(rows))):
        assert [row.values for row in read_rows(put(tmp_path / name, written.encode("cp949")))] == rows


def test_the_korean_example_rows_are_read_in_cp949(tmp_path: Path) -> None:
    """Each row alone, too."""
    for number, line in enumerate(KOREAN.read_text(encoding="utf-8").splitlines()):
        written = line.encode("cp949", "ignore")
        (row,) = read_rows(put(tmp_path / f"{number}.jsonl", written))
        assert row.values == json.loads(written.decode("cp949"))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"QUESTION": "a\\ud83d"}', "holds half of a character, the lone surrogate U+D83D in QUESTION"),
        ('{"QUESTION": "a\\u0000b"}', "holds a NUL character in QUESTION"),
        ('{"QUESTION": "a\0b"}', "holds a NUL character"),
        (as_jsonl(ROWS)[:50], "is not valid JSON"),
    ],
)
def test_a_bad_row_is_named_with_its_reason_and_the_others_are_read(tmp_path: Path, line: str, fault: str) -> None:
    *rows, bad = read_rows(put(tmp_path / "rows.jsonl", as_jsonl() + line))
    assert with_lists(rows) == ROWS
    assert bad.origin.endswith("line 7")
    assert fault in (bad.fault or "")


def test_a_line_ends_at_a_line_break_and_at_no_other_character(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Text from the web has U+2028, U+2029 and U+0085 in it, which Python takes for ends of lines too."""
    caplog.set_level(logging.INFO, "frostline")
    rows = [{**row, "LONG_ANSWER": "한\u2028두\u2029세\x85네"} for row in ROWS]
    for end in ("\n", "\r\n", "\r"):
        lines = as_jsonl(rows, end)
        found = read_rows(put(tmp_path / "rows.jsonl", lines + '{"QUESTION": broken\u2028}' + end + lines))
        assert [row.origin.rpartition(" ")[2] for row in found if row.fault] == ["7"]
        assert len(found) == 13
    (row,) = read_rows(put(tmp_path / "table.txt", "a\tb\u2028c\td\n1\t2\t3\n"))
    assert list(row.values.values()) == ["1", "2", "3"]
    assert "one JSON value" not in caplog.text


def test_a_comma_that_ends_each_line_is_named_and_no_row_is_lost_in_silence(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.json"):
        for last in (as_jsonl(ROWS, ",\n"), as_jsonl(ROWS, ",\n").rstrip(",\n")):
            faults = [row.fault for row in read_rows(put(tmp_path / name, last))]
            assert len(faults) == 6
            assert set(faults) <= {"is not valid JSON: a comma ends the line; remove it", None}
            assert faults.count(None) == (not last.endswith("\n"))


def test_fields_too_many_are_named_with_their_line(tmp_path: Path) -> None:
    *_, bad = read_rows(put(tmp_path / "rows.csv", as_csv() + "5' 10\" tall,b,c, d\r\n"))
    assert bad.fault == (
        "has not the 3 fields of the header line (it has 4, up to line 8); check its quotes and separators"
    )


def test_a_column_of_texts_is_no_title_and_is_divided_by_no_mark_in_it(tmp_path: Path) -> None:
    texts = ["그는; 갔다", "그녀는; 왔다"]
    assert [row.values for row in read_rows(put(tmp_path / "rows.csv", "\n".join(["text", *texts])))] == [
        {"text": text} for text in texts
    ]
    rows = read_rows(put(tmp_path / "rows.csv", "text\n그는, 갔다\n그녀는, 왔다\n"))
    assert all((row.fault or "").endswith("separators, or take away a title above the header") for row in rows)
    assert with_lists(read(put(tmp_path / "carets.csv", as_csv("^")), separator="^")) == ROWS


def test_a_single_object_is_one_row_and_a_conversation_no_list_of_rows(tmp_path: Path) -> None:
    turns = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "training": False}]}
    for row in (ROWS[0], turns, {**turns, "tools": []}, {"context": "c", "labels": ["a", "b"]}):
        for name, value in (("one.json", as_json(row, 1)), ("one.jsonl", as_json(row))):
            assert [found.values for found in read_rows(put(tmp_path / name, value))] == [row]


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    rows = read_rows(put(tmp_path / "raw.txt", "환자는 {나았다}.\r\n\n  둘째, 줄\t\n"))
    assert [row.values for row in rows] == [{"text": "환자는 {나았다}."}, {"text": "  둘째, 줄"}]


@pytest.mark.parametrize(
    "lines",
    [
        ["\t첫 문단은 들여 썼다.", "\t둘째도.", "\t셋째도."],
        ["[1] 환자는 나았다.", "[2] 둘째."],
        ['{"key": "value"} 형식의 응답을 받았다.', "둘째."],
        ["['위약', '약'] 두 군을 비교하였다."],
        ["Question, answer and context.", "It is, as said, so."],
        ["Input, output", "The function returns its input."],
        ["제목", "-----", "본문"],
    ],
)
def test_prose_that_begins_like_data_stays_prose(tmp_path: Path, lines: list[str]) -> None:
    rows = read_rows(put(tmp_path / "raw.txt", "\n".join(lines)))
    assert [row.values["text"] for row in rows] == lines


def test_cells_that_are_no_text_keep_their_value_and_dates_become_text(tmp_path: Path) -> None:
    (row,) = read_rows(put(tmp_path / "dates.xlsx", DATED))
    assert row.values == {"날짜": "2024-03-01", "시각": "2024-03-01T09:30:00", "점수": 3, "예": True}


HEADER = list(ROWS[0])


def test_merged_cells_have_their_value_in_each_row_of_theirs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "frostline")
    cells = [["자료"], [], HEADER, ["q1", "c", "a1"], ["q2", None, "a2"], [], ["q3", None, "a3"], ["q4", None, "a4"]]
    cells += [["q5", "c5", "a5"], ["q6", None, None]]

    def merge(book: Any) -> None:
        for place in ("A1:C2", "B4:B7", "B9:C10"):
            book["자료"].merge_cells(place)

    book = put(tmp_path / "rows.xlsx", as_workbook({"자료": cells}, merge))
    found = [tuple(row.values.values()) for row in read_rows(book)]
    assert found[:4] == [("q1", "c", "a1"), ("q2", "c", "a2"), ("q3", "c", "a3"), ("q4", "", "a4")]
    assert found[4:] == [("q5", "c5", ""), ("q6", "c5", "")], "of a range of several columns the first has the value"
    assert caplog.text.count("merged cells have their value in each of their rows, as in row 4") == 1


def test_a_formula_without_a_value_makes_a_bad_row(tmp_path: Path) -> None:
    cells = [[*HEADER, "n"], ["q1", "=VLOOKUP(A2,Z:Z,1)", "a1", 1], ["q2", "c2", "a2", 2], ["q3", "c3", "a3", "=1+1"]]
    first, good, last = read_rows(put(tmp_path / "rows.xlsx", as_workbook({"자료": cells})))
    assert good.values == {**dict(zip(HEADER, ("q2", "c2", "a2"), strict=True)), "n": 2}
    assert first.fault == (
        "has in CONTEXTS a formula in B2 whose value was never computed; open the workbook in Excel or LibreOffice and "
        "save it"
    )
    assert "has in n a formula in D4" in (last.fault or "")
    cells[0][1] = '="CON"&"TEXTS"'
    with pytest.raises(DataError, match=r"rows\.xlsx: has in its header a formula in B1 whose value"):
        read_rows(put(tmp_path / "rows.xlsx", as_workbook({"자료": cells})))


def test_a_formula_may_give_empty_text(tmp_path: Path) -> None:
    cells = [HEADER, ["q1", "=IF(A2=0,1,1)", "a1"]]
    book = changed(as_workbook({"자료": cells}), b'<c r="B2">', b'<c r="B2" t="str">')
    assert [row.values["CONTEXTS"] for row in read_rows(put(tmp_path / "rows.xlsx", book))] == [""]


def changed(book: bytes, *texts: bytes) -> bytes:
    """A workbook in whose parts each of some texts is replaced by the one that follows it."""
    with zipfile.ZipFile(io.BytesIO(book)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        assert any(old in part for part in parts.values())
        parts = {name: part.replace(old, new) for name, part in parts.items()}
    return as_zip(parts)


def test_characters_that_a_workbook_escapes_are_decoded_once(tmp_path: Path) -> None:
    cells = [HEADER, ["하나 CR\n둘", "FACE", "_NO_"]]
    escaped = (b"CR", b"_x000D_", b"FACE", b"_xD83D__xDE00_", b"_NO_", b"_x005F_x000D_")
    book = put(tmp_path / "rows.xlsx", changed(as_workbook({"자료": cells}), *escaped))
    assert [tuple(row.values.values()) for row in read_rows(book)] == [("하나 \r\n둘", "😀", "_x000D_")]


def test_the_questions_of_a_survey_are_names_of_columns(tmp_path: Path) -> None:
    asked = "Did you have a fever in the last two weeks?"
    rows = read_rows(put(tmp_path / "survey.csv", f"id,{asked}\n1,yes\n2,no\n"))
    assert [row.values[asked] for row in rows] == ["yes", "no"]


def test_rows_are_read_in_a_stream(tmp_path: Path) -> None:
    """Of a compressed file of 20,000 rows, little is decompressed before the first is there."""
    rows = [{"text": f"{n} " + "열 " * 50} for n in range(20_000)]
    for name in ("rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"):
        written = {"jsonl": as_jsonl(rows), "json": as_json(rows), "csv": as_csv(rows=rows)}[name.split(".")[1]]
        path = put(tmp_path / name, gzip.compress(written.encode(), 1))
        damaged = put(tmp_path / f"half.{name}", Path(path).read_bytes()[: Path(path).stat().st_size * 3 // 4])
        reader = iter_rows(Source(damaged))
        assert next(reader).values == rows[0]
        with pytest.raises(DataError, match="damaged or cut off"):
            list(reader)


class CountedText(str):
    """A text that counts the characters in which line breaks are counted."""

    counted = 0

    def __radd__(self, before: str) -> CountedText:
        return CountedText(str(before) + str(self))

    def count(self, part: str, start: int = 0, end: int = 2**62) -> int:  # type: ignore[override]
        CountedText.counted += max(min(end, len(self)) - start, 0)
        return super().count(part, start, end)


def test_lines_of_json_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written = CountedText('{"a": 1}\n\n' * 2000 + '{"a":')
    monkeypatch.setattr(CountedText, "counted", 0)
    source = io.StringIO()
    monkeypatch.setattr(source, "read", lambda size, parts=[written]: parts.pop() if parts else "")
    stream = json_stream.JsonStream(source, "rows.json")
    for number in range(2000):
        assert stream.peek() == "{"
        assert stream.line == 2 * number + 1
        assert stream.value()[0] == {"a": 1}
    with pytest.raises(DataError, match="not valid JSON at line 4001, column 6"):
        stream.value()
    assert 0 < CountedText.counted <= 2 * len(written)


def test_a_bomb_is_stopped_at_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_FREE_BYTES", 2**20)
    blank = put(tmp_path / "blank.jsonl.gz", gzip.compress(b"\n" * 2**22))
    member = put(tmp_path / "bomb.zip", as_zip({"rows.csv": b"a,b\n" * 2**20}))
    for path in (blank, member):
        with pytest.raises(DataError, match="decompresses to more than 200 times its"):
            read_rows(path)
    monkeypatch.setattr(text, "LONGEST_LINE", 2**16)
    monkeypatch.setattr(json_stream, "LONGEST_LINE", 2**16)
    with pytest.raises(DataError, match="line 1 is longer than 65,536 characters"):
        read_rows(put(tmp_path / "long.csv", b"0" * 2**18))
    with pytest.raises(DataError, match="a value at line 1 has more than 65,536 characters, or is no JSON"):
        read_rows(put(tmp_path / "long.json", b'["' + b"0" * 2**19))
    monkeypatch.setattr(content, "_LARGEST_IN_MEMORY", 100)
    with pytest.raises(DataError, match="is not read from front to back; unpack it once"):
        read_rows(put(tmp_path / "rows.parquet.gz", READ["rows.parquet.gz"]))


def test_archives_lie_at_most_three_deep_and_touch_nothing_outside(tmp_path: Path) -> None:
    inner = as_zip({"rows.jsonl": as_jsonl()})
    for _ in range(3):
        inner = as_zip({"inner.zip": inner})
    with pytest.raises(DataError, match="more than 3 archives or compressed files lie within each other"):
        read_rows(put(tmp_path / "deep.zip", inner))
    folder = tmp_path / "a" / "b"
    evil = put(folder / "evil.zip", as_zip({"../../rows.jsonl": as_jsonl(), "/etc/rows2.jsonl": as_jsonl()}))
    assert len(read_rows(evil)) == 12
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "deep.zip", "b", "evil.zip"}


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = Path(put(tmp_path / "rows.zip", as_zip({"rows.jsonl": as_jsonl()})))
    with zipfile.ZipFile(path) as archive:
        (info,) = archive.infolist()
    data = bytearray(path.read_bytes())
    for at, magic in ((6, b"PK\3\4"), (8, b"PK\1\2")):
        data[data.index(magic) + at] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{info.filename} in it is encrypted"):
        read_rows(str(path))


@pytest.mark.parametrize("name", ["row.json", "row.jsonl"])
@pytest.mark.parametrize(
    "row",
    [
        {"QUESTION": "q", "LONG_ANSWER": "a", "items": [{"text": "x"}, {"text": "y"}]},
        {"instruction": "q", "output": "a", "examples": [{"input": "x"}]},
        {"messages": [{"role": "user", "content": "q"}], "samples": [{"n": 1}]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"conversations": [{"speaker": "p", "utterance": "q"}, {"speaker": "d", "utterance": "a"}]},
    ],
)
def test_one_row_that_has_a_list_of_objects_is_a_row(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    (tmp_path / name).write_text(json.dumps(row))
    assert [found.values for found in read_rows(str(tmp_path / name))] == [row]


def test_an_object_that_may_be_a_row_or_a_file_of_rows_is_asked_about(tmp_path: Path) -> None:
    listed = [{"text": "x"}, {"text": "y"}]
    odd = {"질문": "q", "정답": "a", "items": listed}
    (tmp_path / "rows.json").write_text(json.dumps(odd))
    with pytest.raises(DataError, match=r"texts \(질문, 정답\) and a list of objects \(items\): one row, or many\?"):
        read_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(odd))
    assert [row.values for row in read_rows(str(tmp_path / "rows.jsonl"))] == [odd], "a row a line, by its name"
    about = {"version": "1", "License": "MIT", "count": 2, "info": {"by": "us"}, "items": listed}
    (tmp_path / "rows.json").write_text(json.dumps(about))
    assert [row.values for row in read_rows(str(tmp_path / "rows.json"))] == listed


def test_the_names_of_classes_stand_in_the_place_of_their_numbers(tmp_path: Path) -> None:
    """A decision of 2 was the third of the names that the file itself holds, and read as the second."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import List as ListOf

    label = ClassLabel(names=["no", "maybe", "yes"])
    features = Features(
        QUESTION=Value("string"), decision=label, several=ListOf(label), listed=ListOf({"name": label}),
        within={"name": label, "other": Value("int64")},
    )  # fmt: skip
    numbers = [2, 1, -1]
    columns = {
        "QUESTION": ["a?", "b?", "c?"], "decision": numbers, "several": [[0, 2], [], [1]],
        "within": [{"name": n, "other": n} for n in numbers], "listed": [[{"name": n}] for n in numbers],
    }  # fmt: skip
    made = Dataset.from_dict(columns, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    for path in ("saved", "rows.parquet", *map(str, (tmp_path / "saved").glob("*.arrow"))):
        found = [row.values for row in read_rows(str(tmp_path / path))]
        assert [row["decision"] for row in found] == ["yes", "maybe", None]
        assert [row["several"] for row in found] == [["no", "yes"], [], ["maybe"]]
        assert [row["within"]["name"] for row in found] == ["yes", "maybe", None]
        assert [row["within"]["other"] for row in found] == numbers
        assert [row["listed"] for row in found] == [[{"name": "yes"}], [{"name": "maybe"}], [{"name": None}]]


def test_a_value_that_python_cannot_hold_names_its_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.feather

    texts = pyarrow.array(["a"])
    odd = {
        "seen": pyarrow.array([10**15], pyarrow.timestamp("s")),
        "born": pyarrow.array([5_000_000], pyarrow.int32()).cast(pyarrow.date32()),
        "took": pyarrow.array([2**62], pyarrow.duration("s")),
        "zone": pyarrow.array([0], pyarrow.timestamp("s", tz="Mars/Olympus")),
        "twice": pyarrow.StructArray.from_arrays([texts, texts], names=["a", "a"]),
    }
    for name, column in odd.items():
        table = pyarrow.table({"QUESTION": texts, name: column})
        pyarrow.feather.write_feather(table, tmp_path / "rows.feather")
        with pytest.raises(
            DataError, match=rf"rows\.feather: the column {name} has a value of type .* save it as text"
        ):
            read_rows(str(tmp_path / "rows.feather"))


def test_the_directory_of_an_archive_is_read_once_not_for_each_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9,000 members took more than ten minutes."""
    parsed, parse = [], zipfile.ZipFile._RealGetContents  # type: ignore[attr-defined]

    def counted(self: zipfile.ZipFile) -> None:
        parsed.append(self)
        parse(self)

    with zipfile.ZipFile(tmp_path / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(40):
            archive.writestr(f"{number:02}.jsonl", json.dumps({"QUESTION": f"q {number}", "LONG_ANSWER": "a"}))
    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", counted)
    assert [row.values["QUESTION"] for row in read_rows(str(tmp_path / "rows.zip"))] == [f"q {n}" for n in range(40)]
    assert len(parsed) <= 2


def test_typed_tables_do_not_give_a_call_the_arguments_of_other_functions(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "string"} for key in arguments}
        return {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
        }

    rows = [row("f", {"x": "1"}), row("g", {"y": "2", "z": "3"})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    task = load_task("messages")
    for path in ("rows.parquet", "saved"):
        found = [task.read(row.values) for row in read_rows(str(tmp_path / path))]
        assert found == [task.read(row) for row in rows]
