"""Files as people have them, each with the same six rows, and files that are refused, each with its reason."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import openpyxl
import pandas
import pyarrow
import pyarrow.parquet

ROWS: list[dict[str, Any]] = [
    {
        "QUESTION": f"왜 열이 나는가 {n}?",
        "CONTEXTS": ["감염은 열을 낸다.", "해열제는; 열을 내린다."],
        "LONG_ANSWER": f"감염, 때문이다 {n}.",
    }
    for n in range(6)
]


def as_jsonl(rows: Iterable[Any] = ROWS, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def as_json(value: Any = ROWS, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def as_csv(separator: str = ",", end: str = "\r\n", rows: Sequence[Mapping[str, Any]] = ROWS) -> str:
    """Text of a table, with lists as JSON."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator, lineterminator=end)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([as_json(value) if isinstance(value, list) else value for value in row.values()])
    return out.getvalue()


def as_parquet(table: pyarrow.Table | None = None) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS) if table is None else table, out)
    return out.getvalue()


def as_arrow(is_file: bool, table: pyarrow.Table | None = None) -> bytes:
    table = pyarrow.Table.from_pylist(ROWS) if table is None else table
    out = io.BytesIO()
    with (pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream)(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return out.getvalue()


def as_zip(members: Mapping[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def as_zst(content: str) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content.encode())
    return bytes(out.getvalue().to_pybytes())


def as_workbook(sheets: Mapping[str, Sequence[Sequence[Any]]], change: Callable[[Any], object] = id) -> bytes:
    """A workbook of sheets of cells; ``change`` is called with it before it is saved."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, cells in sheets.items():
        sheet = book.create_sheet(name)
        for row in cells:
            sheet.append(list(row))
    change(book)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


CELLS = [list(ROWS[0]), *([row["QUESTION"], as_json(row["CONTEXTS"]), row["LONG_ANSWER"]] for row in ROWS)]
"""The rows as cells of a sheet, with the header."""


def _typed() -> pyarrow.Table:
    """The rows in the types that pandas and polars write: large strings, dictionaries, lists of large strings."""
    table = pyarrow.Table.from_pylist(ROWS)
    large, lists = pyarrow.large_string(), pyarrow.large_list(pyarrow.large_string())
    table = table.cast(pyarrow.schema([("QUESTION", large), ("CONTEXTS", lists), ("LONG_ANSWER", large)]))
    return table.set_column(0, "QUESTION", table["QUESTION"].dictionary_encode())


_FRAME = pandas.DataFrame(ROWS)

READ: dict[str, str | bytes] = {
    "rows.jsonl": as_jsonl(),
    "ROWS.JSONL": as_jsonl(),
    "rows.ndjson": as_jsonl(),
    "bom.jsonl": "\ufeff" + as_jsonl(),
    "crlf.jsonl": as_jsonl(end="\r\n"),
    "cr.jsonl": as_jsonl(end="\r"),
    "blank_lines.jsonl": "\n \n" + as_jsonl(end="\n\n"),
    "no_last_newline.jsonl": as_jsonl().rstrip("\n"),
    "dos_end.jsonl": as_jsonl() + "\x1a",
    "indented.json": as_json(indent=1),
    "one_line.json": as_json(),
    "list.jsonl": as_json(indent=2),
    "list_on_a_line.jsonl": as_json(),
    "lines.json": as_jsonl(),
    "indented_one_by_one.jsonl": "\n".join(as_json(row, 1) for row in ROWS),
    "keyed.json": as_json({str(n): row for n, row in enumerate(ROWS)}),
    "keyed.jsonl": as_json({f"p{n}": row for n, row in enumerate(ROWS)}),
    "wrapped.json": as_json({"data": ROWS}),
    "wrapped_otherwise.json": as_json({"질문": ROWS}),
    "wrapped_with_version.json": as_json({"version": "1.0", "data": ROWS}),
    "wrapped.jsonl": as_json({"rows": ROWS}),
    "pandas_columns.json": _FRAME.to_json(),
    "pandas_columns_by_name.json": _FRAME.set_index(pandas.Index([f"p{n}" for n in range(6)])).to_json(),
    "pandas_records.json": _FRAME.to_json(orient="records"),
    "pandas_lines.json": _FRAME.to_json(orient="records", lines=True),
    "pandas_index.json": _FRAME.to_json(orient="index"),
    "pandas_split.json": _FRAME.to_json(orient="split"),
    "pandas_table.json": _FRAME.to_json(orient="table"),
    "pandas_lists.json": as_json(_FRAME.to_dict("list")),
    "rows.csv": as_csv(),
    "lf.csv": as_csv(end="\n"),
    "cr.csv": as_csv(end="\r"),
    "excel_bom.csv": "\ufeff" + as_csv(),
    "excel_sep.csv": "sep=;\r\n" + as_csv(";"),
    "semicolons.csv": as_csv(";"),
    "tabs.csv": as_csv("\t"),
    "pipes.csv": as_csv("|"),
    "rows.tsv": as_csv("\t"),
    "commas.tsv": as_csv(),
    "rows.TAB": as_csv("\t"),
    "empty_tail.csv": as_csv() + ",,\r\n" * 3 + "\r\n",
    "trailing_columns.csv": as_csv().replace("\r\n", ",,\r\n"),
    "header_twice.csv": as_csv(rows=ROWS[:3]) + as_csv(rows=ROWS[3:]),
    "title.csv": "자료 2024,,\r\n,,\r\n" + as_csv(),
    "title_alone.csv": "자료 2024\n" + as_csv(),
    "title_alone_semicolons.csv": "자료 2024\n" + as_csv(";"),
    "title_alone_named.txt": "자료 2024\n" + as_csv(";"),
    "title_with_a_comma.csv": "# 자료, 2024\n" + as_csv(),
    "comments.csv": "# 자료\n# 2024\n" + as_csv("\t"),
    "jsonl_named.csv": as_jsonl(),
    "json_named.csv": as_json(),
    "table_named.txt": as_csv("\t"),
    "jsonl_named.txt": as_jsonl(),
    "list_named.txt": as_json(),
    "indented_list_named.txt": as_json(indent=1),
    "keyed_named.txt": as_json({str(n): row for n, row in enumerate(ROWS)}, 1),
    "csv_named.txt": as_csv(),
    "semicolons_named.txt": as_csv(";"),
    "utf16.jsonl": as_jsonl().encode("utf-16"),
    "utf16_le.jsonl": as_jsonl().encode("utf-16-le"),
    "utf16_be.csv": as_csv().encode("utf-16-be"),
    "utf16.tsv": as_csv("\t").encode("utf-16"),
    "excel_unicode.txt": as_csv("\t").encode("utf-16"),
    "utf32.json": as_json().encode("utf-32"),
    "cp949.csv": as_csv().encode("cp949"),
    "cp949_semicolons.csv": as_csv(";").encode("cp949"),
    "cp949.jsonl": as_jsonl().encode("cp949"),
    "cp949.json": as_json().encode("cp949"),
    "rows.jsonl.gz": gzip.compress(as_jsonl().encode()),
    "crlf.csv.GZ": gzip.compress(as_csv().encode()),
    "two_members.jsonl.gz": gzip.compress(as_jsonl(ROWS[:3]).encode()) + gzip.compress(as_jsonl(ROWS[3:]).encode()),
    "rows.json.xz": lzma.compress(as_json().encode()),
    "rows.jsonl.bz2": bz2.compress(as_jsonl().encode()),
    "rows.jsonl.zst": as_zst(as_jsonl()),
    "skippable_frame_first.jsonl.zst": b"\x50\x2a\x4d\x18\4\0\0\0abcd" + as_zst(as_jsonl()),
    "lzma.jsonl.xz": lzma.compress(as_jsonl().encode(), lzma.FORMAT_ALONE),
    "rows.parquet.gz": gzip.compress(as_parquet()),
    "gz_without_its_ending.jsonl": gzip.compress(as_jsonl().encode()),
    "no_gz.jsonl.gz": as_jsonl(),
    "rows.zip": as_zip({"rows.jsonl": as_jsonl(), "README.md": "x", "__MACOSX/._rows.jsonl": "x", ".DS_Store": "x"}),
    "zip_of_shards.zip": as_zip({"b/1.jsonl": as_jsonl(ROWS[3:]), "b/0.jsonl": as_jsonl(ROWS[:3])}),
    "zip_of_gz.zip": as_zip({"rows.csv.gz": gzip.compress(as_csv().encode())}),
    "zip_of_zip.zip": as_zip({"inner.zip": as_zip({"deep/rows.parquet": as_parquet()})}),
    "zip_of_workbook.zip": as_zip({"rows.xlsx": as_workbook({"자료": CELLS})}),
    "rows.parquet": as_parquet(),
    "types.parquet": as_parquet(_typed()),
    "types.arrow": as_arrow(True, _typed()),
    "file.arrow": as_arrow(True),
    "stream.arrow": as_arrow(False),
    "rows.feather": as_arrow(True),
    "parquet_named.csv": as_parquet(),
    "rows.xlsx": as_workbook({"자료": CELLS}),
    "ROWS.XLSX": as_workbook({"자료": CELLS}),
    "blank_sheet_first.xlsx": as_workbook({"빈": [], "자료": CELLS, "설명": [["x"]]}),
    "hidden_sheet_first.xlsx": as_workbook(
        {"숨김": [["x"], ["y"]], "자료": CELLS}, lambda book: setattr(book["숨김"], "sheet_state", "hidden")
    ),
    "blank_rows.xlsx": as_workbook({"자료": [[], *CELLS[:3], [], *CELLS[3:], [None, "", " "], []]}),
    "title.xlsx": as_workbook(
        {"자료": [["자료 2024"], *CELLS]}, lambda book: book["자료"].merge_cells("A1:C1")
    ),
    "groups_of_columns.xlsx": as_workbook({"자료": [["입력", None, "출력"], *CELLS]}),
    "workbook_named.csv": as_workbook({"자료": CELLS}),
}  # fmt: skip
"""Files that give ``ROWS``, by name; of tables, with the contexts as the text that stands in the cell."""

DATED = as_workbook(
    {
        "자료": [
            ["날짜", "시각", "점수", "예"],
            [datetime.date(2024, 3, 1), datetime.datetime(2024, 3, 1, 9, 30), 3, True],
        ]
    }
)
"""A workbook with cells that are no text."""

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0a' * 32}\nsize 12345\n"
"""What Git holds in place of a file that Git LFS keeps."""


PRINTED = {
    "markdown": "| QUESTION | LONG_ANSWER |\n|---|:-:|\n| 왜 열이 나는가 | 감염 |\n",
    "psql": " QUESTION | LONG_ANSWER \n----------+------\n 왜 열이 나는가 | 감염\n(1 row)\n",
    "mysql": "+----------+------+\n| QUESTION | LONG_ANSWER |\n+----------+------+\n| 왜 열이 나는가 | 감염 |\n",
    "one_column": "| text |\n|---|\n| 왜 열이 나는가 |\n",
}
"""Tables that were printed to be looked at."""


def as_tar(name: str) -> bytes:
    """A tar archive of the rows as JSON lines, compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(as_jsonl().encode())
        archive.addfile(member, io.BytesIO(as_jsonl().encode()))
    return out.getvalue()


_BROKEN = as_csv(rows=ROWS[:1])

REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty.jsonl": ("", "holds no rows"),
    "blank.json": (" \n", "holds no rows"),
    "none.json": ("{}", "holds no rows"),
    "empty.csv": ("", "holds no rows"),
    "header_only.csv": ("QUESTION,CONTEXTS,LONG_ANSWER\n", "holds no rows"),
    "blank.xlsx": (as_workbook({"자료": []}), "holds no rows"),
    "no_rows.parquet": (as_parquet(pyarrow.Table.from_pylist(ROWS).slice(0, 0)), "holds no rows"),
    "truncated.json": (as_json()[:-30], "not valid JSON at line 1"),
    "trailing_comma.json": (as_json()[:-1] + ",]", "a comma with no row after it"),
    "two_lists.json": (as_json({"train": ROWS, "test": ROWS}), r"several lists of rows \(train, test\)"),
    "ragged_lists.json": (as_json({"a": ["x"], "b": ["x", "y"]}), "lists of different lengths"),
    "mixed_entries.json": (as_json({"a": {"q": "x"}, "b": {"q": "y"}, "c": 1}), "the entry c is a int"),
    "python.json": (str(ROWS), "not valid JSON at line 1, column 3"),
    "after.json": (as_json() + "\nx", "something follows"),
    "quote_in_quotes.csv": ('a,b\n1,"he said "ok" now"\n', r"near line 2: .* is written twice"),
    "open_quote.csv": ('a,b\n1,2\n"x,3\n4,5\n', "near line 3: a quote that opens there is never closed"),
    "no_header.csv": ("\r\n".join(as_csv().splitlines()[1:]), "has no header: its first line has a sentence"),
    "no_header_short.csv": ("열이 나나,예\n기침하나,예\n물은,아니오\n", "has no header: .* stand in its columns below"),
    "two_columns.csv": (_BROKEN.replace("CONTEXTS", "QUESTION"), "names QUESTION more than once"),
    "truncated.csv.gz": (gzip.compress(as_csv().encode())[:-20], "damaged or cut off"),
    "truncated.jsonl.xz": (lzma.compress(as_jsonl().encode())[:-20], "damaged or cut off"),
    "truncated.jsonl.zst": (as_zst(as_jsonl())[:-5], "damaged or cut off"),
    "damaged.zip": (as_zip({"rows.jsonl": as_jsonl()})[:-30], "damaged or cut off"),
    "nothing.zip": (as_zip({"README.md": "x"}), r"holds no data file \(README.md\)"),
    "damaged.xlsx": (b"PK\3\4", "not a readable Excel workbook"),
    "damaged.parquet": (as_parquet()[:-9], "not a readable Parquet file"),
    "damaged.arrow": (as_arrow(True)[:-40], "not a readable Arrow file"),
    "old.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "is an old Excel file"),
    "secret.xlsx": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "or one with a password"),
    "~$rows.xlsx": (b"\4user" + b" " * 160, "Excel writes it beside a workbook that is open; name the workbook"),
    **{f"pointer.{ending}": (POINTER, "is a pointer of Git LFS and not the file itself; run `git lfs pull`")
       for ending in ("jsonl", "json", "csv", "txt", "parquet", "xlsx", "jsonl.gz", "zip")},
    "old.feather": (b"FEA1" + bytes(200) + b"FEA1", "is a Feather file of version 1"),
    **{f"tar.{ending}.gz": (as_tar("rows.jsonl"), "is a tar archive; unpack it") for ending in ("jsonl", "txt", "csv")},
    "zip.jsonl": (as_zip({"rows.jsonl": as_jsonl()}), r"is a zip archive \(rows.jsonl\) and no Excel workbook; end"),
    **{f"{name}.{ending}": (table, "is a table printed to be looked at, with a rule of dashes")
       for name, table in PRINTED.items() for ending in ("csv", "txt")},
    "truncated_list.txt": (as_json(indent=1)[:-30], "not valid JSON at line"),
    "carets.csv": (as_csv("^"), r"has one column by the separator ',', and '\^' within .* set data.separator to it"),
    "controls.csv": (as_csv("\1"), r"and '\\x01' within its header; .* set data.separator to it"),
    "slashes.csv": (as_csv("/"), "and '/' within its header"),
    "unknown_names.csv": ("질문^답\n왜 열이 나는가^감염\n", r"and '\^' within its header"),
    "whole_lines.csv": ('"QUESTION;LONG_ANSWER"\n"왜?;감염"\n', "and ';' within .* take away the quotes around"),
    "page.csv": ("<!DOCTYPE html><html></html>", "is a web page"),
    "report.docx": (b"PK\3\4", "unknown data format '.docx'"),
    "header.csv": ("질문,답\n열,감염\n".encode("cp1251", "replace").replace(b"?", b"\xff"), "header line is not utf-8"),
}  # fmt: skip
"""Files that are refused, by name: content, and what the message says."""
