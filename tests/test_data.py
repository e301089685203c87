import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers import ENGLISH, KOREAN, make_tokenizer

from toolkit.config.schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.examples import Encoder
from toolkit.data.questions import from_prompt, questions_of
from toolkit.data.sources import read_rows
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import load_task
from toolkit.tasks.sample import RowFaultError, ask

GOOD = {
    "QUESTION": "왜 열이 나는가?",
    "CONTEXTS": ["감염은 열을 낸다.", "해열제는 열을 내린다."],
    "LONG_ANSWER": "감염 때문이다.",
}
read = load_task("pubmedqa").read
WIDE = DataConfig().max_length


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_keyed_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({str(100 + n): row for n, row in enumerate(rows)}), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", write_json),
        ("keyed.json", write_keyed_json),
        ("rows.jsonl", write_jsonl),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
    ],
)
def test_every_format_gives_the_same_samples(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    write(tmp_path / name, [GOOD, GOOD])
    samples = [read(row.values) for row in read_rows(str(tmp_path / name))]
    assert samples == [ask(GOOD["QUESTION"], tuple(GOOD["CONTEXTS"]), GOOD["LONG_ANSWER"])] * 2


def test_contexts_may_be_one_string() -> None:
    assert read({**GOOD, "CONTEXTS": "[1] 감염은 열을 낸다."}).contexts == ("[1] 감염은 열을 낸다.",)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"LONG_ANSWER": None}, "has null in LONG_ANSWER"),
        ({"QUESTION": "  "}, "has an empty QUESTION"),
        ({"LONG_ANSWER": ""}, "has an empty LONG_ANSWER"),
        ({"LONG_ANSWER": float("nan")}, "has NaN in LONG_ANSWER, as tables print a missing value"),
        ({"LONG_ANSWER": "\u200b\ufeff"}, "has only invisible characters (U+200B, U+FEFF) in LONG_ANSWER"),
        ({"LONG_ANSWER": "\u2800\U000e0041 \x01"}, "has only invisible characters (U+0001, U+2800, U+E0041)"),
        ({"CONTEXTS": ["a\0b"]}, "has a NUL character in CONTEXTS"),
        ({"LONG_ANSWER": "a\ud800"}, "has half of a surrogate pair in LONG_ANSWER"),
        ({"CONTEXTS": [{"text": "a"}]}, "name the texts' path in data.task, as in CONTEXTS[].text"),
        ({"LONG_ANSWER": "NaN"}, "has NaN in LONG_ANSWER, as tables print a missing value"),
        ({"QUESTION": "<NA>"}, "has <NA> in QUESTION"),
        ({"LONG_ANSWER": 3}, "has a int in LONG_ANSWER"),
        ({"CONTEXTS": 3}, "has int in CONTEXTS"),
        ({"CONTEXTS": ["a", 3]}, "has ['int', 'str'] in CONTEXTS"),
    ],
)
def test_a_bad_value_is_named(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowFaultError) as error:
        read({**GOOD, **change})
    assert fault in str(error.value)


def test_a_missing_column_and_a_row_that_is_no_object_are_named() -> None:
    with pytest.raises(RowFaultError, match="has no column LONG_ANSWER or answer; it has QUESTION, CONTEXTS"):
        read({key: GOOD[key] for key in ("QUESTION", "CONTEXTS")})
    with pytest.raises(RowFaultError, match="is a list; expected an object"):
        read([1])


def load(path: Path, tokenizer: Any, **data: Any) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **data), tokenizer, seed=1)


BAD_LINES = {
    "null": (json.dumps({**GOOD, "LONG_ANSWER": None}).encode(), "null in LONG_ANSWER"),
    "not json": (b"{nope", "is not valid JSON"),
    "not utf-8": (json.dumps(GOOD, ensure_ascii=False).encode("cp949"), "is not UTF-8 text"),
    "empty answer": (json.dumps({**GOOD, "LONG_ANSWER": " "}).encode(), "empty LONG_ANSWER"),
    "missing column": (b'{"QUESTION": "q"}', "no column LONG_ANSWER"),
    "wrong type": (b'["q"]', "is a list"),
    "too long": (
        json.dumps({**GOOD, "LONG_ANSWER": "long " * 3000}).encode(),
        "tokens without any context; data.max_length is 2048",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_row_is_an_error_that_names_file_and_row(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), BAD_LINES[kind][0]]))
    with pytest.raises(DataError) as error:
        load(path, tokenizer)
    assert "1 of 2 rows cannot be used" in str(error.value)
    assert f"{path} line 2" in str(error.value)
    assert BAD_LINES[kind][1] in str(error.value)
    assert "data.on_bad_row: skip" in str(error.value)


