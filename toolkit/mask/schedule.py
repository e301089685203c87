"""The mask schedule: the phases of a run, each with its own mask and steps. Imports no torch.

Gradual unfreezing (ULMFiT, Howard and Ruder, arXiv 1801.06146) lets the mask grow, progressive freezing (AutoFreeze,
Liu et al., arXiv 2102.01386) lets it shrink. The turns of a rotation (``toolkit.mask.rotation``) are phases as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit.config.mask_schema import LoraEntry
from toolkit.config.schema import MaskConfig
from toolkit.mask.adapters import adapted_weight, union_of_adapters
from toolkit.mask.layer_mask import LayerMask, ParameterGroup, build_mask
from toolkit.mask.quantised_layers import resolve_quantised
from toolkit.mask.rotation import Rotation, resolve_rotation
from toolkit.mask.rows import union_of_rows
from toolkit.models.anatomy import Anatomy
from toolkit.runtime.errors import ConfigError, MaskError


@dataclass(frozen=True)
class Phase:
    """A part of a run during which one mask applies."""

    index: int
    """Position among the phases, from 0."""
    mask: LayerMask
    start: int
    """Optimizer steps done when the phase begins."""
    end: int
    """Optimizer steps done when the phase ends."""
    trained_since: Mapping[str, int]
    """Optimizer steps done when each trained tensor last began to train, by tensor name."""
    delta_mask: LayerMask
    """All tensors that trained in this phase or an earlier one, which a checkpoint's delta holds."""
    turn: str = ""
    """What trains in this turn of a rotation, beside what trains throughout."""

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The mask's groups, each split by when its tensors began to train.

        AdamW's bias correction needs the number of updates of a tensor, and DeepSpeed keeps one such number per group.
        """
        split = []
        for group in self.mask.groups:
            for step in sorted({self.trained_since[name] for name in group.names}):
                split.append(replace(group, names=tuple(n for n in group.names if self.trained_since[n] == step)))
        return tuple(split)


@dataclass(frozen=True)
class Schedule:
    """The phases of a run, one or more."""

    phases: tuple[Phase, ...]
    rotation: Rotation | None = None
    """The rotation whose turns the phases are; None for phases that the recipe lists, or a single one."""

    @property
    def moves_line(self) -> bool:
        """Return True if blocks below the frost line may have trained before, or may train later."""
        return len(self.phases) > 1 and self.rotation is None

    def shown(self, phase: Phase) -> LayerMask:
        """Return the mask to show when ``phase`` begins: its own, or that of all turns of a rotation together."""
        return phase.mask if self.rotation is None else self.rotation.pool

    def at(self, step: int) -> Phase:
        """Return the phase of the next step once ``step`` steps are done; after the end, the last phase."""
        return next((phase for phase in self.phases if step < phase.end), self.phases[-1])

    @property
    def sha256(self) -> str:
        """SHA-256 of every phase's start and mask; equal for runs with the same schedule.

        That of a rotation is of what its turns follow from: a longer run has the same ones, and more of them.
        """
        content: list[object] = [(phase.start, phase.mask.as_dict()) for phase in self.phases]
        if self.rotation is not None:
            content = [self.rotation.config.model_dump(), self.rotation.pool.as_dict()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def as_list(self) -> list[dict[str, object]]:
        """Return the phases as JSON values: first and last step, counted from 1, and the mask, of a turn its parts."""
        if self.rotation is not None:
            return [
                {"first_step": phase.start + 1, "last_step": phase.end, "trains": phase.turn} for phase in self.phases
            ]
        return [
            {"first_step": phase.start + 1, "last_step": phase.end, **phase.mask.as_dict()} for phase in self.phases
        ]


def phase_key(config: MaskConfig, index: int) -> str:
    """Return the recipe key that defines phase ``index``, counted from 0, for messages."""
    return f"mask.schedule.{index}" if index < len(config.schedule) else "mask.train"


def phase_configs(config: MaskConfig) -> list[MaskConfig]:
    """Return a mask section without a schedule for each phase; the last is that of mask.train."""
    masks = [(phase.train, phase.freeze) for phase in config.schedule] + [(config.train, config.freeze)]
    return [config.model_copy(update={"train": train, "freeze": freeze, "schedule": []}) for train, freeze in masks]


def phase_masks(config: MaskConfig, anatomy: Anatomy) -> list[LayerMask]:
    """Build the mask of each phase; a head is untied, and adapted blocks are quantised, from the start of the run on.

    Of a rotation it is a single mask, of all that trains in some turn.

    Raises:
        MaskError: the mask of a phase is invalid (see ``build_mask``), or equals that of the phase before it.
    """
    if config.rotation is not None:
        return [resolve_rotation(config, anatomy).pool]
    masks: list[LayerMask] = []
    sections = phase_configs(config)
    for index, section in enumerate(sections):
        key = phase_key(config, index)
        try:
            masks.append(build_mask(section, anatomy))
        except MaskError as error:
            if not config.schedule:
                raise
            raise MaskError(f"{key}: {error}") from None
        if index and masks[-1] == masks[-2]:
            raise MaskError(
                f"{key} trains the same tensors with the same settings as {phase_key(config, index - 1)} before it; "
                "expected a phase that changes something: drop one of the two"
            )
    if any(mask.tied == "untie" for mask in masks):
        masks = [replace(mask, tied="untie") for mask in masks]
    if len(masks) > 1:
        entries = [item.lora for section in sections for item in section.train if isinstance(item, LoraEntry)]
        adapters = [adapter for mask in masks for adapter in mask.adapters]
        trained = {name for mask in masks for name in mask.names}
        quantised = resolve_quantised(list(zip(entries, adapters, strict=True)), trained, anatomy)
        masks = [replace(mask, quantised=quantised) for mask in masks]
    return masks


def build_schedule(config: MaskConfig, anatomy: Anatomy, steps_per_epoch: int, total_steps: int) -> Schedule:
    """Build the schedule of a run of ``total_steps`` optimizer steps from its mask section, before a head is untied.

    Raises:
        ConfigError: phases do not end one after the other, or not before the run does; likewise the first turn.
        MaskError: the mask of a phase is invalid (see ``phase_masks``), or ``mask.rotation`` does not suit the mask.
    """
    if config.rotation is not None:
        return _rotating_schedule(resolve_rotation(config, anatomy), total_steps, anatomy)
    ends = phase_ends(config, steps_per_epoch, total_steps)
    phases: list[Phase] = []
    trained_since: dict[str, int] = {}
    start = 0
    for index, (mask, end) in enumerate(zip(phase_masks(config, anatomy), ends, strict=True)):
        # a tensor that pauses for a phase drops out of the dict, and counts as new when it trains again
        trained_since = {name: trained_since.get(name, start) for name in mask.names}
        delta_mask = _union_of_masks([phases[-1].delta_mask, mask], anatomy) if phases else mask
        phases.append(Phase(index, mask, start, end, trained_since, delta_mask))
        start = end
    return Schedule(tuple(phases))


def _rotating_schedule(rotation: Rotation, total_steps: int, anatomy: Anatomy) -> Schedule:
    """Return the turns of a rotation as phases."""
    phases: list[Phase] = []
    masks: dict[tuple[int, ...], LayerMask] = {}
    trained_since: dict[str, int] = {}
    start = 0
    for index, turn in enumerate(rotation.turns(total_steps)):
        if turn.parts not in masks:
            masks[turn.parts] = rotation.mask(turn.parts)
        mask = masks[turn.parts]
        before = {} if rotation.drops_moments else trained_since
        trained_since = {name: before.get(name, start) for name in mask.names}
        delta_mask = phases[-1].delta_mask if phases else mask
        if not set(mask.names).issubset(delta_mask.names):
            delta_mask = _union_of_masks([delta_mask, mask], anatomy)
        phases.append(Phase(index, mask, start, turn.end, trained_since, delta_mask, rotation.labels(turn)))
        start = turn.end
    return Schedule(tuple(phases), rotation)


def phase_ends(config: MaskConfig, steps_per_epoch: int, total_steps: int) -> list[int]:
    """Return the optimizer steps done at the end of each phase; the last phase ends with the run.

    Raises:
        ConfigError: phases do not end one after the other, or not before the run does.
    """
    faults: list[str] = []
    ends: list[int] = []
    for index, phase in enumerate(config.schedule):
        end = phase.until_step if phase.until_epoch is None else phase.until_epoch * steps_per_epoch
        assert end is not None  # the schema requires one of the two
        if ends and end <= ends[-1]:
            faults.append(
                f"mask.schedule.{index} ends with {phase.end}, which is step {end} ({steps_per_epoch} steps an "
                f"epoch), the phase before it with step {ends[-1]}; expected each phase to end after the one before it"
            )
        if end >= total_steps:
            faults.append(
                f"mask.schedule.{index} ends with {phase.end}, which is step {end}, but the run has {total_steps} "
                f"steps ({steps_per_epoch} an epoch), so what comes after would never train; expected an end before "
                f"step {total_steps}: end the phase earlier or train longer"
            )
        ends.append(end)
    if faults:
        raise ConfigError(faults, "recipe, read against the number of rows")
    return [*ends, total_steps]


def _union_of_masks(masks: Sequence[LayerMask], anatomy: Anatomy) -> LayerMask:
    """Return a mask of all tensors that any of ``masks`` trains, in one group."""
    by_name = {tensor.name: tensor for mask in masks for tensor in mask.trainable}
    order = {tensor.name: index for index, tensor in enumerate(anatomy.tensors)}
    trainable = tuple(sorted(by_name.values(), key=lambda tensor: order[adapted_weight(tensor.name)]))
    tied = next((mask.tied for mask in masks if mask.tied != "no"), masks[0].tied)
    names = tuple(tensor.name for tensor in trainable)
    boundary = min(mask.boundary for mask in masks)
    adapters = union_of_adapters(adapter for mask in masks for adapter in mask.adapters)
    rows = union_of_rows((own for mask in masks for own in mask.rows), names)
    return LayerMask(
        trainable, boundary, masks[0].block_count, tied, (ParameterGroup(names),), adapters, rows, masks[0].quantised
    )
