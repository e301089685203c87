"""Corpora are read and cut by their own structure, indexed once, and give rows the same passages everywhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolkit.retrieval.corpus as corpus_module
import toolkit.retrieval.index as index_module
from toolkit.config.data_schema import DataConfig
from toolkit.data.questions import from_prompt, questions_of
from toolkit.data.retrieval import passages_for, retrieval_fingerprint
from toolkit.data.sources import Row
from toolkit.retrieval.corpus import Corpus
from toolkit.retrieval.dense import DenseIndex
from toolkit.retrieval.index import TextIndex
from toolkit.retrieval.passages import Passage, passages_of
from toolkit.retrieval.readers import DocumentLine
from toolkit.retrieval.retriever import Retriever, fuse
from toolkit.retrieval.structure import cut
from toolkit.retrieval.terms import terms_of
from toolkit.runtime import signals
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.file_lock import FileLock
from toolkit.tasks.choose import load_task
from toolkit.tasks.sample import RowFaultError

RULES = """제1장 총칙
제1조(목적) 이 절차는 이상사례를 정한다.
제2조의2(정의) ① 이 절차에서 쓰는 말은 다음과 같다.
1. "중대"란 다음을 말한다.
가. 사망
② 그 밖의 말은 계획서를 따른다.
제4조 및 제5조에 따라 보고한
것을 적는다.
제3조 삭제
별표 1
보고 기한
부칙 <2026. 3. 1.>
제1조(시행일) 이 절차는 2026년 3월 1일부터 시행한다."""


def lines_of(text: str) -> list[DocumentLine]:
    return [DocumentLine(line) for line in text.split("\n")]


def test_rules_are_cut_at_articles_and_paragraphs_but_not_at_references() -> None:
    parts = cut(lines_of(RULES))
    assert [part.key for part in parts] == ["1", "2-2.1", "2-2.2", "3", "별표1", "부칙/1"]
    assert parts[1].place == "제1장 총칙 제2조의2(정의) 제1항"
    assert parts[1].text.endswith("가. 사망")
    assert "제4조 및 제5조에 따라 보고한\n것을 적는다." in parts[2].text
    assert parts[-1].place == "부칙 제1조(시행일)"


def test_a_long_paragraph_is_cut_at_its_items_after_the_words_that_lead_to_them() -> None:
    items = [f"{number}. {'긴 조건이 이어진다 ' * 40}" for number in (1, 2)] + ["2의2. 짧은 조건"]
    parts = cut(lines_of("\n".join(["제30조(기준) ① 다음과 같다.", *items])))
    assert [part.key for part in parts] == ["30.1.1", "30.1.2", "30.1.2-2"]
    assert parts[-1].text == "① 다음과 같다.\n2의2. 짧은 조건"
    assert parts[-1].place == "제30조(기준) 제1항 제2호의2"


def test_headings_give_numbers_and_long_sections_are_cut_at_paragraphs() -> None:
    lines = [
        ("4 Reporting", 1),
        ("4.1 Immediate", 2),
        ("a " * 200, 0),
        ("", 0),
        ("b " * 200, 0),
        ("Notes", 2),
        ("x", 0),
    ]
    text = [DocumentLine(*line) for line in lines]
    assert [(part.key, part.place) for part in cut(text)] == [
        ("4.1", "4 Reporting 4.1 Immediate"), ("4.1:2", "4 Reporting 4.1 Immediate"), ("s3", "4 Reporting Notes"),
    ]  # fmt: skip


def pdf_of(pages: Sequence[str]) -> bytes:
    """A minimal PDF with a line of Latin text on each page."""
    count = len(pages)
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(count))
    font = f"{3 + 2 * count} 0 R"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {count} >>"]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R "
            f"/Resources << /Font << /F1 {font} >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    body, places = "%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj\n{one}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n"
    tail = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF"
    return f"{body}{head}{table}{tail}".encode()


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A corpus with the same two articles in txt, md, docx and hwpx, and an English PDF of two pages."""
    import docx
    from hwpx import HwpxDocument

    folder = tmp_path / "corpus"
    folder.mkdir()
    first, second = "제1조(보고) ① 7일 이내에 보고한다.", "② 전화로도 보고할 수 있다."
    (folder / "a_2026-03-01.txt").write_text(f"{first}\n{second}\n")
    (folder / "b.md").write_text(f"---\nid: B\ntitle: 절차\nversion: 2026-02-01\n---\n## {first}\n{second}\n")
    word = docx.Document()
    word.add_heading("절차", 1)
    for text in (first, second):
        word.add_paragraph(text)
    word.save(str(folder / "c.docx"))
    hangul = HwpxDocument.new()
    for text in (first, second):
        hangul.add_paragraph(text)
    hangul.save_to_path(str(folder / "d.hwpx"))
    (folder / "e.pdf").write_bytes(pdf_of(["Report within 7 days.", "Call the sponsor at once."]))
    (folder / "manifest.yaml").write_text(
        "files:\n  c.docx: {id: C, version: 2026-01-01, effective_until: 2026-01-31}\n  e.pdf: {title: Manual}\n"
    )
    return folder


