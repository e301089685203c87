"""Find out whether a run fits a GPU, and if not, which setting to change first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from toolkit.config.policy import decide_checkpointing
from toolkit.planning.engine_memory import EngineSpec, zero_spec
from toolkit.planning.planner import Planner, Variant
from toolkit.runtime.errors import ModelError

RESERVE = 2**30
"""Bytes set aside beside the tensors for the CUDA context, library workspaces and the allocator's gaps. An estimate."""

_SHORTEST = 256
"""Tokens below which max_length is not proposed."""
_MOST_RANKS = 8

Knob = Iterator[tuple[str, Variant]]


@dataclass(frozen=True)
class DeviceFit:
    """Hold whether a plan fits a GPU, and what to change if not."""

    budget: int
    """Bytes of the GPU."""
    needed: int
    """Bytes of tensors at the peak, and the reserve."""
    changes: tuple[tuple[str, int], ...]
    """What to change, in this order, and the bytes needed after it; empty if it fits as it is."""

    @property
    def fits(self) -> bool:
        """Return True if the run fits as the recipe has it."""
        return self.needed <= self.budget

    @property
    def helps(self) -> bool:
        """Return True if it fits at least after all changes."""
        return self.fits or (bool(self.changes) and self.changes[-1][1] <= self.budget)


def choose_variant(planner: Planner, spec: EngineSpec, budget: int | None) -> Variant:
    """Return the run with gradient checkpointing as ``decide_checkpointing`` has it for ``budget`` bytes."""
    plain = planner.variant(spec, checkpointing=False)
    held = planner.memory(plain)
    decision = decide_checkpointing(
        planner.config.train.gradient_checkpointing, held.peak + RESERVE, budget, in_update=held.moment == "update"
    )
    return replace(plain, checkpointing=decision.on)


def fit_device(planner: Planner, variant: Variant, budget: int) -> DeviceFit:
    """Compare the peak with ``budget`` bytes.

    The knobs, in the order in which they cost least: activation checkpointing, smaller micro batches, the prefix in 8
    or 4 bits, the prefix on the host, the optimizer's state on the host, shorter rows, ZeRO and more ranks, fewer
    blocks.
    One that suffices alone is proposed alone; else they add up in this order, some of them a second time.
    """
    needed = planner.memory(variant).peak + RESERVE
    if needed <= budget:
        return DeviceFit(budget, needed, ())
    for knob in _knobs(planner, variant):
        for text, changed in knob(variant, planner):
            after = planner.memory(changed).peak + RESERVE
            if after <= budget:
                return DeviceFit(budget, needed, ((text, after),))
    changes: list[tuple[str, int]] = []
    now, before = needed, needed + 1
    while budget < now < before:  # a knob may help, or help again, once another moment is the peak
        before = now
        for knob in _knobs(planner, variant):
            best = None
            for text, changed in knob(variant, planner):
                after = planner.memory(changed).peak + RESERVE
                if after < 0.99 * (best[1] if best else now):
                    best = (text, after, changed)
                if after <= budget:
                    break
            if best:
                changes.append(best[:2])
                now, variant = best[1], best[2]
            if now <= budget:
                break
    return DeviceFit(budget, needed, tuple(changes))


def first_knob(planner: Planner, variant: Variant, in_update: bool) -> str | None:
    """Return what to change first where memory ran out in the update, or else outside it; None if nothing is left.

    The first knob of ``judge``'s order that lowers the planned peak, or, where the plan sees no gain, the first one.
    """
    needed = planner.memory(variant).peak
    first = None
    for knob in _knobs(planner, variant, in_update):
        for text, changed in knob(variant, planner):
            first = first or text
            if planner.memory(changed).peak < 0.99 * needed:
                return text
    return first


def first_pass_knob(planner: Planner, variant: Variant) -> str | None:
    """Return what to change first where memory ran out in the first pass, before there is an engine."""
    for knob in (_precision, _placement, _length):
        for text, _ in knob(variant, planner):
            return text
    return None


