"""Put a plan together, and try what else would fit."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.config.schema import MaskGroup, RunConfig
from toolkit.errors import PlanError
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.audit import AuditRow, audit, audit_table
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.anatomy import Anatomy
from toolkit.plan.compute import Compute, compute
from toolkit.plan.load import Load
from toolkit.plan.memory import EngineSpec, Memory, Tensors, checkpoint_bytes, memory, standing
from toolkit.plan.rehearse import Rehearsal, Shape, rehearse
from toolkit.plan.skeleton import LOOKED_AT_CONTENT, Skeleton
from toolkit.prefix.recompute import recompute_blocks
from toolkit.prefix.split import Prefix, Suffix, split


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
    spec: EngineSpec


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
    load: Load
    is_cut: bool
    """False where the architecture cannot be cut, so that the frozen blocks run inside the suffix."""
    memory: Memory
    compute: Compute
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
    skeleton: Skeleton
    load: Load
    cut: bool = True
    """Whether the model is to be cut at the frost line, if it can be."""
    untied: bool = False
    """The head is untied though this mask may not ask for it: another phase does."""
    is_phase: bool = False
    """This is one phase of several."""
    _halves: dict[str, _Halves] = field(default_factory=dict)
    _rehearsals: dict[tuple[Any, ...], Rehearsal] = field(default_factory=dict)

    def variant(self, spec: EngineSpec, recompute: bool) -> Variant:
        """The run as the recipe has it."""
        train = self.config.train
        return Variant(
            selectors=tuple(self.config.mask.train), rows=train.micro_batch_size,
            accumulation=train.gradient_accumulation_steps, tokens=self.load.tokens, supervised=self.load.supervised,
            recompute=recompute, spec=spec,
        )  # fmt: skip

    def memory(self, variant: Variant) -> Memory:
        """Bytes on one rank.

        Raises:
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be rehearsed without data.
        """
        halves = self._split(variant.selectors)
        return memory(standing(variant.spec, halves.tensors), self._rehearse(variant))

    def plan(self, variant: Variant) -> Plan:
        """The whole plan.

        Raises:
            MaskError: the mask is at fault.
            PlanError: the architecture cannot be rehearsed without data.
        """
        held = self.memory(variant)
        halves = self._split(variant.selectors)
        plain = self._rehearse(replace(variant, recompute=False))
        checkpointed = self._rehearse(variant) if variant.recompute else None
        head = f"{self.skeleton.anatomy.head}.weight"
        below = any(name != head for name in halves.mask.names)
        products = int(head in halves.trained) + int(below)
        return Plan(
            model=self.config.model.name_or_path, source=self.skeleton.note, mask=halves.mask,
            audit=tuple(audit(halves.mask, self.skeleton.anatomy)),
            audit_text=audit_table(halves.mask, self.skeleton.anatomy), variant=variant, load=self.load,
            is_cut=halves.prefix is not None or not halves.mask.has_prefix, memory=held,
            compute=compute(plain, checkpointed, halves.head.numel(), products),
            checkpoint=checkpoint_bytes(variant.spec, halves.tensors), keep=self.config.output.keep,
        )  # fmt: skip

    def _split(self, selectors: tuple[str | MaskGroup, ...]) -> _Halves:
        key = repr(selectors)
        if key not in self._halves:
            mask = build_mask(self.config.mask.model_copy(update={"train": list(selectors)}), self.skeleton.anatomy)
            if self.untied:
                mask = replace(mask, tied="untie")
            boundary = mask.boundary if self.cut and mask.has_prefix else None
            self._halves[key] = _halve(self.skeleton, mask, boundary)
        return self._halves[key]

    def _rehearse(self, variant: Variant) -> Rehearsal:
        shape = Shape(variant.rows, variant.tokens, variant.rows * variant.supervised)
        key = (repr(variant.selectors), variant.recompute, shape)
        if key not in self._rehearsals:
            halves = self._split(variant.selectors)
            try:
                self._rehearsals[key] = _run(halves, shape, variant.recompute)
            except LOOKED_AT_CONTENT as error:
                if halves.prefix is None:
                    reason = " ".join(str(error).split())[:200]
                    raise PlanError(
                        f"{type(self.skeleton.model).__name__} cannot be planned: it looks at the content of tensors, "
                        f"and a plan has none ({reason}). Train a few steps and read peak_memory_gib instead"
                    ) from None
                self._halves[repr(variant.selectors)] = _halve(self.skeleton, halves.mask, None)
                return self._rehearse(variant)
        return self._rehearsals[key]


@dataclass(frozen=True)
class _Halves:
    model: PreTrainedModel
    """A copy of the skeleton with the mask applied."""
    anatomy: Anatomy
    mask: LayerMask
    boundary: int | None
    """Where it is cut; none is not at all."""
    prefix: Prefix | None
    suffix: Suffix
    trained: dict[str, nn.Parameter]
    tensors: Tensors

    @property
    def head(self) -> torch.Tensor:
        """The head's matrix [vocabulary, hidden_size]."""
        matrix: torch.Tensor = self.model.get_output_embeddings().weight
        return matrix

    @cached_property
    def recomputing(self) -> Suffix:
        """The suffix again, with the blocks from the frost line up checkpointed."""
        _, suffix = split(self.model, self.anatomy, self.boundary)
        recompute_blocks(suffix.blocks(self.mask.boundary))
        return suffix


def _halve(skeleton: Skeleton, mask: LayerMask, boundary: int | None) -> _Halves:
    model, anatomy = copy.deepcopy(skeleton.model), skeleton.anatomy  # each mask has parameters of its own
    apply_mask(model, mask, anatomy)
    model.train()
    prefix, suffix = split(model, anatomy, boundary)
    if prefix is None and mask.tied == "head_only":
        suffix.detach_embeddings(anatomy)
    trained = trainable_parameters(suffix.model, mask)
    return _Halves(model, anatomy, mask, boundary, prefix, suffix, trained, _sizes(prefix, suffix, trained))


def _sizes(prefix: Prefix | None, suffix: Suffix, trained: dict[str, nn.Parameter]) -> Tensors:
    def storages(module: nn.Module | None) -> dict[int, int]:
        parameters = module.parameters() if module is not None else ()
        return {p.untyped_storage()._cdata: p.numel() for p in parameters}

    below, above = storages(prefix), storages(suffix)
    return Tensors(
        prefix=sum(size for storage, size in below.items() if storage not in above),
        shared=sum(size for storage, size in below.items() if storage in above),
        trained=tuple(parameter.numel() for parameter in trained.values()),
        frozen=tuple(p.numel() for p in suffix.parameters() if not p.requires_grad),
        width=next(suffix.parameters()).element_size(),
    )


def _run(halves: _Halves, shape: Shape, recompute: bool) -> Rehearsal:
    suffix = halves.recomputing if recompute else halves.suffix
    return rehearse(halves.prefix, suffix, halves.trained.values(), shape, halves.head.shape[0])


def hidden_size(skeleton: Skeleton) -> int:
    """Width of the hidden states."""
    return int(skeleton.model.config.get_text_config().hidden_size)


def positions(skeleton: Skeleton) -> int | None:
    """Longest input in tokens, where the config states one."""
    longest = getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    return int(longest) if longest else None
