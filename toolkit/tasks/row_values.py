"""Read values of a row as text, lists of texts or a choice, or say in words why they cannot be used."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.tasks.missing import is_field_word, is_missing, is_never_text, is_word_of_r
from toolkit.tasks.printed_lists import PrintedListError, parse_printed_list
from toolkit.tasks.sample import RowFaultError

_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
"""A NUL, or half of a surrogate pair: what no text holds."""
_INVISIBLE = re.compile(
    "[\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\x01-\x1f\x7f-\x9f\U000e0000-\U000e007f\U000e0100-\U000e01ef]*"
)
"""Blanks, joiners, fillers, control characters and marks that show nothing."""

COUNTED_OTHERWISE = ", so those of the other rows may be meant otherwise too: state where they begin"
"""End of the fault of a row that shows that a file counts its options from 0, and was not said to."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Letters of options, in order."""


@dataclass
class RowValues:
    """Reads the values of one row; remembers whether a text had to be normalised."""

    normalize: bool = True
    """Bring texts into Unicode's composed form (NFC)."""
    normalised: bool = False
    """True if some text was not in that form."""

    def clean(self, text: str, name: str) -> str:
        """Return a text in composed form; RowFaultError if it holds what is no text."""
        if found := _NO_TEXT.search(text):
            what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair"
            raise RowFaultError(f"has {what} in {name}, which is no text; remove it")
        if self.normalize and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            self.normalised = True
            return unicodedata.normalize("NFC", text)
        return text

    def text(self, value: Any, name: str) -> str:
        """Return a text, stripped; RowFaultError if it is none, is empty, or a printed missing value."""
        if value is None:
            raise RowFaultError(f"has null in {name}; expected text")
        if is_missing(value):
            raise RowFaultError(f"has NaN in {name}, as tables print a missing value; expected text")
        if isinstance(value, list) and any(isinstance(one, Mapping) and "role" in one for one in value):
            raise RowFaultError(
                f"has messages in {name}; expected text. Join all of a row's messages in one column messages, and set "
                "data.train_on: last if only the last answer is to be learned"
            )
        if not isinstance(value, str):
            raise RowFaultError(f"has a {type(value).__name__} in {name}; expected text")
        if not value.strip():
            raise RowFaultError(f"has an empty {name}; expected text")
        if is_never_text(value):
            raise RowFaultError(f"has {value.strip()} in {name}, as tables print a missing value; expected text")
        if is_word_of_r(value):
            raise RowFaultError(
                f"has {value.strip()} in {name}, as R prints a missing value; expected text. If it is meant, save the "
                "rows as JSON lines; as a label, name it in output of data.task"
            )
        if _INVISIBLE.fullmatch(value):
            marks = ", ".join(sorted({f"U+{ord(mark):04X}" for mark in value if not mark.isspace()}))
            raise RowFaultError(f"has only invisible characters ({marks}) in {name}; expected text")
        return self.clean(value.strip(), name)

    def texts(self, value: Any, name: str, key: str) -> tuple[str, ...]:
        """Return the texts of a list, one text, an object that has them at ``key``, or of any of these printed.

        Empty ones are left out.
        """
        value = _unprinted_texts(value, name)
        if isinstance(value, Mapping):  # as in qiaojin/PubMedQA, whose object also holds labels and headings
            lists = [part for own, part in value.items() if str(own).lower() == key.lower()]
            if len(lists) != 1:
                raise RowFaultError(
                    f"has in {name} an object with {', '.join(map(str, value)) or 'nothing'}; expected text, a list of "
                    f"texts, or an object with such a list as {key.lower()}"
                )
            value = _unprinted_texts(lists[0], name)
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, Sequence):
            raise RowFaultError(f"has {type(value).__name__} in {name}; expected text or a list of texts")
        if not all(isinstance(part, str) for part in value):
            kinds = sorted({type(part).__name__ for part in value})
            where = f"; name the texts' path in data.task, as in {name}[].text" if kinds == ["dict"] else ""
            raise RowFaultError(f"has {kinds} in {name}; expected text or a list of texts{where}")
        parts = [self.clean(part.strip(), name) for part in value]
        return tuple(part for part in parts if part and not _INVISIBLE.fullmatch(part))

    def options(self, value: Any, name: str) -> tuple[str, ...]:
        """Return the options of a question: a list, or the values of an object, in the order of letters as keys.

        Of an object the last ones may be empty, as tables write questions that have fewer options than others.
        """
        value = _unprinted_texts(value, name)
        if isinstance(value, Mapping):
            value = _in_order(value, name)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise RowFaultError(f"has a {type(value).__name__} in {name}; expected a list of options")
        if any(isinstance(one, Mapping) for one in value):
            raise RowFaultError(f"has objects in {name}; name the options' path in data.task, as in {name}[].text")
        value = [f"{one}" if isinstance(one, int | float) and not is_missing(one) else one for one in value]
        return tuple(self.text(one, name) for one in value)