def _checkpointing(variant: Variant, planner: Planner) -> Knob:
    if not variant.checkpointing:
        yield "train.gradient_checkpointing: on", replace(variant, checkpointing=True)


def _micro_batch(variant: Variant, planner: Planner) -> Knob:
    if variant.rows > 1:
        steps = variant.accumulation * variant.rows
        spec = replace(variant.spec, accumulates=True)
        yield (
            f"train.micro_batch_size: 1 with train.gradient_accumulation_steps: {steps}",
            replace(variant, rows=1, accumulation=steps, spec=spec),
        )


def _precision(variant: Variant, planner: Planner) -> Knob:
    stronger = {"model": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}
    for precision in stronger[variant.frozen.precision]:
        changed = replace(variant, frozen=variant.frozen.model_copy(update={"precision": precision}))
        try:
            planner.frozen(changed)
        except ModelError:  # these blocks hold little that can be quantised
            return
        yield f"prefix.precision: {precision}", changed


def _placement(variant: Variant, planner: Planner) -> Knob:
    if variant.frozen.placement == "device":
        frozen = variant.frozen.model_copy(update={"placement": "cpu"})
        yield (
            "prefix.placement: cpu (slower: the frozen blocks are copied for each batch)",
            replace(variant, frozen=frozen),
        )


def _length(variant: Variant, planner: Planner) -> Knob:
    tokens = 2 ** ((variant.tokens - 1).bit_length() - 1)  # the next power of two below
    while tokens >= _SHORTEST:
        yield (
            f"data.max_length: {tokens} (longer rows lose context)",
            replace(variant, tokens=tokens, supervised=min(variant.supervised, tokens)),
        )
        tokens //= 2


def _offload(variant: Variant, planner: Planner) -> Knob:
    spec = variant.spec
    if spec.optimizer_at == "device" and spec.stage in (None, 2, 3):
        stage, width = spec.stage or 2, planner.meta.hidden_size
        offloaded = zero_spec(stage, spec.ranks, spec.accumulates, width, spec.optimizer, offload=True)
        yield (
            f"--ds ds_configs/zero{stage}_offload.json (slower: masters and moments are on the host)",
            replace(variant, spec=offloaded),
        )


def _ranks(variant: Variant, planner: Planner) -> Knob:
    spec = variant.spec
    width = planner.meta.hidden_size
    ranks, offload = spec.ranks if spec.ranks > 1 else 2, spec.optimizer_at != "device"
    while ranks <= max(_MOST_RANKS, spec.ranks):
        for stage in (2, 3):
            if (ranks, stage) > (spec.ranks, spec.stage or 0):
                divided = zero_spec(stage, ranks, spec.accumulates, width, spec.optimizer, offload)
                yield (
                    f"--ds ds_configs/zero{stage}{'_offload' if offload else ''}.json on {ranks} ranks",
                    replace(variant, spec=divided),
                )
        ranks *= 2


def _blocks(variant: Variant, planner: Planner) -> Knob:
    if planner.is_phase:
        return  # with fewer blocks here, another phase may be the one that needs most
    for position, selector in enumerate(variant.selectors):
        if isinstance(selector, str) and (found := re.fullmatch(r"last:(\d+)", selector.strip())):
            blocks = int(found[1]) // 2
            while blocks:
                selectors = (*variant.selectors[:position], f"last:{blocks}", *variant.selectors[position + 1 :])
                yield f"mask.train: {' '.join(map(str, selectors))}", replace(variant, selectors=selectors)
                blocks //= 2
            return


def _knobs(
    planner: Planner, variant: Variant, in_update: bool | None = None
) -> list[Callable[[Variant, Planner], Knob]]:
    """Return the knobs that can help: where the update is the peak, none that only makes a micro batch smaller."""
    if in_update is None:
        in_update = planner.memory(variant).moment == "update"
    smaller = [] if in_update else [_checkpointing, _micro_batch]
    prefix = [_precision, _placement]
    return [*smaller, *prefix, _offload, *([] if in_update else [_length]), _ranks, _blocks]
