"""Personal identifiers: what presidio's Korean recognisers find is found, ordinary clinical numbers are not."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, KOREAN, make_tokenizer, tiny_flags, train

import toolkit
from toolkit.config.schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.dataset import load_dataset
from toolkit.data.identifiers import Identifier, IdentifierFinder
from toolkit.data.questions import from_prompt, questions_of
from toolkit.data.sources import Row, read_rows
from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import load_task

FINDER = IdentifierFinder()
FOUND = {
    "RESIDENT_NUMBER": ["000101-3000000", "0001013000000", "991231-1999999", "000101 - 3000000", "000101–3000000"],
    "FOREIGN_NUMBER": ["000101-5000000", "0001018000000"],
    "PASSPORT": ["M000A0000", "m000a0000", "S00000000", "R00000000", "m00000000"],
    "DRIVING_LICENCE": ["11-00-000000-00", "서울 00-000000-00", "28 00 000000 00"],
    "PHONE": [
        "010-0000-0000", "01000000000", "010 0000 0000", "010.0000.0000", "02-000-0000", "(031) 000-0000",
        "+82-10-0000-0000", "+82 2 000 0000", "070-0000-0000", "+1 555 010 0000",
    ],
    "EMAIL": ["nobody@example.invalid", "no.body+1@mail.example.co.kr"],
    "CARD": ["4000-0000-0000-0002", "4000000000000002", "4000 0000 0000 0002", "3700 000000 00002"],
}  # fmt: skip
"""Well-formed and plainly invented; the formats of presidio-analyzer's tests for Korea, cards and e-mail."""

LABELLED = {
    "운전면허번호 110000000000": "DRIVING_LICENCE",
    "계좌번호: 국민 000000-00-000000": "ACCOUNT",
    "입금 계좌 00000000000": "ACCOUNT",
    "병록번호 00000000": "HOSPITAL_NUMBER",
    "등록번호: A0000000": "HOSPITAL_NUMBER",
    "여권번호: MB0000000": "PASSPORT",
}

