"""Plan a run with a mask schedule: one plan a phase, and that of the phase that needs most memory for the run.

Of a rotation's turns those are planned that may need most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolkit.config.schema import MaskConfig, RunConfig
from toolkit.mask.layer_mask import LayerMask, TrainableTensor
from toolkit.mask.rotation import resolve_rotation
from toolkit.mask.schedule import phase_configs, phase_masks
from toolkit.planning.engine_memory import OtherPhases
from toolkit.planning.meta_model import MetaModel
from toolkit.planning.planner import PhaseSummary, Plan, Planner
from toolkit.planning.workload import Workload

_MASTER = 4
"""Bytes per element of an fp32 master."""


def phase_planners(config: RunConfig, meta: MetaModel, workload: Workload, passes: Sequence[float]) -> list[Planner]:
    """Return a planner for each phase of the mask schedule; a single one without a schedule.

    ``passes`` are the passes over the training rows in each phase. A rotation has those of the whole run, under one
    frost line, and a planner for each turn that may need most memory.

    Raises:
        MaskError: the mask of a phase is invalid.
    """
    if config.mask.rotation is not None:
        rotation = resolve_rotation(config.mask, meta.anatomy)
        turns = rotation.costly_masks()
        handed = max(mask.parameters for mask in turns)
        return [
            Planner(
                config, meta, workload, passes[0], phase_mask=mask, rotation=rotation,
                others=OtherPhases(rotation.pool.parameters - mask.parameters, handed),
            )
            for mask in turns
        ]  # fmt: skip
    sections, masks = phase_configs(config.mask), phase_masks(config.mask, meta.anatomy)
    return [
        Planner(
            config.model_copy(update={"mask": section}), meta, workload, phase_passes,
            phase_mask=mask if config.mask.schedule else None, others=others,
        )
        for section, mask, phase_passes, others in zip(sections, masks, passes, _other_phases(masks), strict=True)
    ]  # fmt: skip


def _other_phases(masks: Sequence[LayerMask]) -> list[OtherPhases]:
    """Return what the other phases of a run add to each."""
    found, seen = [], set[TrainableTensor]()
    for index, mask in enumerate(masks):
        resting = sum(tensor.parameters for tensor in seen.difference(mask.trainable))
        ending = [*masks[max(0, index - 1) : index], *([mask] if mask is not masks[-1] else [])]
        found.append(OtherPhases(resting, max((one.parameters for one in ending), default=0)))
        seen.update(mask.trainable)
    return found


def combine_plans(plans: Sequence[Plan], config: MaskConfig) -> Plan:
    """Return the plan of the phase that needs most memory, with summaries of all phases and the largest checkpoint."""
    index = max(range(len(plans)), key=lambda i: plans[i].memory.peak)
    if (rotation := plans[index].rotation) is not None:
        resting = rotation.pool.parameters - plans[index].mask.parameters
        return replace(plans[index], checkpoint=plans[index].checkpoint + _MASTER * resting)
    if len(plans) == 1:
        return plans[0]
    ends = [phase.end for phase in config.schedule] + ["the end"]
    phases = tuple(
        PhaseSummary(end, plan.mask.boundary, plan.mask.parameters, plan.memory.peak, i == index)
        for i, (end, plan) in enumerate(zip(ends, plans, strict=True))
    )
    others = _other_phases([plan.mask for plan in plans])
    largest = max(plan.checkpoint + _MASTER * other.resting for plan, other in zip(plans, others, strict=True))
    return replace(plans[index], phases=phases, checkpoint=largest)
