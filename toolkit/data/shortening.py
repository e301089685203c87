"""Shorten a sample that is too long: its contexts from their end, its conversation from its beginning."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from toolkit.tasks.sample import SYSTEM, USER, RowFaultError, Sample

Encoded = TypeVar("Encoded", bound=Sized)


def fit_to_length(
    sample: Sample, encode: Callable[[Sample], Encoded], length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sample, Encoded]:
    """Return a sample with as much of its contexts, from the start, and of its turns, from the end, as fits, encoded.

    Raises:
        RowFaultError: the last turns alone have more than ``length`` tokens.
    """
    encoded = encode(sample)
    while len(encoded) > length:
        if sample.contexts:
            return _cut_to_length(sample, encoded, encode, length, tokenizer)
        later = without_first_exchange(sample)
        if later is None:
            raise RowFaultError(
                f"needs {len(encoded)} tokens without any context; data.max_length is {length}, "
                "so nothing could be supervised without cutting question or answer"
            )
        sample, encoded = later, encode(later)
    return sample, encoded


def _cut_to_length(
    sample: Sample, encoded: Encoded, encode: Callable[[Sample], Encoded], length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Sample, Encoded]:  # fmt: skip
    """Cut the contexts of a sample, whose encoding ``encoded`` is too long; all of them if need be."""
    bare = sample.with_contexts(())
    of_bare = encode(bare)
    if len(of_bare) > length:
        return fit_to_length(bare, encode, length, tokenizer)
    text = "\n\n".join(sample.contexts)
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    cut = sample
    while len(encoded) > length and tokens > 0:
        tokens -= len(encoded) - length
        cut = sample.with_contexts(cut_contexts(tokenizer, sample.contexts, max(tokens, 0)))
        encoded = encode(cut)
    return (cut, encoded) if len(encoded) <= length else (bare, of_bare)


def without_first_exchange(sample: Sample) -> Sample | None:
    """Return a conversation without its first question and what follows up to the next; None if it has one only.

    System turns before it stay.
    """
    asked = [number for number, turn in enumerate(sample.turns) if turn.role == USER]
    if len(asked) < 2:
        return None
    kept = tuple(turn for turn in sample.turns[: asked[0]] if turn.role == SYSTEM) + sample.turns[asked[1] :]
    return replace(sample, turns=kept, arrange=None)


def cut_contexts(tokenizer: PreTrainedTokenizerBase, contexts: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Cut the contexts to ``count`` tokens in all; a character whose tokens are cut apart is dropped."""
    kept: list[str] = []
    for context in contexts:
        ids = tokenizer(context, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > count:
            cut = tokenizer.decode(ids[:count], skip_special_tokens=False).rstrip("\ufffd").strip()
            return (*kept, cut) if cut else tuple(kept)
        kept.append(context)
        count -= len(ids)
    return tuple(kept)