def test_every_kind_of_file_gives_the_same_passages(documents: Path) -> None:
    passages = {passage.id: passage for passage in Corpus.open(str(documents)).passages()}
    texts = {name.partition("/")[0]: [] for name in passages}
    for name, passage in passages.items():
        texts[name.partition("/")[0]].append(passage.text)
    assert texts["a_2026-03-01"] == texts["B"] == texts["C"] == texts["d"]
    assert texts["B"] == ["① 7일 이내에 보고한다.", "② 전화로도 보고할 수 있다."]
    assert passages["B/1.2"].place == "절차 제1조(보고) 제2항"
    assert passages["a_2026-03-01/1.1"].since == "2026-03-01"
    assert (passages["C/1.1"].since, passages["C/1.1"].until) == ("2026-01-01", "2026-01-31")
    assert not passages["C/1.1"].in_force("2026-02-01")
    assert passages["C/1.1"].in_force("2026-01-31")
    pages = {one.id: (one.page, one.text) for one in passages.values() if one.file == "e.pdf"}
    assert pages == {"e/p1": (1, "Report within 7 days."), "e/p2": (2, "Call the sponsor at once.")}


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [(".pdf", "pypdf", "pypdf"), (".docx", "docx", "python-docx"), (".hwpx", "hwpx", "python-hwpx")],
)
def test_a_missing_library_is_named(
    documents: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, package: str
) -> None:
    for path in documents.iterdir():
        if path.suffix != kind:
            path.unlink()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{kind}: this kind of file needs {package}: pip install {package}"):
        Corpus.open(str(documents)).passages()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("---\nid: A\nx: 1\n---\n가", "unknown key x; expected id"),
        ("---\nid: A\n가", "the front matter has no end"),
        ("---\nversion: 2026-13-01\n---\n가", "expected a date such as 2026-03-01|no valid YAML"),
        ("---\nid: A B\n---\n가", "id is 'A B'; expected no blank"),
        ("---\nversion: 2026-03-01\neffective_until: 2026-02-01\n---\n가", "effective_until is before effective_from"),
        ("  \n", "holds no text"),
    ],
)
def test_a_wrong_document_is_named_with_its_fault(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "a.md").write_text(text)
    with pytest.raises(DataError, match=fault):
        Corpus.open(str(tmp_path)).passages()


