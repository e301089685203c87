"""Find out whether a run fits a GPU, and if not, which setting to change first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from toolkit.config.mask_schema import LoraEntry
from toolkit.config.policy import decide_checkpointing
from toolkit.planning.engine_spec import EngineSpec, zero_spec
from toolkit.planning.planner import Planner, RunVariant
from toolkit.runtime.errors import MaskError, ModelError
from toolkit.runtime.free_memory import RESERVE

_MIN_LENGTH = 256
"""Smallest data.max_length that is proposed."""
_MAX_RANKS = 8

Proposals = Iterator[tuple[str, RunVariant]]
"""Changes of one kind to propose: text for the user, and the variant with the change."""


@dataclass(frozen=True)
class DeviceFit:
    """Result of ``fit_device``: whether a plan fits a GPU, and what to change if not."""

    budget: int
    """Memory of the GPU in bytes."""
    needed: int
    """Peak bytes of tensors, plus ``RESERVE``."""
    changes: tuple[tuple[str, int], ...]
    """Changes to make, in this order, each with the bytes needed after it; empty if no change is needed."""

    @property
    def fits(self) -> bool:
        """Return True if the run fits without changes."""
        return self.needed <= self.budget

    @property
    def helps(self) -> bool:
        """Return True if the run fits after all changes."""
        return self.fits or (bool(self.changes) and self.changes[-1][1] <= self.budget)


def choose_variant(planner: Planner, spec: EngineSpec, budget: int | None) -> RunVariant:
    """Return the recipe's variant; ``decide_checkpointing`` decides on checkpointing for ``budget`` bytes."""
    variant = planner.variant(spec, checkpointing=False)
    memory = planner.memory(variant)
    decision = decide_checkpointing(
        planner.config.train.gradient_checkpointing, memory.peak + RESERVE, budget, fixed_moment=memory.fixed_moment
    )
    return replace(variant, checkpointing=decision.on)


def fit_device(planner: Planner, variant: RunVariant, budget: int) -> DeviceFit:
    """Compare the peak with ``budget`` bytes, and find changes that make the run fit.

    Changes in order of cost: activation checkpointing, smaller micro batches, the prefix in 8 or 4 bits, then the
    frozen layers of adapted blocks, prefix offload, optimizer offload, shorter rows, ZeRO and more ranks, fewer trained
    blocks. A single change that suffices is proposed alone; else changes accumulate in this order, some of them a
    second time.
    """
    needed = planner.memory(variant).peak + RESERVE
    if needed <= budget:
        return DeviceFit(budget, needed, ())
    for propose in _useful_proposals(planner, variant):
        for text, changed in propose(planner, variant):
            after = planner.memory(changed).peak + RESERVE
            if after <= budget:
                return DeviceFit(budget, needed, ((text, after),))
    changes: list[tuple[str, int]] = []
    current, previous = needed, needed + 1
    while budget < current < previous:  # a change may help, or help again, once another moment is the peak
        previous = current
        for propose in _useful_proposals(planner, variant):
            best = None
            for text, changed in propose(planner, variant):
                after = planner.memory(changed).peak + RESERVE
                if after < 0.99 * (best[1] if best else current):
                    best = (text, after, changed)
                if after <= budget:
                    break
            if best:
                changes.append(best[:2])
                current, variant = best[1], best[2]
            if current <= budget:
                break
    return DeviceFit(budget, needed, tuple(changes))


def first_change(planner: Planner, variant: RunVariant, in_update: bool) -> str | None:
    """Return the first change to advise after memory ran out in a training step; None if no change is left.

    It is the first in the order of ``fit_device`` that lowers the planned peak, or the very first if none does.
    ``in_update`` says whether memory ran out in the optimizer's update.
    """
    needed = planner.memory(variant).peak
    first = None
    for propose in _useful_proposals(planner, variant, in_update):
        for text, changed in propose(planner, variant):
            first = first or text
            if planner.memory(changed).peak < 0.99 * needed:
                return text
    return first


def first_change_in_cache_fill(planner: Planner, variant: RunVariant) -> str | None:
    """Return the first change to advise after memory ran out in the pass that fills the activation cache, or None."""
    for propose in (_propose_precision, _propose_placement, _propose_length):
        for text, _ in propose(planner, variant):
            return text
    return None


