"""Shorten a sample that is too long: its contexts from their end, its conversation from its beginning."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from toolkit.tasks.sample import SYSTEM, USER, Sample


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