def test_two_versions_with_one_id_are_refused(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("---\nid: A\n---\n## 1 x\n가")
    with pytest.raises(DataError, match=r"a\.md and b\.md both hold a passage A/1; give each version"):
        Corpus.open(str(tmp_path)).passages()
    with pytest.raises(DataError, match="is no directory"):
        Corpus.open(str(tmp_path / "a.md"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no document"):
        Corpus.open(str(tmp_path / "empty"))


def test_a_passage_is_read_back_from_a_prompt() -> None:
    for since, until in (("", ""), ("2026-03-01", ""), ("2026-03-01", "2026-04-01")):
        passage = Passage("A-1/4.1", "절차 제4조(보고) 제1항", "첫 줄\n둘째 줄 (2026-01-01 ~ )", since, until)
        assert passages_of([passage.text_in_prompt(), "plain text"]) == {"A-1/4.1": passage}


TEXTS = [
    "중대한 이상사례는 15일 이내에 보고한다", "동의서에 서명과 날짜를 적는다", "Serious adverse events within 24 hours",
    "AST 120 U/L 상승", "!!!",
]  # fmt: skip


def test_the_index_gives_what_bm25s_gives_for_the_same_terms() -> None:
    import bm25s

    index = TextIndex(TEXTS, is_kept=False)
    other = bm25s.BM25()
    other.index([terms or [""] for terms in terms_of(TEXTS)], show_progress=False)
    for query in ("이상사례를 보고하는 기한", "serious AE, 24 hours", "AST가 올랐다"):
        numbers, scores = other.retrieve(terms_of([query]), k=3, show_progress=False)
        expected = [(int(n), float(s)) for n, s in zip(numbers[0], scores[0], strict=True) if s > 0]
        assert index.search(query, 3) == expected
    assert index.search("동의서를", 3)[0][0] == 1  # whatever the particle
    assert index.search("없는 낱말", 3) == []
    assert len(index) == 5


def test_equal_scores_keep_the_order_of_the_texts_and_k_is_the_most() -> None:
    index = TextIndex(["fever"] * 4 + ["rash"], is_kept=False)
    assert [number for number, _ in index.search("fever", 3)] == [0, 1, 2]
    with pytest.raises(UsageError, match="no text to search"):
        TextIndex([])


def test_an_index_is_built_once_and_again_for_other_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    built: list[int] = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda texts: (built.append(len(texts)), build(texts))[1])
    found = [TextIndex(TEXTS[2:4]).search("hours") for _ in range(3)]
    assert built == [2]
    assert found[0] == found[1] == found[2]
    TextIndex([*TEXTS[2:4], "more"])
    assert built == [2, 3]
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "retrieval").rglob("*")} == {0}


def test_a_damaged_index_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    before = TextIndex(["one fever", "two"]).search("fever")
    (kept,) = (tmp_path / "retrieval").glob("*.bm25")
    (kept / "params.index.json").write_text("{")
    with caplog.at_level(logging.WARNING, "frostline"):
        assert TextIndex(["one fever", "two"]).search("fever") == before
    assert "the index is built again" in caplog.text


def test_without_the_libraries_retrieval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UsageError, match="retrieval needs bm25s: pip install bm25s"):
        TextIndex(["a"], is_kept=False)
    monkeypatch.setitem(sys.modules, "wordllama", None)
    import toolkit.retrieval.dense as dense

    with pytest.raises(UsageError, match="pip install wordllama"):
        dense._model.__wrapped__()
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs morphemes: pip install kiwipiepy"):
        terms_of(["한글"])


def test_dense_vectors_find_a_text_by_itself_and_are_fused_by_rank() -> None:
    index = DenseIndex(TEXTS[:4])
    assert [index.search(text, 1)[0][0] for text in TEXTS[:4]] == [0, 1, 2, 3]
    np.testing.assert_allclose(np.linalg.norm(index._vectors, axis=1), 1, atol=1e-5)
    assert fuse([[3, 1, 2], [1, 5]]) == [1, 3, 5, 2]


def settings(folder: Path, **more: Any) -> DataConfig:
    retrieval = {"corpus": str(folder), "passages": 2, **more}
    return DataConfig.model_validate({"task": "grounded_document", "retrieval": retrieval})


ROW = {
    "NOTE": "중대한 이상사례를 7일 이내에 보고",
    "NOTE_DATE": "2026-03-05",
    "REQUEST": "쓰시오",
    "DOCUMENT": "보고한다 [NOTE].",
}


def test_rows_get_passages_in_force_on_their_day(documents: Path) -> None:
    task = load_task("grounded_document")
    found = passages_for(settings(documents), task)(ROW)
    assert list(found) == [*ROW, "PASSAGES"]
    assert len(found["PASSAGES"]) == 2
    dated = passages_for(settings(documents, as_of="NOTE_DATE", passages=50), task)
    assert "C/1.1" not in passages_of(dated(ROW)["PASSAGES"])
    assert "C/1.1" in passages_of(dated({**ROW, "NOTE_DATE": "2026-01-10T09:00"})["PASSAGES"])
    with pytest.raises(RowFaultError, match=r"has 'May' in NOTE_DATE, which data\.retrieval\.as_of names"):
        dated({**ROW, "NOTE_DATE": "May"})
    with pytest.raises(RowFaultError, match=r"has a column PASSAGES, which data\.retrieval fills"):
        dated({**ROW, "PASSAGES": ["x"]})
    with pytest.raises(RowFaultError, match=r"has no column HISTORY, which data\.retrieval\.query names"):
        passages_for(settings(documents, query="HISTORY"), task)(ROW)
    with pytest.raises(UsageError, match="task long_answer has none"):
        passages_for(settings(documents), load_task("long_answer"))
    assert passages_for(DataConfig(), task)(ROW) is ROW