def _propose_checkpointing(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose activation checkpointing."""
    if not variant.checkpointing:
        yield "train.gradient_checkpointing: on", replace(variant, checkpointing=True)


def _propose_micro_batch(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose micro batches of fewer tokens, or of one row with gradient accumulation instead."""
    tokens = variant.micro_tokens or 0
    while tokens > variant.tokens:  # a longer row is a micro batch of its own anyway
        tokens = max(tokens // 2, variant.tokens)
        yield f"train.micro_batch_tokens: {tokens}", replace(variant, micro_tokens=tokens)
    if variant.rows > 1 and variant.micro_tokens is None:
        steps = variant.accumulation * variant.rows
        spec = replace(variant.spec, accumulates=True)
        yield (
            f"train.micro_batch_size: 1 with train.gradient_accumulation_steps: {steps}",
            replace(variant, rows=1, accumulation=steps, spec=spec),
        )


def _propose_precision(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose a prefix quantised to 8, then 4 bits."""
    stronger = {"model": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}
    for precision in stronger[variant.prefix.precision]:
        changed = replace(variant, prefix=variant.prefix.model_copy(update={"precision": precision}))
        try:
            planner.prefix_memory(changed)  # raises if this architecture does not allow it
        except ModelError:  # too few weights of these blocks can be quantised
            return
        yield f"prefix.precision: {precision}", changed


def _propose_base_precision(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose the frozen layers of adapted blocks in 8, then 4 bits."""
    if planner.is_phase:
        return  # the blocks of all phases would have to agree
    precisions: tuple[Literal["int8", "nf4"], ...] = ("int8", "nf4")
    for precision in precisions:
        weaker = ("model",) if precision == "int8" else ("model", "int8")
        selectors = tuple(
            LoraEntry(lora=entry.lora.model_copy(update={"base_precision": precision}))
            if isinstance(entry, LoraEntry) and entry.lora.base_precision in weaker
            else entry
            for entry in variant.selectors
        )
        if selectors != variant.selectors:
            changed = replace(variant, selectors=selectors)
            try:
                planner.prefix_memory(changed)  # builds the mask
            except MaskError:  # too few weights of these blocks can be quantised
                return
            yield f"base_precision: {precision} in the lora entries of mask.train", changed


def _propose_placement(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose to offload the prefix to the host."""
    if variant.prefix.placement == "device":
        offloaded = variant.prefix.model_copy(update={"placement": "cpu"})
        yield (
            "prefix.placement: cpu (slower: the frozen blocks are copied for each batch)",
            replace(variant, prefix=offloaded),
        )


def _propose_length(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose shorter rows, by powers of two."""
    tokens = 2 ** ((variant.tokens - 1).bit_length() - 1)  # the next power of two below
    while tokens >= _MIN_LENGTH:
        yield (
            f"data.max_length: {tokens} (longer rows lose context)",
            replace(variant, tokens=tokens, supervised=min(variant.supervised, tokens)),
        )
        tokens //= 2


def _propose_offload(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose optimizer offload, with ZeRO-2 for a run without DeepSpeed."""
    spec = variant.spec
    if spec.optimizer_at == "device" and spec.stage in (None, 2, 3):
        stage, width = spec.stage or 2, planner.meta.hidden_size
        offloaded = zero_spec(stage, spec.ranks, spec.accumulates, width, spec.optimizer, offload=True)
        yield (
            f"--ds ds_configs/zero{stage}_offload.json (slower: masters and moments are on the host)",
            replace(variant, spec=offloaded),
        )


def _propose_ranks(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose higher ZeRO stages and more ranks."""
    spec, width = variant.spec, planner.meta.hidden_size
    ranks, offload = spec.ranks if spec.ranks > 1 else 2, spec.optimizer_at != "device"
    while ranks <= max(_MAX_RANKS, spec.ranks):
        for stage in (2, 3):
            if (ranks, stage) > (spec.ranks, spec.stage or 0):
                divided = zero_spec(stage, ranks, spec.accumulates, width, spec.optimizer, offload)
                yield (
                    f"--ds ds_configs/zero{stage}{'_offload' if offload else ''}.json on {ranks} ranks",
                    replace(variant, spec=divided),
                )
        ranks *= 2


def _propose_blocks(planner: Planner, variant: RunVariant) -> Proposals:
    """Propose to train fewer blocks, by halving the number in ``last:N``."""
    if planner.is_phase:
        return  # with fewer blocks here, another phase may be the one that needs most
    for position, selector in enumerate(variant.selectors):
        if isinstance(selector, str) and (match := re.fullmatch(r"last:(\d+)", selector.strip())):
            blocks = int(match[1]) // 2
            while blocks:
                selectors = (*variant.selectors[:position], f"last:{blocks}", *variant.selectors[position + 1 :])
                yield f"mask.train: {' '.join(map(str, selectors))}", replace(variant, selectors=selectors)
                blocks //= 2
            return


_PROPOSALS: tuple[Callable[[Planner, RunVariant], Proposals], ...] = (
    _propose_checkpointing, _propose_micro_batch, _propose_precision, _propose_base_precision, _propose_placement,
    _propose_offload, _propose_length, _propose_ranks, _propose_blocks,
)  # fmt: skip
"""Cheapest change first."""

_SHRINK_MICRO_BATCH = (_propose_checkpointing, _propose_micro_batch, _propose_length)
"""Those that cannot help if the peak is in the update, or in a change of phase."""


def _useful_proposals(
    planner: Planner, variant: RunVariant, in_update: bool | None = None
) -> list[Callable[[Planner, RunVariant], Proposals]]:
    """Return the proposals that can help; None for ``in_update`` takes it from the plan."""
    if in_update is None:
        in_update = planner.memory(variant).fixed_moment is not None
    return [propose for propose in _PROPOSALS if not (in_update and propose in _SHRINK_MICRO_BATCH)]
