"""Overlap with a reference is that of sacrebleu and rouge_score on any texts, Korean and English."""

from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from toolkit.metrics import morphemes as module
from toolkit.metrics.morphemes import is_korean, morphemes, words
from toolkit.metrics.overlap import exact_match, overlap_metrics, rouge_l
from toolkit.metrics.resampling import bootstrap, resample_weights
from toolkit.runtime.errors import DataError, UsageError

TEXT = st.lists(st.sampled_from([*"abc가나다.,", "환자는", "3.5배", "the", "drug"]), max_size=9).map(" ".join)
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6)


@given(PAIRS, st.sampled_from(["13a", "char", "none"]), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_sums_over_any_resample_score_as_sacrebleu_does_its_texts(
    pairs: list[tuple[str, str]], tokenizer: str, seed: int
) -> None:
    answers, references = map(list, zip(*pairs, strict=True))
    chrf, bleu = overlap_metrics(answers, references, None, tokenizer)[:2]
    weights = resample_weights(len(pairs), seed=seed, resamples=3)
    for counts in (np.ones(len(pairs)), *weights):
        rows = np.repeat(np.arange(len(pairs)), counts.astype(int)).tolist()
        texts = [answers[row] for row in rows], [[references[row] for row in rows]]
        for metric, public in ((chrf, CHRF(word_order=2)), (bleu, BLEU(force=True, tokenize=tokenizer))):
            own = float(metric.score(counts @ metric.statistics))
            assert own == pytest.approx(public.corpus_score(*texts).score, abs=1e-9)


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
@settings(max_examples=200, deadline=None)
def test_rouge_l_is_rouge_scores_on_any_tokens(answer: list[str], reference: list[str]) -> None:
    class Blanks:
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    public = RougeScorer(["rougeL"], tokenizer=Blanks()).score(" ".join(reference), " ".join(answer))["rougeL"]
    assert rouge_l(answer, reference) == pytest.approx(public.fmeasure, abs=1e-12)


def test_an_empty_answer_scores_nothing_and_one_row_has_an_interval_of_no_width() -> None:
    for metric in overlap_metrics([""], ["환자는 퇴원하였다"], words):
        assert metric.value == 0
        interval = bootstrap(metric, resample_weights(1))
        assert (interval.low, interval.high) == (0, 0)


def test_identical_korean_sentences_score_full_marks_by_every_metric() -> None:
    text = ["아스피린은 심근경색의 위험을 낮춥니다."]
    found = {metric.name: metric.value for metric in overlap_metrics(text, text, morphemes)}
    assert found == pytest.approx({"chrf++": 100, "bleu": 100, "rouge_l": 1, "token_f1": 1, "exact_match": 1})


def test_other_unicode_forms_case_and_blanks_are_the_same_answer() -> None:
    decomposed = unicodedata.normalize("NFD", "효과가  없었다\n")
    assert exact_match([decomposed, "Yes ", "no"], ["효과가 없었다", " yes", "no."]).value == pytest.approx(2 / 3)


def test_decomposed_hangul_is_as_korean_as_composed() -> None:
    for text in ("약물 dose", "약물 of the whole trial"):
        assert is_korean([text]) == is_korean([unicodedata.normalize("NFD", text)])
    assert not is_korean(["", "12 %"])


def test_rows_that_do_not_pair_are_refused() -> None:
    with pytest.raises(DataError, match="1 answers and 2 references; expected one of each for every row"):
        overlap_metrics(["a"], ["a", "b"], words)
    with pytest.raises(DataError, match=r"0 answers and 0 references; .* at least one row"):
        overlap_metrics([], [], words)


def test_a_bleu_tokenizer_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"the tokenizer of BLEU is 'kiwi'; expected one of sacrebleu's: .*13a"):
        overlap_metrics(["a"], ["a"], None, "kiwi")

    def fails(**options: object) -> None:
        raise RuntimeError("\nPlease install mecab_ko\n")

    monkeypatch.setattr("sacrebleu.metrics.bleu._get_tokenizer", lambda name: fails)
    with pytest.raises(UsageError, match="cannot use the tokenizer 'ko-mecab': Please install mecab_ko"):
        overlap_metrics(["a"], ["a"], None, "ko-mecab")


def test_morphemes_without_kiwi_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    with pytest.raises(UsageError, match="pip install kiwipiepy"):
        module.kiwi.__wrapped__()
