"""The model as a phase of the mask schedule cuts it: prefix, suffix, and what was decided about them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from toolkit.activation_cache.cached_prefix import CachedPrefix, HiddenStates
from toolkit.activation_cache.packing import choose_packing
from toolkit.config.policy import Decision, most_rows_at_once
from toolkit.data.batches import Batch, collate
from toolkit.mask.apply import apply_mask, unused_adapters
from toolkit.mask.audit import audit_table
from toolkit.mask.layer_mask import LayerMask
from toolkit.mask.row_layers import unused_rows
from toolkit.mask.schedule import Phase
from toolkit.models.probe import called_modules, evaluation_mode
from toolkit.planning.planner import Plan, Planner
from toolkit.runtime.errors import MaskError
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.joined_model import JoinedModel
from toolkit.split.loss_head import Shortcuts
from toolkit.split.suffix import Suffix
from toolkit.training.context import ModelHandle, RunContext, choose_checkpointing
from toolkit.training.cut import cut

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class PhaseCut:
    """The model as a phase cuts and plans it, before an engine is built."""

    phase: Phase
    prefix: HiddenStates | None
    """Computes or reads the hidden states at the frost line; None if the model is not cut."""
    suffix: Suffix
    joined: JoinedModel
    """Joins prefix and suffix to one model again, to generate with."""
    packing: Decision
    """Whether micro batches are packed; decided in the first phase."""
    planner: Planner | None
    """Planner of this phase as it was built; None for an architecture that cannot be planned."""
    plan: Plan | None
    """Plan of this phase as it was built; None if it cannot be planned."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""

    @property
    def mask(self) -> LayerMask:
        """The mask of what trains."""
        return self.phase.mask


@dataclass(frozen=True)
class KeptCut:
    """Holds what the next turn of a rotation takes over from a cut at the same frost line, and so need not do again."""

    prefix: HiddenStates | None
    cut_at: tuple[int | None, tuple[int | None, ...]]
    """``Suffix.cut_at``."""
    shortcuts: Shortcuts
    packing: Decision
    planner: Planner | None
    plan: Plan | None
    checkpointing: bool

    @classmethod
    def of(cls, cut_model: PhaseCut) -> KeptCut:
        """Return what is kept of ``cut_model``; no module that an engine has changed."""
        suffix = cut_model.suffix
        return cls(
            cut_model.prefix, suffix.cut_at, suffix.shortcuts, cut_model.packing, cut_model.planner, cut_model.plan,
            cut_model.checkpointing,
        )  # fmt: skip


def cut_phase(context: RunContext, model: ModelHandle, phase: Phase, packing: Decision | None) -> PhaseCut:
    """Apply the mask, cut the model, and decide on shortcuts and packing; ``packing`` is that of an earlier phase."""
    loaded, phases = model.loaded, context.schedule.phases
    apply_mask(loaded.model, phase.mask, loaded.anatomy, context.config.train.seed)
    if context.schedule.rotation is not None:
        log.info("%s; %d turns", context.schedule.rotation.text(), len(phases))
    if len(phases) > 1:
        log.info("phase %d of %d: steps %d to %d", phase.index + 1, len(phases), phase.start + 1, phase.end)
    together = ", all turns together" if context.schedule.rotation is not None else ""
    table = audit_table(context.schedule.shown(phase), loaded.anatomy)
    log.info("layer mask of %s%s:\n%s", context.config.model.name_or_path, together, table)
    prefix, suffix = cut(context, loaded, phase)
    device = context.world.device
    row = collate([context.dataset.train.shortest()], pad_id=0).to(device)
    hidden = prefix(row) if prefix else None
    if phase.mask.adapters or phase.mask.rows:
        _require_used_adapters(suffix, hidden, row)
    suffix.choose_shortcuts(hidden, row)
    log.info("supervised positions: %s", suffix.loss_text)
    if packing is None:
        mode, rows = context.config.data.packing, most_rows_at_once(context.config.train)
        packing = choose_packing(mode, rows, prefix, suffix, context.examples, device)
        log.info("packing: %s", packing.reason)
    planner = None
    if context.planners:
        planner = replace(
            context.planners[context.planned_as(phase)], cut=prefix is not None,
            cached=isinstance(prefix, CachedPrefix), packed=packing.on, shortcuts=suffix.shortcuts,
        )  # fmt: skip
    joined = JoinedModel(loaded.model, loaded.anatomy, None if prefix is None else phase.mask.boundary)
    return PhaseCut(phase, prefix, suffix, joined, packing, planner, plan=None, checkpointing=False)


def cut_again(context: RunContext, model: ModelHandle, phase: Phase, kept: KeptCut) -> PhaseCut:
    """Cut the model for the next turn of a rotation, where the turn before did.

    The prefix stays, with its cache open. The weights that trained since change no decision: what the suffix may leave
    out follows from the model's code, what it needs from the shapes.
    """
    loaded = model.loaded
    apply_mask(loaded.model, phase.mask, loaded.anatomy)
    suffix = Suffix(loaded.model, loaded.anatomy, *kept.cut_at)
    suffix.shortcuts = kept.shortcuts
    if kept.prefix is None and phase.mask.tied == "head_only":
        suffix.detach_embeddings()
    if kept.checkpointing:
        checkpoint_blocks(suffix.blocks(phase.mask.boundary))
    joined = JoinedModel(loaded.model, loaded.anatomy, None if kept.prefix is None else phase.mask.boundary)
    log.debug("turn %d of %d: %s train", phase.index + 1, len(context.schedule.phases), phase.turn)
    return PhaseCut(phase, kept.prefix, suffix, joined, kept.packing, kept.planner, kept.plan, kept.checkpointing)


def with_checkpointing(context: RunContext, cut_model: PhaseCut) -> PhaseCut:
    """Decide on activation checkpointing by the memory that is free now, apply it, and plan the phase with it."""
    checkpointing, plan = choose_checkpointing(context, cut_model.planner)
    log.info("gradient checkpointing: %s", checkpointing.reason)
    if checkpointing.on:
        checkpoint_blocks(cut_model.suffix.blocks(cut_model.mask.boundary))
    return replace(cut_model, plan=plan, checkpointing=checkpointing.on)


def _require_used_adapters(suffix: Suffix, hidden: torch.Tensor | None, row: Batch) -> None:
    """Raise MaskError if the model does not call a layer with an adapter or rows, which would then learn nothing."""
    with evaluation_mode(suffix):
        called = called_modules(suffix.model, lambda: suffix.logits(hidden, row))
    unused = unused_adapters(suffix.model, called)
    if tables := unused_rows(suffix.model, called):
        raise MaskError(
            f"mask.train: rows trains some of {tables[0]}, which this model never calls: it computes with its weight "
            "past the rows. Train the table whole, or leave it out"
        )
    if unused:
        raise MaskError(
            f"mask.train: lora adapts {unused[0]} and {len(unused) - 1} more layers that this model never calls: it "
            "computes past an adapter there, or not at all. Name the other layers in lora.targets"
        )
