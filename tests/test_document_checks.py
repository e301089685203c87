"""The check of grounded documents finds nothing in the clean samples, and what its rules promise in altered ones."""

from __future__ import annotations

import datetime
import io
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from helpers import ROOT

from toolkit.clinical.document_checks import check_answer, score_citations, unverified
from toolkit.clinical.document_facts import dates_in, drugs_in, later, numbers_in
from toolkit.clinical.document_output import GroundedDocument
from toolkit.clinical.document_text import citations, field_value, sentences
from toolkit.retrieval.corpus import Corpus
from toolkit.retrieval.passages import passages_of

SAMPLES = ROOT / "examples" / "data" / "clinical"
CORPUS = ROOT / "examples" / "data" / "corpus"


@cache
def rows() -> list[dict[str, Any]]:
    """The sample rows, each with all passages of the corpus."""
    texts = [passage.text_in_prompt() for passage in Corpus.open(str(CORPUS)).passages()]
    lines = [
        line
        for language in ("ko", "en")
        for line in (SAMPLES / f"grounded_document_{language}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{**json.loads(line), "PASSAGES": texts} for line in lines]


def test_the_sample_documents_break_no_rule() -> None:
    assert [(row["USUBJID"], str(fault)) for row in rows() for fault in check_answer(row["DOCUMENT"], row)] == []


def test_samples_are_as_many_as_promised_and_cite_what_is_there() -> None:
    languages = [row["LANGUAGE"] for row in rows()]
    assert (languages.count("ko"), languages.count("en")) == (60, 20)
    assert len({row["USUBJID"] for row in rows()}) == 80
    known = set(passages_of(rows()[0]["PASSAGES"]))
    for row in rows():
        cited = citations(row["DOCUMENT"])
        assert cited, row["USUBJID"]
        assert {name[2:] for name in cited if name.startswith("P:")} <= known
        assert all(field_value(row, name) is not None for name in cited if not name.startswith("P:"))


def test_no_two_samples_share_most_of_their_words() -> None:
    for column, most in (("NOTE", 0.5), ("DOCUMENT", 0.75)):
        words = [set(re.findall(r"\w+", re.sub(r"\[[^\]]*\]", "", row[column]))) for row in rows()]
        for number, ours in enumerate(words):
            for other, theirs in enumerate(words[:number]):
                shared = len(ours & theirs) / min(len(ours), len(theirs))
                assert shared <= most, (rows()[number]["USUBJID"], rows()[other]["USUBJID"], column, shared)


def altered(change: Callable[[str, dict[str, Any]], str]) -> list[tuple[str, dict[str, Any]]]:
    """The samples' documents that a change alters, each with its row."""
    changed = [(change(row["DOCUMENT"], row), row) for row in rows()]
    return [(text, row) for text, row in changed if text != row["DOCUMENT"]]


def _other_citation(text: str, row: dict[str, Any]) -> str:
    return re.sub(r"\[P:([\w-]+)/[^\]]+\]", r"[P:\1/99.9]", text, count=1)


def _superseded(text: str, row: dict[str, Any]) -> str:
    day = row["NOTE_DATE"]
    for old, new, since in (("AE-1/3.1", "AE-2/3.1", "2026-03-01"), ("DEV-1/3.1", "DEV-2/3.1", "2026-02-01")):
        if day >= since and f"[P:{new}]" in text:
            return text.replace(f"[P:{new}]", f"[P:{old}]")
    return text


def _number(text: str, row: dict[str, Any]) -> str:
    return re.sub(r"\b(\d+)(시간 이내| hours)", lambda match: f"{int(match[1]) + 13}{match[2]}", text, count=1)


def _date(text: str, row: dict[str, Any]) -> str:
    return re.sub(r"2026-(\d\d)-(\d\d)", lambda match: f"2024-{match[1]}-{match[2]}", text, count=1)


def _deadline(text: str, row: dict[str, Any]) -> str:
    def after(match: re.Match[str]) -> str:
        return (datetime.date.fromisoformat(match[1]) + datetime.timedelta(days=2)).isoformat() + match[2]

    text = re.sub(r"(2026-\d\d-\d\d)((?:까지|인 것))", after, text, count=1)
    return re.sub(r"(?<=by )(2026-\d\d-\d\d)()", after, text, count=1)


def _drug(text: str, row: dict[str, Any]) -> str:
    for name, other in {"세프트리악손": "레보플록사신", "로페라미드": "온단세트론", "clarithromycin": "fluconazole",
                        "Clarithromycin": "Fluconazole", "덱사메타손": "하이드로코르티손", "와파린": "아픽사반",
                        "리바록사반": "아픽사반", "Loperamide": "Ondansetron"}.items():  # fmt: skip
        text = text.replace(name, other)
    return text


def _quote(text: str, row: dict[str, Any]) -> str:
    return re.sub(r"“([^”]+)”", lambda match: f"“{match[1][:-1]}던”", text, count=1)


def _patient(text: str, row: dict[str, Any]) -> str:
    return text.replace(row["USUBJID"], "FROST-01-999") if row["USUBJID"] in text else f"FROST-01-999: {text}"


def _field(text: str, row: dict[str, Any]) -> str:
    return text.replace("[AE.AESTDTC]", "[AE.AEENDTC]") if not re.search("AEENDTC", json.dumps(row["AE"])) else text


def _without(text: str, row: dict[str, Any]) -> str:
    return re.sub(r"\s*\[[^\]]*\]", "", text) if re.search(r"\d", re.sub(r"\[[^\]]*\]", "", text)) else text


@pytest.mark.parametrize(
    ("rule", "change", "least"),
    [
        ("citation", _other_citation, 60), ("in_force", _superseded, 12), ("number", _number, 8), ("date", _date, 60),
        ("deadline", _deadline, 30), ("drug", _drug, 7), ("quote", _quote, 6), ("subject", _patient, 80),
        ("field", _field, 40), ("uncited", _without, 75),
    ],
)  # fmt: skip
def test_every_altered_document_is_found_by_its_rule(rule: str, change: Any, least: int) -> None:
    changed = altered(change)
    assert len(changed) >= least
    missed = [
        (row["USUBJID"], text) for text, row in changed if rule not in {one.rule for one in check_answer(text, row)}
    ]
    assert missed == []


def test_a_fault_names_its_sentence_and_what_was_expected() -> None:
    row = {
        "NOTE": "열 38.6도",
        "NOTE_DATE": "2026-04-02",
        "PASSAGES": ["[P:A/1] 규정 제1조 (2026-01-01 ~)\n7일 이내에 보고한다."],
    }
    faults = check_answer(
        "열이 있었다 [NOTE]. 체온은 39.1도였다 [NOTE]. 보고는 2026-04-10까지이다 [P:A/1] [NOTE_DATE].", row
    )
    assert [(fault.field, fault.rule, fault.value) for fault in faults] == [
        ("sentence 2", "number", "39.1도"), ("sentence 3", "date", "2026-04-10"),
        ("sentence 3", "deadline", "2026-04-10"),
    ]  # fmt: skip
    assert "2026-04-09" in faults[-1].message
    assert check_answer("", row)[0].rule == "uncited"


def test_periods_lists_and_impossible_dates_are_told_apart() -> None:
    text = "[P:A/1] 규정 제1조 (2026-01-01 ~)\n14일까지 금지한다."
    row = {"NOTE": "4/20~4/26 복용", "NOTE_DATE": "2026-04-27", "PASSAGES": [text]}
    assert check_answer("1. 4월 20일부터 4월 26일까지 복용하였고 14일까지 금지한다 [NOTE] [P:A/1].", row) == []
    for date in ("2026-02-30", "2026-13-01", "4월 41일", "2026. 4. 0."):
        assert [(one.rule, one.value) for one in check_answer(f"{date} 복용하였다 [NOTE].", row)] == [("date", date)]


def test_a_month_without_a_day_is_compared_too() -> None:
    row = {"NOTE": "3월 들어서", "NOTE_DATE": "2026-03-18", "AE": [{"AESTDTC": "2026-03"}], "PASSAGES": []}
    assert check_answer("2026년 3월에 시작되었다 [AE.AESTDTC].", row) == []
    assert [one.value for one in check_answer("2026년 4월에 시작되었다 [AE.AESTDTC].", row)] == ["2026년 4월"]
    assert [one.rule for one in check_answer("2026년 3월에 시작되었다.", row)] == ["uncited"]


def test_what_no_rule_sees_is_not_found() -> None:
    row = {"NOTE": "구토는 없음, 열 있음", "NOTE_DATE": "2026-04-02", "PASSAGES": []}
    assert check_answer("구토가 있었다 [NOTE].", row) == []  # a flipped negation: for a person


def test_sentences_keep_dates_and_citations_together() -> None:
    found = sentences("# 제목\n보고는 2026. 3. 5. 하였다. [P:A/1] 열은 38.5℃였다 [NOTE]. 끝.")
    assert [one.is_heading for one in found] == [True, False, False, False]
    assert found[1].passages == ["A/1"]
    assert found[2].fields == ["NOTE"]
    assert [(date.month, date.day) for date in dates_in(found[1].bare)[0]] == [(3, 5)]


def test_facts_are_found_as_they_are_written() -> None:
    assert [(value, unit) for value, unit, _ in numbers_in("FRL-101 10mg 하루 1,200 mL 3.50 on 5 March")] == [
        ("10", "mg"), ("1200", "ml"), ("3.5", ""),
    ]  # fmt: skip
    assert set(drugs_in("타이레놀을 먹고 rosuvastatin 10, 피타바스타틴도")) == {
        "acetaminophen",
        "rosuvastatin",
        "피타바스타틴",
    }
    assert later(datetime.date(2026, 1, 31), 1, "month") == datetime.date(2026, 2, 28)
    assert later(datetime.date(2026, 1, 31), 25, "hour") == datetime.date(2026, 2, 2)


def test_citations_are_scored_apart_from_words() -> None:
    score = score_citations(["가 [P:A/1] [NOTE].", "x"], ["나 [P:A/1] [P:A/2].", "y [NOTE]."])
    assert (score.cited, score.expected, score.right) == (2, 3, 1)
    assert (score.precision, score.recall) == (1 / 2, 1 / 3)


def test_a_document_is_written_with_sources_marks_and_its_use() -> None:
    row = {"NOTE": "열 38.6도", "NOTE_DATE": "2026-04-02", "LANGUAGE": "ko",
           "PASSAGES": ["[P:A/1] 규정 제1조 (2026-01-01 ~)\n보고한다."]}  # fmt: skip
    answer = "# 보고\n열이 있었다 [NOTE]. 체온은 39.1도였다 [P:A/1]. 근거 없음."
    document = GroundedDocument.of(answer, row)
    text = document.markdown()
    assert text.startswith("> 연구용이며 진료에 쓰지 않습니다.")
    assert "열이 있었다 [1].\n" in text
    assert "체온은 39.1도였다 [2]. **⚠ 확인되지 않음: number: 39.1도**" in text
    assert "근거 없음. **⚠ 확인되지 않음: uncited**" in text
    assert "2. P:A/1: 규정 제1조 (2026-01-01 ~): 보고한다." in text
    assert set(unverified(answer, row)) == {3, 4}
    GroundedDocument.of("열\x1b[31m이 있었다 \x00\ufffe[NOTE].", row).docx()  # which XML could not hold
    import docx

    paragraphs = docx.Document(io.BytesIO(document.docx())).paragraphs
    assert paragraphs[0].text == "연구용이며 진료에 쓰지 않습니다."
    marked = [run.text for paragraph in paragraphs for run in paragraph.runs if run.font.highlight_color]
    assert marked == ["체온은 39.1도였다 [2].", "근거 없음."]
    assert "[2] P:A/1: 규정 제1조 (2026-01-01 ~): 보고한다." in [paragraph.text for paragraph in paragraphs]


def test_evaluation_scores_citations_and_verified_sentences() -> None:
    from toolkit.data.row_samples import RowSample
    from toolkit.evaluation.documents import metrics_of_documents
    from toolkit.tasks.choose import load_task

    task = load_task("grounded_document")
    samples = [RowSample(row["USUBJID"], task.read(row), task, values=row) for row in rows()[:2]]
    right = {one.name: one.value for one in metrics_of_documents(samples, [row["DOCUMENT"] for row in rows()[:2]])}
    assert right == {"citation_precision": 1, "citation_recall": 1, "verified": 1}
    wrong = {one.name: one.value for one in metrics_of_documents(samples, ["열은 41.7도였다 [NOTE]. 괜찮다.", ""])}
    cited = sum(len(citations(row["DOCUMENT"])) for row in rows()[:2])
    assert wrong == {"citation_precision": 1, "citation_recall": 1 / cited, "verified": 1 / 3}