CLINICAL = [
    "2023-10-12", "120/80 mmHg, 37.5°C", "1,234,567명", "p < 0.001, 95% CI 0.84-1.30", "rs12345678", "PMID 12345678",
    "NCT01234567", "ISBN 979-11-0000-000-0", "4000-0000-0000-0001", "119", "1588-0000", "2014년부터 2017년까지",
    "000000-00-000000", "0.5 mg/kg을 8시간마다", "ICD-10 S72.00", "환자 1234명", "Fe2+ 3 4 5", "+5 to +10 mmHg",
    "9913321999999", "등록 환자 500명", "2,000-3,000 kcal", "user@localhost",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_each_format_is_found_whole_and_masked(kind: str, text: str) -> None:
    sentence = f"환자의 것은 {text}이다."
    (found,) = FINDER.find(sentence)
    assert (found.kind, sentence[found.start : found.end]) == (kind, text)
    assert FINDER.mask(sentence) == f"환자의 것은 [{kind}]이다."


@pytest.mark.parametrize("text", LABELLED)
def test_a_number_of_many_formats_is_found_behind_the_word_that_names_it(text: str) -> None:
    assert [found.kind for found in FINDER.find(f"기록: {text} 이다")] == [LABELLED[text]]


@pytest.mark.parametrize("text", CLINICAL)
def test_clinical_numbers_are_no_identifiers(text: str) -> None:
    assert FINDER.find(f"보고에 따르면 {text} 이다.") == []


@pytest.mark.parametrize("path", [KOREAN, ENGLISH])
def test_the_sample_rows_hold_none(path: Path) -> None:
    assert FINDER.find(path.read_text(encoding="utf-8")) == []


LONG = {
    "letters of a gene": "ACGT" * 250_000 + "010-0000-0000",
    "hexadecimal digits": "0a1b" * 250_000 + " 010-0000-0000",
    "an address without an end": "a" * 200_000 + "@" + "b." * 200_000 + " 010-0000-0000",
    "addresses without an end": "a@b." * 200_000 + " 010-0000-0000",
    "blanks": "1" + " " * 1_000_000 + "010-0000-0000",
    "words before numbers": "면허 가 환자 나 " * 100_000 + "010-0000-0000",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_word_is_gone_through_once(text: str) -> None:
    """A pattern that is tried at each letter, up to the end of the word, would take hours."""
    assert FINDER.mask(text) == text.replace("010-0000-0000", "[PHONE]")


def test_the_pattern_of_an_address_begins_at_its_sign_and_nowhere_in_a_word() -> None:
    pattern = FINDER._kinds["EMAIL"]
    assert not any(pattern.match("nobody@example.invalid", at) for at in range(6))
    assert pattern.match("nobody@example.invalid", 6)


def test_addresses_side_by_side_are_found_each() -> None:
    text = "a@example.kr또는b@example.kr_c@example.kr, d@@e@example.kr@example.kr"
    assert FINDER.mask(text) == "[EMAIL][EMAIL][EMAIL], d@@[EMAIL]@example.kr"


def test_many_identifiers_are_not_each_compared_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0

    def counted(identifier: Identifier, name: str) -> Any:
        nonlocal reads
        reads += 1
        return object.__getattribute__(identifier, name)

    monkeypatch.setattr(Identifier, "__getattribute__", counted, raising=False)
    assert len(FINDER.find("010-0000-0000, nobody@example.invalid " * 500)) == 1000
    assert reads < 100 * 1000


def test_a_pattern_of_the_users_own_comes_first() -> None:
    finder = IdentifierFinder([r"SNU-\d{4}"])
    assert finder.mask("SNU-0000, 010-0000-0000") == "[IDENTIFIER], [PHONE]"


def test_all_texts_and_numbers_of_a_row_are_masked_and_nothing_else_changes() -> None:
    row = {"a": ["010-0000-0000", {"b": 1013000000, "c": 9912313000000}], "d": None, "e": 1.5, "f": True, "g": 7}
    masked = FINDER.mask_values(row)
    assert masked == {**row, "a": ["[PHONE]", {"b": 1013000000, "c": "[RESIDENT_NUMBER]"}]}


def test_a_cell_that_is_a_telephone_without_its_0_is_masked_and_other_numbers_are_not() -> None:
    cells = {"a": 1020000000, "b": "1020000000", "c": "10-2000-0000"}
    assert FINDER.mask_values(cells) == dict.fromkeys(cells, "[PHONE]")
    others = {"d": 1710000000, "e": 102000000, "f": 10200000000, "g": "PMID 1020000000"}
    assert FINDER.mask_values(others) == others


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The English rows, two of them with identifiers."""
    read = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    read[3]["CONTEXTS"] = ["Call 010-0000-0000 or write to nobody@example.invalid."]
    read[5]["LONG_ANSWER"] += " The patient has number 000101-3000000."
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, read)))
    return path


def load(path: Path, **data: Any) -> Any:
    return load_dataset(DataConfig(path=str(path), **data), make_tokenizer(), seed=1)


def test_error_refuses_rows_with_identifiers_and_names_kinds_and_rows_alone(rows: Path) -> None:
    with pytest.raises(DataError) as error:
        load(rows, on_identifier="error")
    message = str(error.value)
    assert "2 of 20 rows hold personal identifiers (data.on_identifier: error):" in message
    assert f"  - {rows} line 4: 1 PHONE, 1 EMAIL" in message
    assert "data.on_identifier: mask" in message
    assert "0000" not in message


def test_warn_trains_on_them_and_says_so(rows: Path) -> None:
    screening = load(rows).screening
    warning = screening.warning()
    assert warning is not None
    assert (
        f"3 personal identifiers in 2 rows (1 PHONE, 1 EMAIL, 1 RESIDENT_NUMBER), the first in {rows} line 4" in warning
    )
    assert "0000" not in warning + screening.line()


def test_no_masked_identifier_reaches_tokens_or_any_file_of_a_run(rows: Path, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer, dataset = make_tokenizer(), load(rows, on_identifier="mask")
    texts = [tokenizer.decode(list(example.token_ids)) for example in dataset.train]
    assert any("[PHONE]" in text and "[EMAIL]" in text for text in texts)
    assert any("[RESIDENT_NUMBER]." in text for text in texts)
    assert "masked" in dataset.screening.line()
    assert dataset.screening.warning() is None
    run, cache = tmp_path / "run", ("--prefix.cache", "on", "--prefix.cache_dir", tmp_path / "cache")
    flags = ("--data.on_identifier", "mask", "--data.validation", "0.5", "--output.sample_answers", "10", *cache)
    assert (
        train(
            *tiny_flags(tiny_model, run, "--data.path", rows, "--train.epochs", "1", "--mask.train", "last:2", *flags)
        )
        == 0
    )
    for file in (*run.rglob("*"), *(tmp_path / "cache").rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            for secret in (b"010-0000-0000", b"nobody@example", b"000101-3000000"):
                assert secret not in content, file


def test_questions_to_a_run_are_masked_as_its_rows_were() -> None:
    row = {"QUESTION": "Who is 010-0000-0000?", "CONTEXTS": ["000101-3000000"], "LONG_ANSWER": "SNU-0000"}
    mask = DataConfig(on_identifier="mask", identifier_patterns=[r"SNU-\d{4}"])
    (sample,) = questions_of([Row("question 1", row)], mask)
    assert (sample.question, sample.contexts, sample.answer) == (
        "Who is [PHONE]?", ("[RESIDENT_NUMBER]",), "[IDENTIFIER]",
    )  # fmt: skip
    asked = from_prompt("Who is 010-0000-0000?", ["SNU-0000"], mask, Rendering())
    assert (asked.question, asked.contexts) == ("Who is [PHONE]?", ("[IDENTIFIER]",))
    assert questions_of([Row("question 1", row)], DataConfig())[0].question == row["QUESTION"]


def test_rows_are_named_without_a_key_that_identifies_somebody(tmp_path: Path) -> None:
    answer = {"QUESTION": "why?", "CONTEXTS": [], "LONG_ANSWER": "because"}
    keyed = {"12345678": answer, "000101-3000000": answer, "000102-3000000": {"QUESTION": "why?"}, "SNU-0000": answer}
    path = tmp_path / "keyed.json"
    path.write_text(json.dumps(keyed))
    whole = [f"{path} key 12345678", f"{path} entry 2", f"{path} entry 3"]
    assert [row.origin for row in read_rows(str(path))][:3] == whole
    dataset = load(path, on_bad_row="skip", identifier_patterns=[r"SNU-\d{4}"])
    assert [row.origin for row in dataset.train] == [*whole[:2], f"{path} key [IDENTIFIER]"]
    assert [row.origin for row in dataset.skipped] == whole[2:]


@pytest.mark.parametrize("key", ["stratify_by", "oversample"])
def test_a_column_of_identifiers_that_rows_are_divided_by_is_not_shown(
    tmp_path: Path, key: str, said: list[str]
) -> None:
    answer = {"QUESTION": "why?", "CONTEXTS": [], "LONG_ANSWER": "because"}
    path = tmp_path / "rows.jsonl"
    doctors = ["010-0000-0000"] * 4 + ["010-0000-0001"] * 3 + ["010-0000-0002"]
    path.write_text("\n".join(json.dumps({**answer, "doctor": doctor}) for doctor in doctors))
    if key == "stratify_by":
        with pytest.raises(DataError, match=r"1 of 3 values have fewer: '\[PHONE\]' \(1\)"):
            load(path, stratify_by="doctor", validation=0.5)
    else:
        assert len(load(path, oversample="doctor").train) == 12
        assert any("[PHONE] 4" in line or "[PHONE] 3" in line for line in said)
        assert "0000" not in " ".join(said).replace(str(path), "")


@pytest.mark.parametrize("printed", [json.dumps, str, lambda value: json.dumps(value, ensure_ascii=False)])
def test_what_a_table_or_a_call_prints_with_escapes_is_found_and_masked(printed: Callable[[Any], str]) -> None:
    call = {"function": {"name": "f", "arguments": json.dumps({"note": "환자 00000000\n010-0000-0000"})}}
    messages = [
        {"role": "user", "content": "이름\nM00000000\nnobody@example.invalid 환자 00000000"},
        {"role": "assistant", "content": "a\tb", "tool_calls": [call]},
    ]
    task = load_task("messages")
    masked = task.read(FINDER.mask_values({"messages": messages}))
    assert masked.turns[0].content == "이름\n[PASSPORT]\n[EMAIL] 환자 [HOSPITAL_NUMBER]"
    assert masked.turns[1].tool_calls[0]["function"]["arguments"] == {"note": "환자 [HOSPITAL_NUMBER]\n[PHONE]"}
    assert task.read(FINDER.mask_values({"messages": printed(messages)})) == masked
    assert FINDER.count({"messages": printed(messages)}) == FINDER.count({"messages": messages})


def test_words_in_letters_apart_say_what_a_number_is() -> None:
    text = unicodedata.normalize("NFD", "환자 00000000")
    assert FINDER.mask_values([text, unicodedata.normalize("NFD", "환자")]) == [
        "환자 [HOSPITAL_NUMBER]",
        unicodedata.normalize("NFD", "환자"),
    ]


@pytest.mark.parametrize("printed", [None, json.dumps, str])
def test_an_identifier_across_the_parts_of_a_message_is_found_and_masked(
    tmp_path: Path, tiny_model: Path, printed: Callable[[Any], str] | None
) -> None:
    texts = ["환자 12345", "678, 전화 010-", "", "0000-", "0000 또는 a@example.invalid", " 끝"]
    parts = [{"type": "text", "text": text} for text in texts]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    row = {"messages": messages if printed is None else printed(messages)}
    masked = FINDER.mask_values(row)
    (asked, _) = load_task("messages").read(masked).turns
    assert asked.content == "환자 [HOSPITAL_NUMBER], 전화 [PHONE] 또는 [EMAIL] 끝"
    assert FINDER.count(row) == {"HOSPITAL_NUMBER": 1, "PHONE": 1, "EMAIL": 1}
    if printed is None:
        assert [part["text"] for part in masked["messages"][0]["content"]] == [
            "환자 [HOSPITAL_NUMBER]", ", 전화 [PHONE]", "", "", " 또는 [EMAIL]", " 끝",
        ]  # fmt: skip
        assert FINDER.count(masked) == {}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    values = {"model.name_or_path": str(tiny_model), "data.path": str(tmp_path / "rows.json"), "data.validation": None}
    places = toolkit.data_check(None, values).identifiers
    assert {place.kind: place.column for place in places} == dict.fromkeys(
        ["HOSPITAL_NUMBER", "PHONE"], "messages.0.content"
    ) | {"EMAIL": "messages.0.content.4.text"}


def test_texts_of_a_list_that_are_no_parts_of_one_text_keep_their_identifiers_apart() -> None:
    passages = [{"text": "전화 010-0000-0000"}, {"text": "2명이 답했다."}]
    assert FINDER.mask_values(passages) == [{"text": "전화 [PHONE]"}, passages[1]]
    assert FINDER.count([{"text": "000101-"}, {"title": "3000000"}]) == {}


def test_options_with_labels_are_not_parts_of_one_text() -> None:
    options = [{"label": label, "text": text} for label, text in zip("ABC", ("010", "1234", "5678"), strict=True)]
    assert FINDER.mask_values({"choices": options}) == {"choices": options}
    assert FINDER.count({"choices": json.dumps(options)}) == {}
    assert FINDER.count([{"text": option["text"]} for option in options]) == {"PHONE": 1}
