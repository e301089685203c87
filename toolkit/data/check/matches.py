"""Find rows that are alike, within a part of the data and across parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from toolkit.data.check.report import Match, MatchKind
from toolkit.data.check.samples import CheckedSample
from toolkit.data.check.similarity import near_pairs
from toolkit.data.check.translation import translations

_LONG_ANSWER, _LONG_CONTEXT = 40, 120
"""Letters from which an answer, or the contexts, of two rows are the same by more than chance."""


def find_matches(samples: Sequence[CheckedSample], others: Sequence[CheckedSample]) -> tuple[list[Match], list[Match]]:
    """Return the pairs of rows that are alike within a part, and those in different parts (leaks).

    Of several copies, each is paired with the first. ``others`` are rows of named test sets, which are not compared
    with each other. A translation is looked for between training rows and all that are not.
    """
    named = {sample.part for sample in others}
    within: list[Match] = []
    found: list[Match] = []
    for match in _alike([*others, *samples]):
        if match.part in named and match.other_part in named:
            continue
        if match.part != match.other_part:
            found.append(match)
        elif match.kind not in ("same answer", "same contexts"):
            within.append(match)
    known = {frozenset((match.row, match.other)) for match in found}
    train = [sample for sample in samples if sample.part == "train"]
    held_out = [sample for sample in (*samples, *others) if sample.part != "train"]
    for own, other, covered in translations([each.text for each in train], [each.text for each in held_out]):
        if frozenset((train[own].origin, held_out[other].origin)) not in known:
            found.append(_match("translation", train[own], held_out[other], covered))
    return within, found


def _alike(samples: Sequence[CheckedSample]) -> Iterator[Match]:
    """Yield pairs of rows that are the same, nearly so, or in a part; each pair once, by the strongest reason."""
    answers = [sample.answer_key if len(sample.answer_key) >= _LONG_ANSWER else "" for sample in samples]
    contexts = [sample.context_key if len(sample.context_key) >= _LONG_CONTEXT else "" for sample in samples]
    reasons: list[tuple[MatchKind, list[str]]] = [
        ("same row", [sample.question_key + "|" + sample.answer_key + "|" + sample.context_key for sample in samples]),
        ("same question", [sample.question_key for sample in samples]),
        ("same answer", answers),
        ("same contexts", contexts),
    ]
    seen: set[tuple[int, int]] = set()
    for kind, keys in reasons:
        for earlier, later in _equal(keys, samples):
            if (earlier, later) not in seen:
                seen.add((earlier, later))
                yield _match(kind, samples[later], samples[earlier], 1.0)
    for texts in ([each.question_key + each.answer_key for each in samples], [each.question_key for each in samples]):
        copies: dict[tuple[str, str], int] = {}
        for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
            copies.setdefault((sample.part, text), row)
        first = sorted(copies.values())  # of each text in each part; its copies are paired with it above
        for one, other, similarity in near_pairs([texts[row] for row in first]):
            earlier, later = first[one], first[other]
            if (earlier, later) not in seen:
                seen.add((earlier, later))
                yield _match("near-duplicate", samples[later], samples[earlier], similarity)


def _equal(keys: Sequence[str], samples: Sequence[CheckedSample]) -> Iterator[tuple[int, int]]:
    """Yield each row with the first row of each part that has the same key; empty keys equal none."""
    first: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for number, key in enumerate(keys):
        if key:
            for earlier in first[key].values():
                yield earlier, number
            first[key].setdefault(samples[number].part, number)


def _match(kind: MatchKind, row: CheckedSample, other: CheckedSample, similarity: float) -> Match:
    return Match(kind, row.origin, row.part, other.origin, other.part, round(similarity, 3))
