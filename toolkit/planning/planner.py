"""Put a plan together, and try what else would fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.activation_cache.cached_prefix import FILL_TOKENS
from toolkit.activation_cache.namespace import bytes_of
from toolkit.activation_cache.packing import packing_attentions
from toolkit.activation_cache.policy import has_dropout, limit_obstacle, mask_obstacle
from toolkit.config.policy import decide_cache, refuse_packing
from toolkit.config.schema import MaskGroup, PrefixConfig, RunConfig
from toolkit.mask.audit import AuditRow, audit, audit_table
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.planning.engine_memory import EngineSpec, standing
from toolkit.planning.flops import Compute, compute
from toolkit.planning.memory import Memory, checkpoint_bytes, memory
from toolkit.planning.meta_model import LOOKED_AT_CONTENT, MetaModel
from toolkit.planning.prefix_memory import PrefixMemory, frozen_bytes
from toolkit.planning.trace import Shape, Trace
from toolkit.planning.traced_split import MetaSplit, meta_split, trace_split
from toolkit.planning.workload import Workload
from toolkit.runtime.errors import PlanError
from toolkit.split.loss_head import Shortcuts


@dataclass(frozen=True)
class Variant:
    """The settings that memory depends on."""

    selectors: tuple[str | MaskGroup, ...]
    rows: int
    """Of a micro batch."""
    accumulation: int
    tokens: int
    """Of the longest row."""
    supervised: int
    """Most of a row."""
    recompute: bool
    packed: bool
    """Rows of a micro batch are laid end to end, not padded."""
    spec: EngineSpec
    frozen: PrefixConfig
    """How the prefix's weights are kept."""
    cached: bool
    """What the prefix computes is kept on disk, and the prefix let go after a first pass."""


@dataclass(frozen=True)
class PhaseCost:
    """One phase of a schedule in short."""

    end: str
    """When it ends, as the recipe says it."""
    boundary: int
    trained: int
    """Parameters that train."""
    peak: int
    """Bytes of tensors at the peak."""
    is_most: bool
    """True for the phase that needs most, which the rest of the plan is about."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost on one rank, and in all."""

    model: str
    source: str
    """Where the model's shapes are from."""
    mask: LayerMask
    audit: tuple[AuditRow, ...]
    audit_text: str
    variant: Variant
    load: Workload
    is_cut: bool
    """False where the architecture cannot be cut, so that the frozen blocks run inside the suffix."""
    memory: Memory
    frozen: PrefixMemory
    """Where the prefix's weights are."""
    compute: Compute
    token_bytes: int
    """Of one token's hidden state at the frost line."""
    checkpoint: int
    """Bytes of one checkpoint on disk."""
    keep: int
    """Checkpoints that stay."""
    phases: tuple[PhaseCost, ...] = ()
    """Of a run whose mask changes, in order; empty for one mask throughout."""


