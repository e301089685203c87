"""Plan a run, and variants of it with other settings, each from a traced micro batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from toolkit.activation_cache.cached_prefix import FILL_TOKENS, STREAMED_FILL_TOKENS
from toolkit.activation_cache.namespace import bytes_of
from toolkit.activation_cache.packing import packing_attentions
from toolkit.activation_cache.policy import has_dropout, limit_obstacle, mask_obstacle
from toolkit.config.mask_schema import MaskEntry
from toolkit.config.policy import decide_cache, most_rows_at_once, refuse_packing
from toolkit.config.schema import PrefixConfig, RunConfig
from toolkit.mask.audit import AuditRow, audit, audit_table
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.mask.rotation import Rotation
from toolkit.planning.engine_memory import ONE_PHASE, OtherPhases, engine_memory
from toolkit.planning.engine_spec import EngineSpec
from toolkit.planning.flops import StepFlops, count_flops
from toolkit.planning.memory import Memory, checkpoint_bytes, memory_by_kind
from toolkit.planning.meta_model import MetaModel
from toolkit.planning.micro_batch import largest_of_rows, largest_of_tokens
from toolkit.planning.prefix_memory import PrefixMemory, prefix_memory
from toolkit.planning.trace import BatchShape, Trace
from toolkit.planning.traced_split import MetaSplit
from toolkit.planning.workload import Workload
from toolkit.runtime.errors import PlanError
from toolkit.split.logit_processing import MODEL_CODE_ERRORS
from toolkit.split.loss_head import Shortcuts


@dataclass(frozen=True)
class RunVariant:
    """The settings of a run that its memory depends on: the recipe's own, or those of a change to propose."""

    selectors: tuple[MaskEntry, ...]
    rows: int
    """Rows of a micro batch; with ``micro_tokens`` those of a step are this times ``accumulation``."""
    accumulation: int
    """Micro batches of a step."""
    tokens: int
    """Tokens of the longest row."""
    supervised: int
    """Supervised tokens of the row that has most."""
    checkpointing: bool
    packed: bool
    """True if the rows of a micro batch are packed, False if they are padded."""
    spec: EngineSpec
    prefix: PrefixConfig
    """Precision and placement of the prefix's weights."""
    micro_tokens: int | None = None
    """Most tokens of a micro batch; None if it has ``rows`` rows."""
    cached: bool = False
    """True if a first pass over the data caches the prefix's hidden states, after which its weights are freed."""

    def shape(self, workload: Workload) -> BatchShape:
        """Return the shape of the largest micro batch."""
        longest, tokens = (self.tokens, self.supervised), self.micro_tokens
        if tokens is None:
            return largest_of_rows(workload, longest, self.rows, self.packed)
        return largest_of_tokens(workload, longest, tokens, self.rows * self.accumulation, self.packed)


@dataclass(frozen=True)
class PhaseSummary:
    """Summary of one phase of a mask schedule."""

    end: str
    """End of the phase as the recipe writes it."""
    boundary: int
    trained: int
    """Parameters that train."""
    peak: int
    """Bytes of tensors at the peak."""
    is_most: bool
    """True for the phase that needs most memory, which the rest of the plan describes."""


@dataclass(frozen=True)
class Plan:
    """Memory of one rank, FLOPs and disk space of a run."""

    model: str
    source: str
    """Where the model's shapes were read from."""
    mask: LayerMask
    audit: tuple[AuditRow, ...]
    audit_text: str
    variant: RunVariant
    shape: BatchShape
    """Shape of the largest micro batch."""
    workload: Workload
    is_cut: bool
    """False where the architecture cannot be cut, so that the frozen blocks run inside the suffix."""
    memory: Memory
    prefix_memory: PrefixMemory
    """Bytes of the prefix's weights by place."""
    flops: StepFlops
    quantised: int
    """Bytes of the layers above the frost line that are held in 8 or 4 bits."""
    token_bytes: int
    """Bytes of one token's hidden state at the frost line."""
    checkpoint: int
    """Bytes of one checkpoint on disk."""
    keep: int
    """Number of checkpoints kept on disk."""
    passes: float
    """Passes over the training rows."""
    phases: tuple[PhaseSummary, ...] = ()
    """Phases of the mask schedule, in order; empty without a schedule."""
    rotation: Rotation | None = None
    """The rotation of whose turns this is the one that needs most memory."""