def test_skip_counts_and_lists_every_bad_row(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *(line for line, _ in BAD_LINES.values())]))
    dataset = load(path, tokenizer, on_bad_row="skip")
    assert len(dataset.train) == 1
    assert [row.origin.split()[-1] for row in dataset.skipped] == [str(n) for n in range(2, 9)]
    assert f"{len(BAD_LINES)} rows skipped" in dataset.summary()
    dataset.save_skipped(tmp_path / "skipped.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in listed] == [row.origin for row in dataset.skipped]


def test_skip_still_refuses_a_file_without_a_good_row(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({**GOOD, "QUESTION": ""}) + "\n")
    with pytest.raises(DataError, match="No usable row is left"):
        load(tmp_path / "rows.jsonl", tokenizer, on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"[{}", "not valid JSON at line 1"),
        ("rows.json", b"3", "holds one int; expected a list of rows"),
        ("rows.json", b"[]", "holds no rows"),
        ("rows.jsonl", b"\n\n", "holds no rows"),
        ("rows.parquet", b"nope", "not a readable Parquet file"),
        ("rows.docx", b"x", "unknown data format '.docx'"),
        ("rows.csv", b'QUESTION,CONTEXTS,LONG_ANSWER\n"open', "not valid CSV"),
        ("rows.csv", b"QUESTION,CONTEXTS,LONG_ANSWER,QUESTION\nq,c,a,r", "names QUESTION more than once"),
    ],
)
def test_an_unreadable_file_is_named_with_its_fault(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / name))
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_file_says_where_it_was_looked_for() -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows("nowhere/rows.jsonl")


def test_a_csv_row_with_a_field_too_few_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.csv").write_text("QUESTION,CONTEXTS,LONG_ANSWER\nq,c\n")
    with pytest.raises(DataError, match="row 1 has not the 3 fields of the header line"):
        load(tmp_path / "rows.csv", tokenizer)


def test_only_the_answer_and_its_end_are_supervised(tokenizer: Any) -> None:
    example = Encoder(tokenizer, WIDE).encode(read(GOOD))
    assert tokenizer.decode(example.token_ids[example.answer_start :]) == "감염 때문이다.<|end|>"
    prompt = tokenizer.decode(example.token_ids[: example.answer_start])
    assert prompt.startswith("<|user|>\n감염은")
    assert prompt.endswith("왜 열이 나는가?<|end|>\n<|assistant|>\n")


def test_generation_starts_from_the_very_tokens_training_used(tokenizer: Any) -> None:
    encoder, sample = Encoder(tokenizer, WIDE), read(GOOD)
    example = encoder.encode(sample)
    assert encoder.prompt_ids(sample) == example.token_ids[: example.answer_start]
    assert encoder.stop_ids() == [example.token_ids[-1]]


def test_without_a_chat_template_the_text_stands_alone_and_ends_the_answer() -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    example = Encoder(plain, WIDE).encode(read(GOOD))
    assert plain.decode(example.token_ids).endswith("왜 열이 나는가?\n\n감염 때문이다.<|end|>")
    assert plain.decode(example.token_ids[example.answer_start :]) == "감염 때문이다.<|end|>"


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    odd = make_tokenizer()
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="renders a prompt differently once its answer follows"):
        Encoder(odd, WIDE)


def test_a_template_that_fails_is_refused() -> None:
    odd = make_tokenizer()
    odd.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(DataError, match="no users here"):
        Encoder(odd, WIDE)


@pytest.mark.parametrize("max_length", [60, 90, 100, 120])
def test_a_long_row_loses_context_and_nothing_else(tokenizer: Any, max_length: int) -> None:
    sample = read({**GOOD, "CONTEXTS": ["처음 문장이다. " * 30, "둘째 문장이다. " * 30]})
    example = Encoder(tokenizer, max_length).encode(sample)
    whole = Encoder(tokenizer, 10_000).encode(sample)
    text = tokenizer.decode(example.token_ids)
    assert len(example.token_ids) <= max_length
    assert example.shortened
    assert not whole.shortened
    assert text.endswith("왜 열이 나는가?<|end|>\n<|assistant|>\n감염 때문이다.<|end|>")
    assert "\ufffd" not in text
    assert example.supervised_tokens == whole.supervised_tokens


def test_context_is_cut_from_the_end_and_fills_the_length(tokenizer: Any) -> None:
    sample = read({**GOOD, "CONTEXTS": ["one two three four " * 50]})
    example = Encoder(tokenizer, 150).encode(sample)
    assert "one two three" in tokenizer.decode(example.token_ids)
    assert len(example.token_ids) > 140


@pytest.mark.parametrize(("path", "least"), [(KOREAN, 60), (ENGLISH, 20)])
def test_the_sample_data_is_whole(path: Path, least: int) -> None:
    samples = [read(row.values) for row in read_rows(str(path))]
    assert len(samples) >= least
    assert len({sample.question for sample in samples}) == len(samples)
    assert all(sample.contexts for sample in samples)


def test_questions_need_no_answer_and_keep_one_as_reference(tmp_path: Path) -> None:
    asked = {key: GOOD[key] for key in ("QUESTION", "CONTEXTS")}
    write_jsonl(tmp_path / "q.jsonl", [asked, GOOD])
    first, second = questions_of(read_rows(str(tmp_path / "q.jsonl")), DataConfig())
    assert (first.answer, second.answer) == (None, GOOD["LONG_ANSWER"])
    write_jsonl(tmp_path / "bad.jsonl", [{"QUESTION": ""}])
    with pytest.raises(DataError, match=r"bad\.jsonl line 1 has an empty QUESTION"):
        questions_of(read_rows(str(tmp_path / "bad.jsonl")), DataConfig())
    with pytest.raises(DataError, match="--question is empty"):
        from_prompt(" ", [], DataConfig(), Rendering())