def test_questions_get_the_passages_that_training_rows_get(documents: Path) -> None:
    data = settings(documents)
    (sample,) = questions_of([Row("row 1", {key: value for key, value in ROW.items() if key != "DOCUMENT"})], data)
    expected = passages_for(data, load_task("grounded_document"))(ROW)["PASSAGES"]
    assert sample.contexts == tuple(expected)
    prompt = sample.turns[-1].content
    assert prompt.startswith(ROW["NOTE"])
    assert all(text in prompt for text in expected)
    assert prompt.index(expected[-1]) < prompt.index(ROW["REQUEST"])


def test_a_question_alone_gets_passages_too(documents: Path) -> None:
    from toolkit.data.chat_rendering import Rendering

    data = settings(documents).model_copy(update={"task": {"name": "own", "columns": {
        "note": "NOTE", "passages": {"path": "PASSAGES", "kind": "texts"}, "answer": "A"}, "cut": "passages",
        "prompt": "{{ note }} {{ passages | join(' ') }}", "target": "{{ answer }}"}})  # fmt: skip
    sample = from_prompt("7일 이내에 보고", (), data, Rendering())
    assert len(sample.contexts) == 2


def test_a_changed_corpus_is_other_data(documents: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from toolkit.data.sources import Source
    from toolkit.data.token_key import store_key
    from toolkit.data.tokenising import Encoding

    rows = documents.parent / "rows.jsonl"
    rows.write_text("{}\n")
    encoding = Encoding(settings(documents), AutoTokenizer.from_pretrained(tiny_model))
    keys, prints = [], []
    for text in ("제1조(보고) 7일", "제1조(보고) 8일", "제1조(보고) 7일"):
        (documents / "a_2026-03-01.txt").write_text(text)
        keys.append(store_key(Source(str(rows)), encoding))
        prints.append(retrieval_fingerprint(encoding.config))
    assert keys[0] == keys[2] != keys[1]
    assert prints[0] == prints[2] != prints[1]
    other = replace(encoding, config=settings(documents, passages=1))
    assert store_key(Source(str(rows)), other) not in keys


def test_a_corpus_is_read_once(documents: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    read: list[str] = []
    read_lines = corpus_module.read_lines
    monkeypatch.setattr(
        corpus_module, "read_lines", lambda path, content: (read.append(path.name), read_lines(path, content))[1]
    )
    first = Retriever(Corpus.open(str(documents))).search("보고", 3)
    assert len(read) == 5
    assert Retriever(Corpus.open(str(documents))).search("보고", 3) == first
    assert len(read) == 5
    assert len(Retriever(Corpus.open(str(documents)), is_dense=True).search("보고", 3)) == 3


def test_purge_removes_what_retrieval_keeps(documents: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from toolkit.commands import cache

    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    Retriever(Corpus.open(str(documents)), is_dense=True).search("보고", 3)
    kept = tmp_path / "cache" / "retrieval"
    assert {path.suffix for path in kept.iterdir()} == {".bm25", ".json", ".npy", ".lock"}
    assert cache.main(["purge", "--kind", "retrieval"]) == 0
    assert list(kept.iterdir()) == []


def test_a_stop_is_heard_while_another_process_builds_the_index(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    texts = ["one report", "two deviations"]
    path = index_module.root() / f"{index_module.fingerprint_of(texts)}.lock"
    path.parent.mkdir(parents=True)
    holder = FileLock(path)
    assert holder.acquire()
    monkeypatch.setattr(signals, "stop_requested", lambda: True)
    try:
        with pytest.raises(signals.StopRequested):
            TextIndex(texts)
    finally:
        holder.release()
