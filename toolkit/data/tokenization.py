"""Tokenise text as a whole, or in pieces where a row's text is not to be read as control tokens."""

from __future__ import annotations

import re
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from toolkit.data.chat_turns import is_thought
from toolkit.runtime.rust_panic import explain_panic
from toolkit.tasks.sample import RowFaultError

_SEPARATOR = "\ufdd0"
"""Separator of pieces within a text: a code point that Unicode guarantees never to be a character."""

_ANCHORS = ("\n", ":")
"""Texts that a continuation is tokenised after, to keep the tokenizer from putting a space before it."""


class Pieces:
    """Tokenises conversations in pieces, so that control tokens within a row's text are encoded as plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parses_special: bool = False) -> None:
        self._tokenizer, self._parses_special = tokenizer, parses_special
        self._bos_ids = self._find_bos_ids()

    @cached_property
    def _control_pattern(self) -> re.Pattern[str] | None:
        """Return the pattern of texts that the tokenizer would read as control tokens; None if there are none.

        Marks of a thought are left out: an answer may hold them.
        """
        template = str(self._tokenizer.chat_template or "")
        added = self._tokenizer.added_tokens_decoder.values()
        marks = {token.content for token in added if token.special or token.content in template}
        marks |= set(self._tokenizer.all_special_tokens)
        marks = {mark for mark in marks if len(mark.strip()) > 1 and not is_thought(mark)}
        return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True)))) if marks else None

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        """Return the ids of the tokens that are special or added to the vocabulary."""
        return frozenset({*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder})

    def is_mark(self, token: int) -> bool:
        """Return whether a token is special or added, and not blank: some tokenizers add blanks, which are text."""
        return token in self._added_ids and bool(self._decode((token,)).strip())

    def is_word(self, token: int) -> bool:
        """Return whether a token is a piece of a word; False if the tokenizer does not tell."""
        if not self._tokenizer.is_fast or token in self._added_ids:
            return False
        return not re.fullmatch(r"\s*[<\[].+[>\]]\s*", self._decode((token,)))

    def escape_control_tokens(self, *texts: str) -> tuple[list[str], str]:
        """Split the control tokens in ``texts``, so that ``encode`` reads them as plain text.

        Returns the texts, and the first control token in them, or an empty string. Where control tokens are to be read
        as such (``parses_special``), the texts are returned as they are.

        Raises:
            RowFaultError: a text contains the separator of pieces.
        """
        if any(_SEPARATOR in text for text in texts):
            raise RowFaultError("holds the code point U+FDD0, which is no character; remove it")
        if self._control_pattern:
            for text in texts:
                if match := self._control_pattern.search(text):
                    if self._parses_special:
                        return list(texts), match[0]
                    return [self._split_control_tokens(text) for text in texts], match[0]
        return list(texts), ""

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode ``text`` without the tokens that the tokenizer puts before or after a text."""
        first, *rest = text.split(_SEPARATOR)
        ids = self._encode_plain(first)
        for piece in rest:
            ids += self._encode_continuation(piece)
        return ids

    def encode_with_bos(self, text: str) -> tuple[int, ...]:
        """Encode a text that begins a sample, after the tokens that the tokenizer puts before a text (BOS)."""
        ids = self.encode(text)
        return ids if ids[: len(self._bos_ids)] == self._bos_ids else self._bos_ids + ids

    def bos_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens that the tokenizer puts before a text; none if ``text`` has them (from a template)."""
        return () if self.encode(text)[: len(self._bos_ids)] == self._bos_ids else self._bos_ids

    def encode_after(self, before: str, text: str) -> tuple[int, ...]:
        """Encode ``text`` as it is tokenised after ``before`` in one text.

        The ids are cut where ``before`` ends. A token that spans the cut is replaced: ``before`` keeps the ids that it
        has alone, from which generation starts, and the rest of the token's text is encoded as a continuation.
        """
        if self._control_pattern:  # tokenizers encode what follows a control token independently
            before = before[max((mark.start() for mark in self._control_pattern.finditer(before)), default=0) :]
        first, whole = self.encode(before), self.encode(before + text)
        if whole[: len(first)] == first:
            return whole[len(first) :]
        if self._tokenizer.is_fast and _SEPARATOR not in before + text:
            cut = self._cut_at_offsets(before, text)
            if self._decode(first + cut) == self._decode(whole):
                return cut
        return tuple(token for piece in text.split(_SEPARATOR) for token in self._encode_continuation(piece))

    def _cut_at_offsets(self, before: str, text: str) -> tuple[int, ...]:
        """Encode ``before + text`` at once and return the ids of ``text``, by the tokens' character offsets."""
        both = before + text
        with explain_panic():
            encoded = self._tokenizer(both, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = list(zip(encoded.input_ids, encoded.offset_mapping, strict=True))
        first = next((n for n, (_, (start, _)) in enumerate(spans) if start >= len(before)), len(spans))
        first_start = spans[first][1][0] if first < len(spans) else len(both)
        return self._encode_continuation(both[len(before) : first_start]) + tuple(token for token, _ in spans[first:])

    def _encode_continuation(self, text: str) -> tuple[int, ...]:
        """Encode a text that continues another, so that the tokenizer puts no space before it."""
        for anchor in _ANCHORS:
            lead, both = self._encode_plain(anchor), self._encode_plain(anchor + text)
            if both[: len(lead)] == lead:
                return both[len(lead) :]
        return self._encode_plain(text)

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        """Encode ``text`` without special tokens around it, separators of pieces included."""
        with explain_panic():
            return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _decode(self, ids: tuple[int, ...]) -> str:
        """Decode ids to text, special tokens included."""
        with explain_panic():
            return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _split_control_tokens(self, text: str) -> str:
        """Put a separator of pieces into the text of each control token in ``text``."""
        assert self._control_pattern is not None
        while self._control_pattern.search(text):  # what is left of one may hold another
            text = self._control_pattern.sub(lambda match: f"{match[0][0]}{_SEPARATOR}{match[0][1:]}", text)
        return text

    def _find_bos_ids(self) -> tuple[int, ...]:
        """Find the tokens that the tokenizer puts before a text (BOS); the BOS may be the end-of-text token as well."""
        with explain_panic():
            alone, text = self._encode_plain("a"), tuple(self._tokenizer("a", verbose=False).input_ids)
        for start in range(len(text) - len(alone) + 1):
            if text[start : start + len(alone)] == alone:
                return text[:start]
        return ()
