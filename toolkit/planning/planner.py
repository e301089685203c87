"""Plan variants of a run, each from a traced micro batch."""

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
from toolkit.planning.engine_memory import EngineSpec, engine_memory
from toolkit.planning.flops import StepFlops, count_flops
from toolkit.planning.memory import Memory, checkpoint_bytes, memory
from toolkit.planning.meta_model import LOOKED_AT_CONTENT, MetaModel
from toolkit.planning.prefix_memory import PrefixMemory, frozen_bytes
from toolkit.planning.trace import BatchShape, Trace
from toolkit.planning.traced_split import MetaSplit, meta_split
from toolkit.planning.workload import Workload
from toolkit.runtime.errors import PlanError
from toolkit.split.loss_head import Shortcuts


@dataclass(frozen=True)
class Variant:
    """Hold the settings that memory depends on."""

    selectors: tuple[str | MaskGroup, ...]
    rows: int
    """Of a micro batch."""
    accumulation: int
    tokens: int
    """Of the longest row."""
    supervised: int
    """Most of a row."""
    checkpointing: bool
    packed: bool
    """Rows of a micro batch are laid end to end, not padded."""
    spec: EngineSpec
    frozen: PrefixConfig
    """How the prefix's weights are kept."""
    cached: bool
    """What the prefix computes is cached, and its weights are freed after a first pass."""


@dataclass(frozen=True)
class PhaseSummary:
    """Hold one phase of a schedule in short."""

    end: str
    """When it ends, in the recipe's words."""
    boundary: int
    trained: int
    """Parameters that train."""
    peak: int
    """Bytes of tensors at the peak."""
    is_most: bool
    """True for the phase that needs most, which the rest of the plan describes."""


@dataclass(frozen=True)
class Plan:
    """Hold what a run will cost on one rank, and in all."""

    model: str
    source: str
    """Where the model's shapes are from."""
    mask: LayerMask
    audit: tuple[AuditRow, ...]
    audit_text: str
    variant: Variant
    workload: Workload
    is_cut: bool
    """False where the architecture cannot be cut, so that the frozen blocks run inside the suffix."""
    memory: Memory
    frozen: PrefixMemory
    """Where the prefix's weights are."""
    flops: StepFlops
    token_bytes: int
    """Of one token's hidden state at the frost line."""
    checkpoint: int
    """Bytes of one checkpoint on disk."""
    keep: int
    """Checkpoints that stay."""
    phases: tuple[PhaseSummary, ...] = ()
    """Of a run whose mask changes, in order; empty for one mask throughout."""


