"""Decide whether micro batches are packed, and prove on real rows that this model keeps packed samples apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.config.policy import Decision, Mode, refuse_packing
from toolkit.data.batches import Batch, collate, lay_out, pack
from toolkit.data.examples import Example
from toolkit.models.probe import evaluating
from toolkit.models.varlen import VARLEN, register_varlen
from toolkit.runtime.errors import ModelError
from toolkit.split.logit_processing import FAILURES
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix

_WATCHED = 8
"""Positions at each end of a sample whose logits are compared: what crosses samples shows first at their beginnings."""

_SLACK = 4.0
"""How many times the rounding that was seen still counts as rounding."""


def choose_packing(
    mode: Mode,
    micro_batch_size: int,
    prefix: HiddenStates | None,
    suffix: Suffix,
    examples: Sequence[Example],
    device: torch.device,
) -> Decision:
    """Decide by the recipe and by what the model does with packed rows.

    Where it is decided for and the model's attention is ``sdpa``, the halves run ``toolkit.models.varlen`` from here
    on, which is ``sdpa`` for everything but packed rows.

    Args:
        mode: of the recipe; ``auto`` packs where that is exact and attention runs sample by sample.
        micro_batch_size: rows that are computed together.
        prefix: of the model; None where it is not cut.
        suffix: of the model.
        examples: all rows of the run; some of them are tried.
        device: where the halves are.

    Raises:
        ModelError: ``mode`` is ``on``, and the model does not keep packed samples apart.
    """
    if refused := refuse_packing(mode, micro_batch_size, {len(example.token_ids) for example in examples}):
        return refused
    given, fault = suffix.model.config._attn_implementation, None
    trial = _Trial(prefix, suffix, device, given)
    with evaluating(*(part for part in (prefix, suffix) if isinstance(part, (Prefix, Suffix)))):
        for attention in packing_attentions(mode, given):
            set_attention(suffix.model, attention)
            if suffix.model.config._attn_implementation != attention:
                continue  # this model's attention cannot be exchanged
            fault = trial.fault(examples, micro_batch_size)
            if fault is None:
                return Decision(True, f"on ({'auto: ' if mode == 'auto' else ''}exact on rows of this data)")
    set_attention(suffix.model, given)
    fault = fault or f"{given} attention would compute each token of a packed row with each, other samples' too"
    if mode == "on":
        raise ModelError(
            f"data.packing is on, but {type(suffix.model).__name__} with {given} attention does not keep packed "
            f"samples apart: {fault}. Set data.packing to off, or to auto, which packs where that is exact"
        )
    return Decision(False, f"off (auto: {fault})")


def packing_attentions(mode: Mode, given: str) -> list[str]:
    """Return the attention implementations that may keep packed samples apart, in the order in which they are tried.

    Args:
        mode: of the recipe; ``on`` also takes one that computes all pairs of a packed row under a mask.
        given: the implementation that the model came with.
    """
    apart = {"sdpa": [VARLEN], "flash_attention_2": [given]}.get(given, [])
    return apart if mode == "auto" else [*apart, given]


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let ``model``, and every copy of it that shares its config, compute attention with implementation ``name``.

    A model whose attention is written into its code stays as it is.
    """
    if name == VARLEN:
        register_varlen()
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)


