"""Text to token ids: as a whole, or in pieces where a row's text is not to be read as control tokens."""

from __future__ import annotations

import re
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_turns import is_thought
from toolkit.tasks.pubmedqa import RowFaultError

_CUT = "\ufdd0"
"""A code point that is no character, by Unicode's promise: marks where two pieces meet."""

_ANCHORS = ("\n", ":")
"""Texts that the next one may follow."""


class Pieces:
    """Tokenises the text of conversations.

    Args:
        tokenizer: fast or slow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._leading = self._find_leading()

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """Pattern of the texts that the tokenizer would read as control tokens; thoughts may stand in an answer."""
        template = str(self._tokenizer.chat_template or "")
        added = self._tokenizer.added_tokens_decoder.values()
        marks = {token.content for token in added if token.special or token.content in template}
        marks |= set(self._tokenizer.all_special_tokens)
        marks = {mark for mark in marks if len(mark.strip()) > 1 and not is_thought(mark)}
        return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True)))) if marks else None

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset({*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder})

    def is_mark(self, token: int) -> bool:
        """Return whether a token is special or added; some tokenizers add blanks and bytes so, which are text."""
        return token in self._added and bool(self._text((token,)).strip())

    def is_word(self, token: int) -> bool:
        """Return whether a token is a piece of a word, as far as the tokenizer tells."""
        if not self._tokenizer.is_fast or token in self._added:
            return False
        return not re.fullmatch(r"\s*[<\[].+[>\]]\s*", self._text((token,)))

    def as_text(self, *texts: str) -> tuple[list[str], str]:
        """Mark ``texts`` so that ``ids`` finds no control token in them; return the first that stands there, if any.

        Raises:
            RowFaultError: a text holds the mark itself.
        """
        if any(_CUT in text for text in texts):
            raise RowFaultError("holds the code point U+FDD0, which is no character; remove it")
        found = next(filter(None, (self._control.search(text) for text in texts)), None) if self._control else None
        if found is None:
            return list(texts), ""
        return [self._divided(text) for text in texts], found[0]

    def ids(self, text: str) -> tuple[int, ...]:
        """Encode ``text`` without the tokens that the tokenizer would add."""
        first, *rest = text.split(_CUT)
        ids = self._plain(first)
        for piece in rest:
            ids += self._continued(piece)
        return ids

    def beginning(self, text: str) -> tuple[int, ...]:
        """Encode a text that begins a sample, after the tokens that the tokenizer begins one with, if it does."""
        return self.put_before(text) + self.ids(text)

    def put_before(self, text: str) -> tuple[int, ...]:
        """Return the tokens that begin a text by the tokenizer, unless ``text`` has them; templates write the BOS."""
        return () if self.ids(text)[: len(self._leading)] == self._leading else self._leading

    def following(self, before: str, text: str) -> tuple[int, ...]:
        """Encode ``text`` as it follows ``before`` where both are tokenised at once, as one text.

        They are cut where ``before`` ends. A token that lies on both sides is taken apart: ``before`` keeps the ids
        that it has alone, which generation starts from, and the rest is tokenised as a continuation.
        """
        before = self._since_last_mark(before)
        first, whole = self.ids(before), self.ids(before + text)
        if whole[: len(first)] == first:
            return whole[len(first) :]
        if self._tokenizer.is_fast and _CUT not in before + text:
            cut = self._cut_at_offsets(before, text)
            if self._text(first + cut) == self._text(whole):
                return cut
        return tuple(token for piece in text.split(_CUT) for token in self._continued(piece))

    def _since_last_mark(self, text: str) -> str:
        """Return the end of a text from its last control token on; tokenizers read what follows one by itself."""
        marks = list(self._control.finditer(text)) if self._control else []
        return text[marks[-1].start() :] if marks else text

    def _cut_at_offsets(self, before: str, text: str) -> tuple[int, ...]:
        both = before + text
        coded = self._tokenizer(both, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = list(zip(coded.input_ids, coded.offset_mapping, strict=True))
        at = next((n for n, (_, (start, _)) in enumerate(spans) if start >= len(before)), len(spans))
        shared = spans[at][1][0] if at < len(spans) else len(both)
        return self._continued(both[len(before) : shared]) + tuple(token for token, _ in spans[at:])

    def _continued(self, text: str) -> tuple[int, ...]:
        """Encode a text that follows another, so that no space is put before it."""
        for anchor in _ANCHORS:
            lead, both = self._plain(anchor), self._plain(anchor + text)
            if both[: len(lead)] == lead:
                return both[len(lead) :]
        return self._plain(text)

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _text(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _divided(self, text: str) -> str:
        """Cut each control token's text in ``text``."""
        assert self._control is not None
        while self._control.search(text):  # what is left of one may hold another
            text = self._control.sub(lambda found: f"{found[0][0]}{_CUT}{found[0][1:]}", text)
        return text

    def _find_leading(self) -> tuple[int, ...]:
        """Find the tokens that the tokenizer puts before a text (BOS), be it the one that also ends one."""
        alone, text = self._plain("a"), tuple(self._tokenizer("a", verbose=False).input_ids)
        for start in range(len(text) - len(alone) + 1):
            if text[start : start + len(alone)] == alone:
                return text[:start]
        return ()