@dataclass
class Planner:
    """Plan variants of one run; what was traced once is not traced again."""

    config: RunConfig
    meta: MetaModel
    workload: Workload
    passes: float = float("inf")
    """Over the training rows while the mask holds."""
    cut: bool = True
    """The model is to be cut at the frost line, if it can be."""
    packed: bool | None = None
    """Micro batches are packed; None decides by recipe and rows, without the run's own check."""
    cached: bool | None = None
    """The prefix is cached; None likewise."""
    shortcuts: Shortcuts = Shortcuts(True, True, True)  # noqa: RUF009
    """Shortcuts to take at the top of the suffix, where the structure allows them."""
    untied: bool = False
    """The head is untied though this mask may not ask for it: another phase does."""
    is_phase: bool = False
    """This is one phase of several."""
    _splits: dict[tuple[Any, ...], MetaSplit] = field(default_factory=dict)

    def variant(self, spec: EngineSpec, checkpointing: bool) -> Variant:
        """Return the run as the recipe has it.

        Raises:
            ConfigError: ``prefix.cache`` is ``on``, and this run cannot be cached.
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be traced without data.
        """
        train = self.config.train
        plain = Variant(
            selectors=tuple(self.config.mask.train), rows=train.micro_batch_size,
            accumulation=train.gradient_accumulation_steps, tokens=self.workload.tokens,
            supervised=self.workload.supervised, checkpointing=checkpointing, packed=self._packs(), spec=spec,
            frozen=self.config.prefix, cached=False,
        )  # fmt: skip
        return replace(plain, cached=self._caches(plain))

    def memory(self, variant: Variant) -> Memory:
        """Return the bytes on one rank.

        Raises:
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be traced without data.
        """
        trace = self._trace(variant)
        split = self._split(variant.selectors, variant.packed)
        kept = self.frozen(variant)
        is_freed = variant.cached and not self.is_phase  # a later phase may need what lies below the line
        fill = FILL_TOKENS / (trace.shape.rows * trace.shape.tokens) if is_freed else None
        return memory(engine_memory(variant.spec, split.tensors, kept), trace, kept.streamed, fill)

    def frozen(self, variant: Variant) -> PrefixMemory:
        """Return the bytes of the prefix's weights, wherever they are kept.

        Raises:
            MaskError: the mask is at fault.
            ModelError: they are to be quantised, and cannot be.
        """
        split = self._split(variant.selectors, variant.packed)
        return frozen_bytes(split.prefix, split.suffix, split.anatomy, split.mask.boundary, variant.frozen)

    def plan(self, variant: Variant) -> Plan:
        """Return the plan of a variant.

        Raises:
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be traced without data.
        """
        held = self.memory(variant)
        split = self._split(variant.selectors, variant.packed)
        plain = self._trace_twice(replace(variant, checkpointing=False))
        checkpointed = self._trace_twice(variant) if variant.checkpointing else None
        return Plan(
            model=self.config.model.name_or_path, source=self.meta.note, mask=split.mask,
            audit=tuple(audit(split.mask, self.meta.anatomy)),
            audit_text=audit_table(split.mask, self.meta.anatomy), variant=variant, workload=self.workload,
            is_cut=split.prefix is not None or not split.mask.has_prefix, memory=held, frozen=self.frozen(variant),
            flops=count_flops(plain, checkpointed),
            token_bytes=self.meta.hidden_size * split.tensors.width,
            checkpoint=checkpoint_bytes(variant.spec, split.tensors), keep=self.config.output.keep,
        )  # fmt: skip

    def _packs(self) -> bool:
        """Return what ``choose_packing`` will decide if the model keeps packed samples apart."""
        if self.packed is not None:
            return self.packed
        mode, lengths = self.config.data.packing, self.workload.distinct
        if refuse_packing(mode, self.config.train.micro_batch_size, lengths):
            return False
        return bool(packing_attentions(mode, self.meta.model.config._attn_implementation))

    def _caches(self, plain: Variant) -> bool:
        """Return what the run will decide if the cache is empty and the disk has room."""
        if self.cached is not None:
            return self.cached
        settings, split = self.config.prefix, self._split(plain.selectors, plain.packed)
        obstacle = mask_obstacle(split.mask)
        if obstacle is None and self.workload.distinct is not None:
            width, dtype = self.meta.hidden_size, self.meta.model.dtype
            size = bytes_of(sum(self.workload.distinct), len(self.workload.distinct), width, dtype)
            obstacle = limit_obstacle(settings, size)
        if not decide_cache(settings, obstacle, self.passes).on:
            return False
        self._trace(plain)  # finds out whether the architecture can be cut; the run itself tries, and may refuse
        return self._split(plain.selectors, plain.packed).prefix is not None and not has_dropout(self.meta.model)

    def _split(self, selectors: tuple[str | MaskGroup, ...], packed: bool, whole: bool = False) -> MetaSplit:
        """Return the model under the mask of ``selectors``; ``whole`` gives up cutting it, from now on."""
        mask = build_mask(self.config.mask.model_copy(update={"train": list(selectors)}), self.meta.anatomy)
        if self.untied:
            mask = replace(mask, tied="untie")
        boundary = mask.boundary if self.cut and mask.has_prefix else None
        key = (repr(selectors), packed, boundary, self.shortcuts)
        if whole or key not in self._splits:
            self._splits[key] = meta_split(self.meta, mask, None if whole else boundary, packed, self.shortcuts)
        return self._splits[key]

    def _trace_twice(self, variant: Variant) -> list[Trace]:
        """Trace two numbers of supervised positions, so that the work at each of them shows."""
        supervised = _shape(variant, self.workload).supervised
        other = supervised // 8 if supervised >= 8 else supervised + 1
        return [self._trace(variant), self._trace(variant, other)]

    def _trace(self, variant: Variant, supervised: int | None = None) -> Trace:
        """Trace a micro batch of ``variant``, with ``supervised`` positions in all where that is given."""
        shape = _shape(variant, self.workload)
        shape = shape if supervised is None else replace(shape, supervised=supervised)
        split = self._split(variant.selectors, variant.packed)
        try:
            return split.trace(shape, variant.checkpointing)
        except LOOKED_AT_CONTENT as error:
            if split.prefix is None:
                reason = " ".join(str(error).split())[:200]
                raise PlanError(
                    f"{type(self.meta.model).__name__} cannot be planned: it looks at the content of tensors, "
                    f"and a plan has none ({reason}). Train a few steps and read peak_memory_gib instead"
                ) from None
        self._split(variant.selectors, variant.packed, whole=True)
        return self._trace(variant, supervised)


def packed_lengths(variant: Variant, workload: Workload) -> tuple[int, ...]:
    """Return the lengths of the rows of the longest packed micro batch; empty where rows are padded or alone."""
    if not variant.packed or variant.rows == 1:
        return ()
    if workload.lengths is None:
        return (variant.tokens,) * variant.rows
    longest = sorted((tokens for tokens, _ in workload.lengths), reverse=True)[: variant.rows]
    return tuple(min(tokens, variant.tokens) for tokens in longest)


def _shape(variant: Variant, workload: Workload) -> BatchShape:
    supervised = variant.rows * variant.supervised
    if packed := packed_lengths(variant, workload):
        return BatchShape(1, sum(packed), min(supervised, sum(packed)), packed)
    return BatchShape(variant.rows, variant.tokens, supervised)
