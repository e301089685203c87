"""Recognise the translation of a text by what survives it: numbers, units and Latin abbreviations.

``n = 128, p < 0.05, 12.5 mg, HbA1c, CT`` are the same in English and in Korean. Each shared one weighs log(texts /
texts that have it), about the logarithm of how improbable it is by chance; the weights of all are added.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

COVERED = 0.6
"""Share of the weight of the text with less of it that both texts have, from which one translates the other."""
_MARGIN = 8.0
"""How much heavier than log(pairs compared) what both share is; of independent marks that is e⁻⁸ matches by chance."""

_UNITS = (
    "mg|kg|µg|mcg|ng|g|mL|ml|dL|dl|L|l|mmHg|mmol|cm|mm|nm|µm|IU|mEq|Gy|kcal|Hz|kPa|bpm|°C|%"
)  # fmt: skip
_MARKS = re.compile(
    rf"(?P<number>(?<![A-Za-z0-9])\d+(?:[.,·]\d+)*)(?:\s?(?P<unit>{_UNITS})(?![A-Za-z]))?"
    r"|(?P<word>(?<![A-Za-z])[A-Za-z][A-Za-z0-9-]*[A-Za-z0-9])"
)


def marks_of(text: str) -> set[str]:
    """Return the numbers, numbers with units, and abbreviations of a text, in one spelling each."""
    marks = set()
    for match in _MARKS.finditer(unicodedata.normalize("NFKC", text)):
        if match["number"]:
            number = match["number"].replace("·", ".")
            number = re.sub(r",(?=\d{3}(?!\d))", "", number)
            marks.add(number)
            if match["unit"]:
                marks.add(number + match["unit"].lower())
            continue
        word = match["word"]
        if sum(letter.isupper() for letter in word) > 1 or re.search(r"\d", word):
            word = word.removesuffix("s") if word[:-1].isupper() else word
            marks.add(word.replace("-", "").upper())
    return marks


def translations(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Yield pairs (of ours, of theirs) of which one is probably a translation of the other, with the share covered.

    Texts with few marks, such as a question without its contexts, cannot be told.
    """
    our_marks, their_marks = [marks_of(text) for text in ours], [marks_of(text) for text in theirs]
    count = len(ours) + len(theirs)
    frequency = Counter(mark for marks in (*our_marks, *their_marks) for mark in marks)
    weight = {mark: math.log(count / frequency[mark]) for mark in frequency}
    needed = math.log(max(len(ours) * len(theirs), 1)) + _MARGIN
    having: defaultdict[str, list[int]] = defaultdict(list)
    for number, marks in enumerate(their_marks):
        for mark in marks:
            having[mark].append(number)
    weights = [sum(weight[mark] for mark in marks) for marks in their_marks]
    for own, marks in enumerate(our_marks):
        of_own = sum(weight[mark] for mark in marks)
        shared: defaultdict[int, float] = defaultdict(float)
        for mark in marks:
            for number in having.get(mark, ()):
                shared[number] += weight[mark]
        for number, both in sorted(shared.items()):
            covered = both / max(min(of_own, weights[number]), 1e-9)
            if both >= needed and covered >= COVERED:
                yield own, number, covered
