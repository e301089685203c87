"""Measure retrieval among 10,000 Korean and English passages: recall@5 and time a query, beside plain BM25 and dense.

    python -m benchmarks.retrieval [--passages 10000] [--questions 200]

The passages are those of examples/data/corpus, and made-up rules, each a combination of who, what, when and how, until
there are as many as asked. Two sets of queries: note and request of the sample cases, whose passages are those that
their documents cite; and made-up questions, each on one made-up rule, with other particles and endings and without one
part. Made-up rules are alike, so their recall says how methods compare and nothing of real texts. Times are of the
processor, in one process after a first query; the index is built once and then opened.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.retrieval.corpus import Corpus  # noqa: E402
from toolkit.retrieval.dense import DenseIndex  # noqa: E402
from toolkit.retrieval.index import TextIndex  # noqa: E402
from toolkit.retrieval.retriever import fuse  # noqa: E402

_TOP, _FUSED = 5, 100
_WHO = (
    "시험책임자",
    "시험담당자",
    "모니터요원",
    "관리약사",
    "심사위원회",
    "의뢰자",
    "자료관리자",
    "통계담당자",
    "연구간호사",
    "검사실",
)
_WHAT = (
    "동의서 사본", "검체 운송 기록", "온도 기록지", "배정 봉투", "이상사례 목록", "심전도 판독지", "약 반납 기록",
    "방문 일정표", "교육 이수증", "위임 목록", "영상 원본", "질의 목록", "채혈 시각", "병용약 목록", "증례기록서",
    "점검 보고서", "서명 대장", "기기 교정 기록", "보관 상자", "환자 일지",
)  # fmt: skip
_WHEN = (
    "방문 당일에", "다음 날까지", "매주 월요일에", "분기마다", "시험이 끝난 뒤", "첫 투여 전에", "퇴원할 때",
    "요청을 받으면", "변경이 있을 때마다", "매년 3월에",
)  # fmt: skip
_HOW = ("원본과 대조하여", "잠금 장치가 있는 곳에", "두 사람이 함께", "전자 시스템으로", "밀봉하여")
_DO = (
    ("확인한다", "확인해야 하나요"), ("보관한다", "보관하는 방법"), ("제출한다", "제출하라는 규정"),
    ("폐기한다", "폐기해도 되는지"), ("검토한다", "검토했는지 묻는 경우"),
)  # fmt: skip

Search = Callable[[str, int], list[int]]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FROSTLINE_CACHE"] = folder
        print("| method | recall@5, sample cases | recall@5, made-up questions | ms a query | s to build | s to open |")
        print("|---|---|---|---|---|---|")
        for line in compare(arguments.passages, arguments.questions):
            print(line, flush=True)


def compare(count: int, questions: int) -> list[str]:
    """Return a line of the table for each method."""
    passages = Corpus.open(str(ROOT / "examples" / "data" / "corpus")).passages()
    made, asked = make_rules(count - len(passages))
    texts = [f"{passage.place}\n{passage.text}" for passage in passages] + made
    numbers = {passage.id: number for number, passage in enumerate(passages)}
    cases = _cases(numbers)
    rng = random.Random(0)
    chosen = rng.sample(range(len(made)), min(questions, len(made)))
    made_up = [(asked[number], {len(passages) + number}) for number in chosen]
    opened: dict[str, Search] = {}
    lines = []
    for name, open_method in _methods(texts, opened).items():
        built, opened[name] = _timed(open_method)
        again, search = _timed(open_method)
        search("처음", _TOP)
        began = time.process_time()
        found = [recall(search, queries) for queries in (cases, made_up)]
        each = (time.process_time() - began) / (len(cases) + len(made_up)) * 1000
        lines.append(f"| {name} | {found[0]:.3f} | {found[1]:.3f} | {each:.2f} | {built:.1f} | {again:.2f} |")
    return lines


def _methods(texts: Sequence[str], opened: dict[str, Search]) -> dict[str, Callable[[], Search]]:
    """Return what opens each method; the last fuses those before it that are ``opened``."""

    def morphemes() -> Search:
        index = TextIndex(texts)
        return lambda query, k: [number for number, _ in index.search(query, k)]

    def dense() -> Search:
        index = DenseIndex(texts)
        return lambda query, k: [number for number, _ in index.search(query, k)]

    def both() -> Search:
        first, second = opened[_OURS], opened[_DENSE]
        return lambda query, k: fuse([first(query, _FUSED), second(query, _FUSED)])[:k]

    return {_PLAIN: lambda: whitespace_search(texts), _OURS: morphemes, _DENSE: dense, "both, by rank fusion": both}


_PLAIN, _OURS, _DENSE = "BM25 on words between blanks", "BM25 on morphemes (ours)", "dense vectors (WordLlama)"


def whitespace_search(texts: Sequence[str]) -> Search:
    """Return a search by bm25s over lower-cased words between blanks, which is built anew each time."""
    import bm25s

    index = bm25s.BM25()
    index.index([text.lower().split() for text in texts], show_progress=False)

    def search(query: str, k: int) -> list[int]:
        terms = [word for word in query.lower().split() if word in index.vocab_dict]
        if not terms:
            return []
        found, _ = index.retrieve([terms], k=k, show_progress=False)
        return [int(number) for number in found[0]]

    return search


def recall(search: Search, queries: Sequence[tuple[str, set[int]]]) -> float:
    """Return the share of wanted passages that are among the first five of their queries."""
    hits = sum(len(wanted & set(search(query, _TOP))) for query, wanted in queries)
    return hits / sum(len(wanted) for _, wanted in queries)


def make_rules(count: int) -> tuple[list[str], list[str]]:
    """Return so many made-up rules, and a question on each."""
    combinations = list(itertools.product(_WHO, _WHAT, _WHEN, _HOW, range(len(_DO))))
    rng = random.Random(1)
    rules, questions = [], []
    for who, what, when, how, do in rng.sample(combinations, count):
        does, asks = _DO[do]
        rules.append(f"{who}는 {what}를 {when} {how} {does}.")
        parts = [f"{who}가", f"{what}의", when.rstrip("에"), how]
        parts.pop(rng.choice((2, 3)))
        questions.append(" ".join([*parts, asks]))
    return rules, questions


def _cases(numbers: dict[str, int]) -> list[tuple[str, set[int]]]:
    """Return note and request of the sample cases, each with the numbers of the passages that its document cites."""
    from toolkit.clinical.document_text import PASSAGE

    found = []
    for language in ("ko", "en"):
        path = ROOT / "examples" / "data" / "clinical" / f"grounded_document_{language}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if cited := {numbers[name] for name in PASSAGE.findall(row["DOCUMENT"])}:
                found.append((f"{row['NOTE']} {row['REQUEST']}", cited))
    return found


def _timed(action: Callable[[], Search]) -> tuple[float, Search]:
    began = time.process_time()
    result = action()
    return time.process_time() - began, result


if __name__ == "__main__":
    main()
