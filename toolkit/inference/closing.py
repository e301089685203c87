"""Find the tokens that end a JSON answer from where it stands, so that it can be closed within its budget of tokens."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_OUTSIDE = '}],:"' + string.digits + "ntf{[-." + string.ascii_letters
"""Characters to try outside a string, those that end most first: an optional property or item is not begun."""
_INSIDE = '"' + string.ascii_letters + string.digits + " -_.:/"
"""Characters to try within a string, the one that ends it first."""
_LONGEST = 20_000
"""Most characters of an ending that is looked for."""
_MOST_LOOKED_AT = 512
"""Most tokens among which the shortest is looked for where no character above may follow."""


class Closer:
    """Looks for short endings of answers, for one tokenizer. No ending is promised to be the shortest there is."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = {char: tokenizer.tokenize_str(char) for char in sorted({*_OUTSIDE, *_INSIDE})}

    def ending(self, matcher: LLMatcher, text: bytes) -> list[int] | None:
        """Return tokens that lead to a whole answer; None if none are found.

        Args:
            matcher: where the answer stands; it is left as it is.
            text: bytes of the answer so far, without what stands before its JSON.
        """
        ahead, in_string, escaped = matcher.deep_copy(), *_string_state(text, False, False)
        tokens: list[int] = []
        while not _is_whole(ahead):
            step = self._step(ahead, in_string)
            if not step or len(tokens) > _LONGEST or not ahead.consume_tokens(step):
                return None
            tokens += step
            in_string, escaped = _string_state(self._tokenizer.decode_bytes(step), in_string, escaped)
        return self._merged(matcher, tokens)

    def still_ends(self, matcher: LLMatcher, ending: Sequence[int]) -> bool:
        """Return whether an ending that was found earlier leads to a whole answer from here, too."""
        ahead = matcher.deep_copy()
        return ahead.try_consume_tokens(list(ending)) == len(ending) and _is_whole(ahead)

    def _step(self, ahead: LLMatcher, in_string: bool) -> list[int]:
        """Return the tokens of what must follow, or of one character that may; none if there are none."""
        forced = ahead.compute_ff_bytes()
        if forced and (tokens := self._tokenizer.tokenize_bytes(forced)) and _follow(ahead, tokens):
            return list(tokens)
        for char in _INSIDE if in_string else _OUTSIDE:
            if _follow(ahead, self._tokens[char]):
                return self._tokens[char]
        return self._shortest_token(ahead)

    def _shortest_token(self, ahead: LLMatcher) -> list[int]:
        """Return the token of the fewest bytes that may follow, such as the rest of a Korean syllable."""
        bits = np.unpackbits(np.frombuffer(ahead.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [int(token) for token in np.flatnonzero(bits)[:_MOST_LOOKED_AT]]
        texts = {token: self._tokenizer.decode_bytes([token]) for token in allowed}
        real = [token for token, text in texts.items() if text and not self._tokenizer.is_special_token(token)]
        visible = [token for token in real if texts[token].strip()] or real
        return [min(visible, key=lambda token: len(texts[token]))] if visible else []

    def _merged(self, matcher: LLMatcher, tokens: list[int]) -> list[int]:
        """Return the same text in longer tokens where the answer may go on with these."""
        merged = list(self._tokenizer.tokenize_bytes(self._tokenizer.decode_bytes(tokens))) if tokens else []
        return merged if len(merged) < len(tokens) and self.still_ends(matcher, merged) else tokens


def _follow(matcher: LLMatcher, tokens: Sequence[int]) -> bool:
    return len(tokens) > 0 and matcher.validate_tokens(list(tokens)) == len(tokens)


def _is_whole(matcher: LLMatcher) -> bool:
    return bool(matcher.is_stopped() or matcher.is_accepting())


def _string_state(text: bytes, in_string: bool, escaped: bool) -> tuple[bool, bool]:
    """Return whether JSON is within a string after ``text``, and there behind a backslash."""
    for byte in text:
        if escaped:
            escaped = False
        elif in_string and byte == 0x5C:
            escaped = True
        elif byte == 0x22:
            in_string = not in_string
    return in_string, escaped