@dataclass(frozen=True)
class _Trial:
    """Test packed rows in two ways under the attention that is set.

    *Crossing*: two short rows are packed, then the tokens of the first are changed. The second row's logits must stay
    as they are, bit for bit: they are computed from the same numbers in the same layout. (A mixture's experts get their
    tokens in groups, and groups of another size round otherwise. That much is allowed where changing the *second* row
    moves the first one's logits too, which causality forbids.)

    *Value*: the longest rows packed with the shortest one must give the logits that each of them gives alone under the
    attention that the model came with, within a few times of what padding moves. This costs about as much as a
    training step.
    """

    prefix: HiddenStates | None
    suffix: Suffix
    device: torch.device
    given: str
    """The attention that the model came with."""

    def fault(self, examples: Sequence[Example], micro_batch_size: int) -> str | None:
        """Return what is wrong, as a phrase; None where packing is exact. There are rows of at least two lengths."""
        by_length = {len(example.token_ids): example for example in examples}
        shortest, second, *_ = (by_length[length] for length in sorted(by_length))
        longest = sorted(examples, key=lambda example: -len(example.token_ids))[:micro_batch_size]
        longest[-1] = shortest  # some models compute long rows otherwise, and rows of one length would not be packed
        try:
            return self.crossing(second, shortest) or self.other_values(longest)
        except FAILURES as error:
            return f"its code refuses packed rows ({' '.join(str(error).split())[:200]})"

    def crossing(self, first: Example, second: Example) -> str | None:
        """Return a message if tokens of one sample reach the next one in its row."""
        before = self.logits(pack((first, second)))
        moved = _apart(before[1], self.logits(pack((_turned(first, 1), second)))[1])
        if moved == 0:
            return None
        pairs = [self._moved(first, second), self._moved(second, first)]  # more trials: the least sample of rounding
        rounding, moved = (max(figures) for figures in zip(*pairs, strict=True))
        if moved <= _SLACK * rounding and rounding <= self._most_rounding(before):
            return None
        return f"the tokens of one sample change the logits of the next one in its row, by up to {moved:.2g}"

    def _moved(self, first: Example, second: Example) -> tuple[float, float]:
        """Return how far other tokens of the second row move the first one's logits, and the other way round."""
        before = self.logits(pack((first, second)))
        backward = forward = 0.0
        for turn in (1, 2, 3):
            backward = max(backward, _apart(before[0], self.logits(pack((first, _turned(second, turn))))[0]))
            forward = max(forward, _apart(before[1], self.logits(pack((_turned(first, turn), second)))[1]))
        return backward, forward

    def other_values(self, rows: Sequence[Example]) -> str | None:
        """Return a message if rows give other logits packed than alone."""
        packed = self.logits(pack(rows))
        tried = self.suffix.model.config._attn_implementation
        set_attention(self.suffix.model, self.given)
        alone = [self.logits(collate([row], pad_id=0))[0] for row in rows]
        padded = self.logits(collate(rows, pad_id=0))
        set_attention(self.suffix.model, tried)
        by_padding, by_packing = max(map(_apart, alone, padded)), max(map(_apart, alone, packed))
        last_digit = torch.finfo(self.suffix.model.dtype).eps * _largest(alone)
        allowed = min(_SLACK * max(by_padding, last_digit), self._most_rounding(alone))
        if by_packing <= allowed:
            return None
        return f"rows give other logits packed than alone, by up to {by_packing:.2g}; rounding explains {allowed:.2g}"

    def _most_rounding(self, logits: Sequence[torch.Tensor]) -> float:
        """Return half of the digits: what is more than that is no rounding, whatever caused it."""
        return float(torch.finfo(self.suffix.model.dtype).eps ** 0.5 * _largest(logits))

    def logits(self, batch: Batch) -> list[torch.Tensor]:
        """Compute the logits of each sample at its first and last positions, in float32."""
        watched = []
        for length in batch.lengths:
            rows = torch.zeros(length, 1)
            rows[:_WATCHED] = rows[-_WATCHED:] = 1
            watched.append(rows)
        where = lay_out(watched, batch).squeeze(-1).bool()
        batch = replace(batch, supervised=where, targets=batch.input_ids[where]).to(self.device)
        logits = self.suffix.logits(self.hidden(batch), batch).float()
        return list(torch.split(logits, [int(rows.sum()) for rows in watched]))

    def hidden(self, batch: Batch) -> torch.Tensor | None:
        """Return what enters the suffix; a cache keeps it sample by sample, so that only the suffix is tested."""
        if self.prefix is None:
            return None
        return self.prefix.stored_or_random(batch) if isinstance(self.prefix, CachedPrefix) else self.prefix(batch)


def _turned(example: Example, turn: int) -> Example:
    """Return the same tokens in another order: reversed, and rotated by ``turn``."""
    turned = example.token_ids[::-1]
    return replace(example, token_ids=turned[turn:] + turned[:turn])


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _largest(logits: Sequence[torch.Tensor]) -> float:
    return max(float(some.abs().max()) for some in logits)