def choose(
    value: Any, options: Sequence[str], name: str, first_number: int | None, is_fixed: bool, marks: Sequence[str] = ()
) -> int:
    """Return the index of the option that a row's answer names by its mark, by number, by letter, or by its text.

    Args:
        value: the answer.
        options: texts of the options.
        name: its column, for messages.
        first_number: number of the first option; None if the task does not state it: 1, of options that rows bring.
        is_fixed: whether they are a fixed list of labels. Where an answer is the number or letter of one option and the
            text of another, the text counts in such a list, and else a number whose first is stated.
        marks: what the row itself calls each option; none if it does not.

    Raises:
        RowFaultError: it names none, or two; or it is a number of a fixed list and their first is not stated.
    """
    if is_missing(value):
        raise RowFaultError(f"has no answer in {name}; expected one of the {len(options)} options")
    whole = isinstance(value, float) and value.is_integer()
    text = unicodedata.normalize("NFC", str(int(value) if whole else value).strip())
    if text in marks:
        return marks.index(text)
    same = _with_text(options, text)
    mark = unicodedata.normalize("NFKC", text).strip("().").upper()  # of circled and full-width ones the plain one
    marked: int | None = None
    if (number := re.fullmatch(r"(-?\d+)(?:\.0+)?", mark)) and not isinstance(value, bool):
        marked = int(number[1]) - (1 if first_number is None else first_number)
    elif len(mark) == 1 and mark in LETTERS:
        marked = LETTERS.index(mark)
    if is_fixed and number and first_number is None and not same:
        raise RowFaultError(
            f"has {text} in {name}, a number, and the answers are the labels {', '.join(options)[:200]}; state "
            f"first_number in data.task, which is 0 if {options[0][:40]} is number 0{COUNTED_OTHERWISE}"
        )
    is_marked = marked is not None and 0 <= marked < len(options)
    counts_numbers = not is_fixed and first_number is not None
    if is_marked and ((counts_numbers and number) or not same):
        return marked or 0
    if is_marked and not is_fixed and first_number is None and same and same != [marked]:
        raise RowFaultError(
            f"has {text} in {name}, which is the {'number' if number else 'letter'} of one option and the text of "
            "another; state first_number in data.task if answers are numbers, or map a column that has them as such"
        )
    if len(same) > 1:
        raise RowFaultError(f"has {text[:60]!r} in {name}, which is the text of {len(same)} options; keep one of them")
    if same:
        return same[0]
    if number and marked is not None:
        counted = f"numbers count from {int(number[1]) - marked} here (first_number in data.task)"
        if marked == -1 and first_number is None:
            counted += COUNTED_OTHERWISE
        raise RowFaultError(f"has {text} in {name}, and {len(options)} options; {counted}")
    shown = ", ".join(options)
    raise RowFaultError(
        f"has {text[:60]!r} in {name}; expected a number, a letter or the text of one of: {shown[:200]}"
    )


def _with_text(options: Sequence[str], text: str) -> list[int]:
    """Return the indices of the options that are a text, or else are it but for the case of letters."""
    composed = [unicodedata.normalize("NFC", option) for option in options]
    same = [index for index, option in enumerate(composed) if option == text]
    return same or [index for index, option in enumerate(composed) if option.casefold() == text.casefold()]


def without_gaps(named: Sequence[tuple[str, Any]]) -> list[Any]:
    """Return the values of named options without empty ones at the end.

    Raises:
        RowFaultError: one before others is empty, so that letters and numbers would name the wrong ones.
    """
    found = list(named)
    while found and _is_blank(found[-1][1]):
        found.pop()
    for name, value in found:
        if _is_blank(value):
            raise RowFaultError(f"has no option {name}, and has {found[-1][0]} after it; expected options without gaps")
    return [value for _, value in found]


def _is_blank(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and (not value.strip() or is_never_text(value)))


def _in_order(options: Mapping[Any, Any], name: str) -> list[Any]:
    """Return the options of an object: by letter or number if those are its keys, or else as they stand."""
    named = [(str(key).strip(), option) for key, option in options.items()]
    keys = [key.upper() for key, _ in named]
    if keys and all(len(key) == 1 and key in LETTERS for key in keys):
        of_letter = {key.upper(): option for key, option in named}
        named = [(letter, of_letter.get(letter)) for letter in LETTERS[: LETTERS.index(max(keys)) + 1]]
    elif keys and all(key.isdecimal() for key in keys):
        named.sort(key=lambda one: int(one[0]))
    return without_gaps([(f"{name}.{key}", option) for key, option in named])


def unprinted(value: Any, name: str) -> Any:
    """Return the list or object that a text field holds printed; other values as they are.

    Raises:
        RowFaultError: it is a printed list whose items cannot be told.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_printed_list(value)
    except PrintedListError as fault:
        raise RowFaultError(
            f"has in {name} a printed list that {fault}; save the rows as JSON lines or Parquet, which keep lists"
        ) from None


def _unprinted_texts(value: Any, name: str) -> Any:
    """Return what ``unprinted`` does, and no texts for a word that tables print for an empty field."""
    return () if isinstance(value, str) and is_field_word(value) else unprinted(value, name)