@dataclass
class Planner:
    """Plans variants of one run; what was rehearsed once is not rehearsed again."""

    config: RunConfig
    skeleton: MetaModel
    load: Workload
    passes: float = float("inf")
    """Over the training rows while the mask holds."""
    cut: bool = True
    """Whether the model is to be cut at the frost line, if it can be."""
    packed: bool | None = None
    """Whether micro batches are packed; none takes what the recipe asks for, without the run's own check."""
    cached: bool | None = None
    """Whether the prefix is cached; likewise."""
    shortcuts: Shortcuts = Shortcuts(True, True, True)  # noqa: RUF009
    """Which short cuts to take at the top of the suffix, where the structure allows them."""
    untied: bool = False
    """The head is untied though this mask may not ask for it: another phase does."""
    is_phase: bool = False
    """This is one phase of several."""
    _halves: dict[str, MetaSplit] = field(default_factory=dict)
    _rehearsals: dict[tuple[Any, ...], Trace] = field(default_factory=dict)

    def variant(self, spec: EngineSpec, recompute: bool) -> Variant:
        """Return the run as the recipe has it.

        Raises:
            ConfigError: ``prefix.cache`` is ``on``, and this run cannot be cached.
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be rehearsed without data.
        """
        train = self.config.train
        plain = Variant(
            selectors=tuple(self.config.mask.train), rows=train.micro_batch_size,
            accumulation=train.gradient_accumulation_steps, tokens=self.load.tokens, supervised=self.load.supervised,
            recompute=recompute, packed=self._packs(), spec=spec, frozen=self.config.prefix, cached=False,
        )  # fmt: skip
        return replace(plain, cached=self._caches(plain))

    def memory(self, variant: Variant) -> Memory:
        """Bytes on one rank.

        Raises:
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be rehearsed without data.
        """
        rehearsal = self._rehearse(variant)
        halves = self._split(variant.selectors, variant.packed)
        kept = self.frozen(variant)
        lets_go = variant.cached and not self.is_phase  # a later phase may need what lies below the line
        fill = FILL_TOKENS / (rehearsal.shape.rows * rehearsal.shape.tokens) if lets_go else None
        return memory(standing(variant.spec, halves.tensors, kept), rehearsal, kept.lent, fill)

    def frozen(self, variant: Variant) -> PrefixMemory:
        """Bytes of the prefix's weights, wherever they are kept.

        Raises:
            MaskError: the mask is at fault.
            ModelError: they are to be quantised, and cannot be.
        """
        halves = self._split(variant.selectors, variant.packed)
        return frozen_bytes(halves.prefix, halves.suffix, halves.anatomy, halves.mask.boundary, variant.frozen)

    def plan(self, variant: Variant) -> Plan:
        """The whole plan.

        Raises:
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be rehearsed without data.
        """
        held = self.memory(variant)
        halves = self._split(variant.selectors, variant.packed)
        plain = self._rehearse_twice(replace(variant, recompute=False))
        checkpointed = self._rehearse_twice(variant) if variant.recompute else None
        return Plan(
            model=self.config.model.name_or_path, source=self.skeleton.note, mask=halves.mask,
            audit=tuple(audit(halves.mask, self.skeleton.anatomy)),
            audit_text=audit_table(halves.mask, self.skeleton.anatomy), variant=variant, load=self.load,
            is_cut=halves.prefix is not None or not halves.mask.has_prefix, memory=held, frozen=self.frozen(variant),
            compute=compute(plain, checkpointed),
            token_bytes=self.skeleton.hidden_size * halves.tensors.width,
            checkpoint=checkpoint_bytes(variant.spec, halves.tensors), keep=self.config.output.keep,
        )  # fmt: skip

    def _packs(self) -> bool:
        """Return what ``choose_packing`` will decide if the model keeps packed samples apart."""
        if self.packed is not None:
            return self.packed
        mode, lengths = self.config.data.packing, self.load.distinct
        if refuse_packing(mode, self.config.train.micro_batch_size, lengths):
            return False
        return bool(packing_attentions(mode, self.skeleton.model.config._attn_implementation))

    def _caches(self, plain: Variant) -> bool:
        """Return what the run will decide if the cache is empty and the disk has room."""
        if self.cached is not None:
            return self.cached
        settings, halves = self.config.prefix, self._split(plain.selectors, plain.packed)
        obstacle = mask_obstacle(halves.mask)
        if obstacle is None and self.load.distinct is not None:
            width, dtype = self.skeleton.hidden_size, self.skeleton.model.dtype
            size = bytes_of(sum(self.load.distinct), len(self.load.distinct), width, dtype)
            obstacle = limit_obstacle(settings, size)
        if not decide_cache(settings, obstacle, self.passes).on:
            return False
        self._rehearse(plain)  # finds out whether the architecture can be cut; the run itself tries, and may refuse
        return self._split(plain.selectors, plain.packed).prefix is not None and not has_dropout(self.skeleton.model)

    def _split(self, selectors: tuple[str | MaskGroup, ...], packed: bool) -> MetaSplit:
        key = repr((selectors, packed))
        if key not in self._halves:
            mask = build_mask(self.config.mask.model_copy(update={"train": list(selectors)}), self.skeleton.anatomy)
            if self.untied:
                mask = replace(mask, tied="untie")
            boundary = mask.boundary if self.cut and mask.has_prefix else None
            self._halves[key] = meta_split(self.skeleton, mask, boundary, packed, self.shortcuts)
        return self._halves[key]

    def _rehearse_twice(self, variant: Variant) -> list[Trace]:
        """With different numbers of supervised positions, so that the work at each of them shows."""
        supervised = _shape(variant, self.load).supervised
        other = supervised // 8 if supervised >= 8 else supervised + 1
        return [self._rehearse(variant), self._rehearse(variant, other)]

    def _rehearse(self, variant: Variant, supervised: int | None = None) -> Trace:
        """A micro batch of ``variant``, with ``supervised`` positions in all where that is given."""
        shape = _shape(variant, self.load)
        shape = shape if supervised is None else replace(shape, supervised=supervised)
        key = (repr(variant.selectors), variant.recompute, variant.packed, shape)
        if key not in self._rehearsals:
            halves = self._split(variant.selectors, variant.packed)
            try:
                self._rehearsals[key] = trace_split(halves, shape, variant.recompute)
            except LOOKED_AT_CONTENT as error:
                if halves.prefix is None:
                    reason = " ".join(str(error).split())[:200]
                    raise PlanError(
                        f"{type(self.skeleton.model).__name__} cannot be planned: it looks at the content of tensors, "
                        f"and a plan has none ({reason}). Train a few steps and read peak_memory_gib instead"
                    ) from None
                selected = repr((variant.selectors, variant.packed))
                self._halves[selected] = meta_split(self.skeleton, halves.mask, None, variant.packed, self.shortcuts)
                return self._rehearse(variant, supervised)
        return self._rehearsals[key]


def packed_lengths(variant: Variant, load: Workload) -> tuple[int, ...]:
    """Lengths of the rows of the longest packed micro batch; empty where rows are padded or alone."""
    if not variant.packed or variant.rows == 1:
        return ()
    if load.lengths is None:
        return (variant.tokens,) * variant.rows
    longest = sorted((tokens for tokens, _ in load.lengths), reverse=True)[: variant.rows]
    return tuple(min(tokens, variant.tokens) for tokens in longest)


def _shape(variant: Variant, load: Workload) -> Shape:
    supervised = variant.rows * variant.supervised
    if packed := packed_lengths(variant, load):
        return Shape(1, sum(packed), min(supervised, sum(packed)), packed)
    return Shape(variant.rows, variant.tokens, supervised)
