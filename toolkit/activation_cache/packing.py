"""Decide whether micro batches are packed, and prove on real rows that this model keeps packed samples apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.config.policy import Decision, Mode, refuse_packing
from toolkit.data.batches import Batch, collate, pack
from toolkit.data.examples import Example
from toolkit.data.layout import lay_out
from toolkit.data.rows import Rows
from toolkit.models.probe import evaluation_mode
from toolkit.models.varlen import VARLEN, register_varlen
from toolkit.runtime.errors import ModelError
from toolkit.split.logit_processing import MODEL_CODE_ERRORS
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix

_COMPARED_POSITIONS = 8
"""Positions at each end of a sample whose logits are compared; leakage shows first at a sample's beginning."""

_ROUNDING_FACTOR = 4.0
"""Factor on the rounding that was observed, up to which a difference still counts as rounding."""


def choose_packing(
    mode: Mode,
    micro_batch_size: int,
    prefix: HiddenStates | None,
    suffix: Suffix,
    examples: Sequence[Example],
    device: torch.device,
) -> Decision:
    """Decide whether to pack, by the recipe and by trying the model on packed rows.

    If the answer is yes and the model's attention is ``sdpa``, prefix and suffix are set to ``toolkit.models.varlen``,
    which is ``sdpa`` for everything but packed rows. ``mode`` is ``data.packing``; ``auto`` packs if that is exact and
    attention runs sample by sample. ``examples`` are all rows of the run, a few of which are tried.

    Raises:
        ModelError: ``mode`` is ``on``, and the model does not keep packed samples apart.
    """
    rows = Rows.of(examples)
    if refusal := refuse_packing(mode, micro_batch_size, np.unique(rows.lengths)):
        return refusal
    original, fault = suffix.model.config._attn_implementation, None
    trial = _PackingTrial(prefix, suffix, device, original)
    with evaluation_mode(*(part for part in (prefix, suffix) if isinstance(part, (Prefix, Suffix)))):
        for attention in packing_attentions(mode, original):
            set_attention(suffix.model, attention)
            if suffix.model.config._attn_implementation != attention:
                continue  # this model's attention cannot be replaced
            fault = trial.fault(rows, micro_batch_size)
            if fault is None:
                return Decision(True, f"on ({'auto: ' if mode == 'auto' else ''}exact on rows of this data)")
    set_attention(suffix.model, original)
    fault = fault or f"{original} attention would compute each token of a packed row with each, other samples' too"
    if mode == "on":
        raise ModelError(
            f"data.packing is on, but {type(suffix.model).__name__} with {original} attention does not keep packed "
            f"samples apart: {fault}. Set data.packing to off, or to auto, which packs where that is exact"
        )
    return Decision(False, f"off (auto: {fault})")