@dataclass
class Planner:
    """Plan variants of one run; traces are cached."""

    config: RunConfig
    meta: MetaModel
    workload: Workload
    passes: float = float("inf")
    """Passes over the training rows with this mask."""
    cut: bool = True
    """True to cut the model at the frost line, if its architecture allows it."""
    packed: bool | None = None
    """Whether micro batches are packed; None to decide by recipe and rows, without the check that the run makes."""
    cached: bool | None = None
    """Whether the prefix is cached; None to decide likewise."""
    shortcuts: Shortcuts | None = None
    """Shortcuts that the run takes at the top of the suffix; None chooses them as the run does."""
    phase_mask: LayerMask | None = None
    """Mask of a phase, in which the other phases of a schedule have a say; None builds it from the recipe."""
    rotation: Rotation | None = None
    """The rotation of which ``phase_mask`` is a turn."""
    others: OtherPhases = ONE_PHASE
    _splits: dict[tuple[Any, ...], MetaSplit] = field(default_factory=dict)

    @property
    def is_phase(self) -> bool:
        """Return True if this is one phase of a mask schedule, whose selectors stay as they are."""
        return self.phase_mask is not None

    def variant(self, spec: EngineSpec, checkpointing: bool) -> RunVariant:
        """Return the variant with the recipe's own settings.

        Raises:
            ConfigError: ``prefix.cache`` is ``on``, and this run cannot be cached.
            MaskError: the mask is invalid.
            PlanError: the architecture cannot be traced without data.
        """
        train = self.config.train
        plain = RunVariant(
            selectors=tuple(self.config.mask.train), rows=train.micro_batch_size,
            accumulation=train.gradient_accumulation_steps, tokens=self.workload.tokens,
            supervised=self.workload.supervised, checkpointing=checkpointing, packed=False, spec=spec,
            prefix=self.config.prefix, micro_tokens=train.micro_batch_tokens,
        )  # fmt: skip
        variant = replace(plain, packed=self._decide_packing(plain))
        return replace(variant, cached=self._decide_caching(variant))

    def memory(self, variant: RunVariant) -> Memory:
        """Return the memory of a variant on one rank; raises as ``variant``."""
        trace, below = self._trace(variant), self.prefix_memory(variant)
        # a later phase of a schedule may train blocks below this frost line
        is_freed = variant.cached and (not self.is_phase or self.rotation is not None)
        fill_ratio = self.fill_tokens(variant) / (trace.shape.rows * trace.shape.tokens) if is_freed else None
        engine = engine_memory(variant.spec, self._split(variant).tensors, below, self.others)
        return memory_by_kind(engine, trace, below.streamed, fill_ratio)

    def fill_tokens(self, variant: RunVariant) -> int:
        """Return the tokens of a batch of the pass that fills the cache on a GPU.

        Where weights are streamed, a batch is so large that it computes for as long as they are copied, but no larger
        than what leaves the peak to training, with activation checkpointing unless the recipe has it off.
        """
        below = self.prefix_memory(variant)
        if not below.offloaded:
            return FILL_TOKENS
        checkpointing = self.config.train.gradient_checkpointing != "off"
        trace = self._trace(replace(variant, checkpointing=checkpointing))
        engine = engine_memory(variant.spec, self._split(variant).tensors, below)
        training = memory_by_kind(engine, trace, below.streamed, fill_ratio=0.0).beside_weights
        per_token = trace.most_in_prefix / (trace.shape.rows * trace.shape.tokens)
        room = int((training - engine.prefix_weights - below.streamed) / max(per_token, 1.0))
        return max(FILL_TOKENS, min(STREAMED_FILL_TOKENS[variant.prefix.precision], room))

    def prefix_memory(self, variant: RunVariant) -> PrefixMemory:
        """Return the bytes of the prefix's weights, by place.

        Raises:
            ModelError: the recipe quantises them, and this architecture does not allow it.
        """
        split = self._split(variant)
        return prefix_memory(split.prefix, split.suffix, split.anatomy, split.mask.boundary, variant.prefix)

    def plan(self, variant: RunVariant) -> Plan:
        """Return the plan of a variant.

        Raises:
            PlanError: the architecture cannot be traced without data, or not be cut although the recipe quantises or
                offloads its prefix.
        """
        memory = self.memory(variant)
        split = self._split(variant)
        if not split.is_cut and (variant.prefix.precision, variant.prefix.placement) != ("model", "device"):
            raise PlanError(
                f"{type(self.meta.model).__name__} cannot be cut at block {split.mask.boundary}, so it has no prefix "
                "of its own to store otherwise; leave out prefix.precision and prefix.placement"
            )
        plain = self._trace_twice(replace(variant, checkpointing=False))
        checkpointed = self._trace_twice(variant) if variant.checkpointing else None
        return Plan(
            model=self.config.model.name_or_path, source=self.meta.note, mask=split.mask,
            audit=tuple(audit(split.mask, self.meta.anatomy)),
            audit_text=audit_table(split.mask, self.meta.anatomy), variant=variant,
            shape=variant.shape(self.workload), workload=self.workload,
            is_cut=split.is_cut, memory=memory, prefix_memory=self.prefix_memory(variant),
            flops=count_flops(plain, checkpointed), quantised=split.tensors.quantised,
            token_bytes=self.meta.hidden_size * split.tensors.width,
            checkpoint=checkpoint_bytes(variant.spec, split.tensors), keep=self.config.output.keep,
            passes=self.passes, rotation=self.rotation,
        )  # fmt: skip

    def _decide_packing(self, variant: RunVariant) -> bool:
        """Return what ``choose_packing`` will decide in the run, as far as that can be known without weights."""
        if self.packed is not None:
            return self.packed
        mode, distinct = self.config.data.packing, self.workload.distinct
        lengths = None if distinct is None else np.unique(distinct)
        if refuse_packing(mode, most_rows_at_once(self.config.train), lengths):
            return False
        attentions = packing_attentions(mode, self.meta.model.config._attn_implementation)
        if not attentions or mode == "on":  # where it is on, the run refuses what it finds not to be exact
            return bool(attentions)
        if self.meta.model._is_stateful:  # a recurrent layer hands its state on to the next sample
            return False
        try:
            return not self._trace(replace(variant, packed=True, checkpointing=False)).mixes_samples
        except PlanError:  # the model's code refuses packed rows
            return False

    def _decide_caching(self, variant: RunVariant) -> bool:
        """Return whether the run will cache the prefix, if the cache is empty and the disk has room."""
        if self.cached is not None:
            return self.cached
        settings = self.config.prefix
        obstacle = mask_obstacle(self._split(variant).mask)
        if obstacle is None and (distinct := self.workload.distinct) is not None:
            width, dtype = self.meta.hidden_size, self.meta.model.dtype
            size = bytes_of(int(np.sum(distinct)), len(distinct), width, dtype)
            obstacle = limit_obstacle(settings, size)
        if not decide_cache(settings, obstacle, self.passes).on:
            return False
        self._trace(variant)  # gives up cutting the model if that fails; the run itself checks it with real weights
        return self._split(variant).prefix is not None and not has_dropout(self.meta.model)

    def _split(self, variant: RunVariant, whole: bool = False) -> MetaSplit:
        """Return the meta model under the variant's mask, cut at its frost line.

        With ``whole`` it is not cut, in this and all later calls.
        """
        section = self.config.mask.model_copy(update={"train": list(variant.selectors)})
        mask = self.phase_mask or build_mask(section, self.meta.anatomy)
        boundary = mask.boundary if self.cut and mask.has_prefix else None
        key = (repr(variant.selectors), variant.packed, boundary)
        split = self._splits.get(key)
        if whole or split is None or self.shortcuts not in (None, split.shortcuts):
            boundary = None if whole else boundary
            split = self._splits[key] = MetaSplit(self.meta, mask, boundary, variant.packed, self.shortcuts)
        return split

    def _trace_twice(self, variant: RunVariant) -> list[Trace]:
        """Trace with two numbers of supervised positions, for ``count_flops``."""
        supervised = variant.shape(self.workload).supervised
        other = supervised // 8 if supervised >= 8 else supervised + 1
        return [self._trace(variant), self._trace(variant, other)]

    def _trace(self, variant: RunVariant, supervised: int | None = None) -> Trace:
        """Trace a micro batch of ``variant``; ``supervised`` replaces its number of supervised positions.

        If the trace fails, trace again with the model uncut.
        """
        shape = variant.shape(self.workload)
        shape = shape if supervised is None else replace(shape, supervised=supervised)
        split = self._split(variant)
        try:
            return split.trace(shape, variant.checkpointing)
        except MODEL_CODE_ERRORS as error:
            if split.prefix is None:
                reason = " ".join(str(error).split())[:200]
                raise PlanError(
                    f"{type(self.meta.model).__name__} cannot be planned: it looks at the content of tensors, "
                    f"and a plan has none ({reason}). Train a few steps and read peak_memory_gib instead"
                ) from None
        self._split(variant, whole=True)
        return self._trace(variant, supervised)