def packing_attentions(mode: Mode, original: str) -> list[str]:
    """Return the attention implementations that may keep packed samples apart, in the order in which they are tried.

    ``original`` is the one that the model was loaded with. If ``data.packing`` is ``on``, it may also be one that
    computes all pairs of a packed row under a mask.
    """
    sample_by_sample = {"sdpa": [VARLEN], "flash_attention_2": [original]}.get(original, [])
    return sample_by_sample if mode == "auto" else [*sample_by_sample, original]


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of ``model``, and of every copy of it, as copies share its config.

    A model whose attention is written into its code stays as it is.
    """
    if name == VARLEN:
        register_varlen()
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)


@dataclass(frozen=True)
class _PackingTrial:
    """Tests packed rows in two ways, under the attention that is set now.

    *Leak*: two short rows are packed, then the tokens of the first are changed. The second row's logits must stay
    as they are, bit for bit: they are computed from the same numbers in the same layout. (A mixture's experts get their
    tokens in groups, and groups of another size round otherwise. That much is allowed where changing the *second* row
    moves the first one's logits too, which causality forbids.)

    *Values*: the longest rows packed with the shortest one must give the logits that each of them gives alone under the
    attention that the model came with, within a few times of the differences that padding makes. This costs
    about as much as a training step.
    """

    prefix: HiddenStates | None
    suffix: Suffix
    device: torch.device
    original_attention: str

    def fault(self, rows: Rows, micro_batch_size: int) -> str | None:
        """Return what is wrong with packed rows, as a phrase; None if packing is exact.

        There must be rows of at least two lengths: rows of one length are not packed.
        """
        lengths = rows.lengths
        shortest, second = (rows[int(np.flatnonzero(lengths == length)[-1])] for length in np.unique(lengths)[:2])
        longest = list(rows.take(rows.longest_first()[:micro_batch_size]))
        longest[-1] = shortest  # some models compute long rows otherwise, and rows of one length would not be packed
        try:
            return self.leak(second, shortest) or self.value_fault(longest)
        except MODEL_CODE_ERRORS as error:
            return f"its code refuses packed rows ({' '.join(str(error).split())[:200]})"

    def leak(self, first: Example, second: Example) -> str | None:
        """Return a phrase if tokens of one sample change the logits of the next one in its row; None if not."""
        before = self.logits(pack((first, second)))
        forward = _max_difference(before[1], self.logits(pack((_permuted(first, 1), second)))[1])
        if forward == 0:
            return None
        # more trials, in both orders, to see how large the rounding can be
        shifts = [self._logit_shifts(first, second), self._logit_shifts(second, first)]
        rounding, forward = (max(values) for values in zip(*shifts, strict=True))
        if forward <= _ROUNDING_FACTOR * rounding and rounding <= self._rounding_limit(before):
            return None
        return f"the tokens of one sample change the logits of the next one in its row, by up to {forward:.2g}"

    def _logit_shifts(self, first: Example, second: Example) -> tuple[float, float]:
        """Return how far changed tokens in one row of a pair move the other row's logits: backward, and forward.

        Backward, from the second row to the first, is rounding: causal attention forbids any other influence.
        """
        before = self.logits(pack((first, second)))
        backward = forward = 0.0
        for turn in (1, 2, 3):
            backward = max(backward, _max_difference(before[0], self.logits(pack((first, _permuted(second, turn))))[0]))
            forward = max(forward, _max_difference(before[1], self.logits(pack((_permuted(first, turn), second)))[1]))
        return backward, forward

    def value_fault(self, rows: Sequence[Example]) -> str | None:
        """Return a phrase if rows give other logits packed than alone, beyond rounding; None if not."""
        packed = self.logits(pack(rows))
        packing_attention = self.suffix.model.config._attn_implementation
        set_attention(self.suffix.model, self.original_attention)
        alone = [self.logits(collate([row], pad_id=0))[0] for row in rows]
        padded = self.logits(collate(rows, pad_id=0))
        set_attention(self.suffix.model, packing_attention)
        by_padding, by_packing = max(map(_max_difference, alone, padded)), max(map(_max_difference, alone, packed))
        last_digit = torch.finfo(self.suffix.model.dtype).eps * _max_magnitude(alone)
        allowed = min(_ROUNDING_FACTOR * max(by_padding, last_digit), self._rounding_limit(alone))
        if by_packing <= allowed:
            return None
        return f"rows give other logits packed than alone, by up to {by_packing:.2g}; rounding explains {allowed:.2g}"

    def _rounding_limit(self, logits: Sequence[torch.Tensor]) -> float:
        """Return the largest difference to accept in any case: half of the dtype's digits."""
        return float(torch.finfo(self.suffix.model.dtype).eps ** 0.5 * _max_magnitude(logits))

    def logits(self, batch: Batch) -> list[torch.Tensor]:
        """Compute each sample's float32 logits [positions, vocabulary] at its first and last few positions."""
        masks = []
        for length in batch.lengths:
            mask = torch.zeros(length, 1)
            mask[:_COMPARED_POSITIONS] = mask[-_COMPARED_POSITIONS:] = 1
            masks.append(mask)
        compared = lay_out(masks, batch).squeeze(-1).bool()
        batch = replace(batch, supervised=compared, targets=batch.input_ids[compared]).to(self.device)
        logits = self.suffix.logits(self.hidden(batch), batch).float()
        return list(torch.split(logits, [int(mask.sum()) for mask in masks]))

    def hidden(self, batch: Batch) -> torch.Tensor | None:
        """Return the hidden states [B, T, H] that enter the suffix; None without a prefix.

        A cached prefix computes and stores sample by sample, unpacked, so only the suffix has to be tested: random
        hidden states will do where none are stored.
        """
        if self.prefix is None:
            return None
        return self.prefix.stored_or_random(batch) if isinstance(self.prefix, CachedPrefix) else self.prefix(batch)


def _permuted(example: Example, turn: int) -> Example:
    """Return the example with its tokens in another order: reversed, and rotated by ``turn``."""
    turned = example.token_ids[::-1]
    return replace(example, token_ids=turned[turn:] + turned[:turn])


def _max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _max_magnitude(logits: Sequence[torch.Tensor]) -> float:
    return max(float(of_sample.abs().max()) for of_sample in logits)
