"""Prepare a run: read and check data, model, mask and engine, cheap checks before costly ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedTokenizerBase

from toolkit.checkpoint.base_identity import identify
from toolkit.checkpoint.delta import Base
from toolkit.checkpoint.state import CheckpointState
from toolkit.config.flags import Invocation
from toolkit.config.policy import Decision, decide_checkpointing, most_micro_batches, reduce_dtype
from toolkit.config.schema import RunConfig
from toolkit.data.batches import BatchPlan
from toolkit.data.dataset import Dataset
from toolkit.data.examples import Encoder
from toolkit.data.model_limits import check_fit, padding_id
from toolkit.data.rows import Rows
from toolkit.engine.deepspeed.config import load_ds_config
from toolkit.inference.open_model import load_tokenizer_of
from toolkit.mask.schedule import Phase, Schedule, build_schedule
from toolkit.models.load import LoadedModel
from toolkit.models.quirks import training_notes
from toolkit.models.weight_fingerprint import fingerprint
from toolkit.optim.kernel_choice import choose_kernels
from toolkit.planning.engine_spec import EngineSpec, engine_spec
from toolkit.planning.meta_model import meta_model_of
from toolkit.planning.phase_plans import phase_planners
from toolkit.planning.planner import Plan, Planner
from toolkit.planning.workload import workload_of
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import PlanError
from toolkit.runtime.free_memory import free_bytes
from toolkit.training.fingerprints import fingerprints
from toolkit.training.gradient_choice import GradientChoice, choose_gradients
from toolkit.training.loading import check_schedule_allowed, effective_prefix, load_for_training, load_rows
from toolkit.training.preflight import check_config
from toolkit.training.row_checks import check_rows
from toolkit.training.run_record import unused_settings
from toolkit.training.validation_metrics import ValidationMetrics

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class RunContext:
    """Everything that stays constant during a run."""

    config: RunConfig
    world: World
    dataset: Dataset
    batch_plan: BatchPlan
    total_steps: int
    schedule: Schedule
    base: Base
    """The model that the run starts from."""
    gradients: GradientChoice | None
    """How that computes on this machine; None where there is no choice."""
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    """Token that rows are padded with."""
    encoder: Encoder
    """What encoded the rows."""
    metrics: ValidationMetrics | None
    """What is computed of the validation rows beside their loss; None for nothing."""
    fingerprints: dict[str, str]
    """SHA-256 of rows, tokenizer, chat template, base model and mask schedule, which a checkpoint must match."""
    ds_config: dict[str, Any] | None
    """Resolved DeepSpeed configuration; None trains with torch alone."""
    planners: tuple[Planner, ...]
    """One for each phase, one for all turns of a rotation; empty for an architecture that cannot be planned."""
    library_bytes: int
    """Resident memory of Python and its libraries before the model was loaded."""
    shared_by: int = 1
    """Runs that read the same rows, this one included."""
    plans: tuple[Plan | None, ...] = ()
    """Expected plan of each planner, before its phase is built; None where it cannot be planned."""

    @property
    def examples(self) -> Rows:
        """Rows that the run computes with: for training, validation with its metrics and, in a fold, its test."""
        rows = self.dataset.train + self.dataset.validation
        if self.metrics is not None and self.metrics.examples is not None:
            rows += self.metrics.examples
        return rows + self.dataset.test if self.config.data.fold is not None else rows

    def planned_as(self, phase: Phase) -> int:
        """Return the index of a phase's planner and plan; all turns of a rotation have the same ones."""
        return 0 if self.schedule.rotation is not None else phase.index

    def passes(self, phase: Phase) -> float:
        """Return the passes over the training rows for which the prefix of ``phase`` stays as it is."""
        is_rotation = self.schedule.rotation is not None
        start, end = (0, self.total_steps) if is_rotation else (phase.start, phase.end)
        return self.batch_plan.passes(end, start)

    @property
    def engine_spec(self) -> EngineSpec:
        """The settings of the engine that its planned memory depends on."""
        train, on_cpu = self.config.train, self.world.device.type == "cpu"
        kernels = choose_kernels(self.world.device).on
        return engine_spec(
            self.ds_config, self.world.size, most_micro_batches(train), self.config.optim.name, on_cpu, kernels,
            reduce_dtype(train),
        )  # fmt: skip


class ModelHandle:
    """The only reference to the whole model, in plain parameters.

    The last phase frees it before its engine allocates; a variable of a caller would keep the frozen weights in memory.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded: LoadedModel | None = loaded

    @property
    def loaded(self) -> LoadedModel:
        """The model; keep it in no variable that outlives the call."""
        assert self._loaded is not None, "the last phase has freed the whole model"
        return self._loaded

    def free(self) -> None:
        """Drop the reference to the model."""
        self._loaded = None


def prepare(
    invocation: Invocation, world: World, state: CheckpointState | None = None, run_dir: Path | None = None
) -> tuple[RunContext, ModelHandle]:
    """Load and check everything that a run needs; every rank calls it.

    ``state`` is that of the checkpoint to resume, None for a new run. The rendering of rows is saved in ``run_dir``.

    Raises:
        UsageError: the DeepSpeed file, data, model or mask is invalid.
    """
    config, train = invocation.config, invocation.config.train
    with world.main_first():  # rank 0 fills the download and conversion caches
        masks = None
        with suppress(PlanError):  # a class that cannot be checked without weights is checked once it is loaded
            masks = check_config(invocation, world.size)
        tokenizer = load_tokenizer_of(config.model)
        if masks is not None:
            check_rows(*masks, tokenizer, config.model.add_tokens)
    dataset, encoder = load_rows(config, tokenizer, world, run_dir)
    metrics = ValidationMetrics.of(config, dataset, encoder)
    world.raise_if_stopping()
    plan = BatchPlan.of_recipe(train, len(dataset.train), world.size, world.rank)
    total_steps = state.resumed_total_steps(config, world.size) if state else plan.steps(train.epochs, train.max_steps)
    check_schedule_allowed(config, world.device)
    for warning in unused_settings(config, total_steps, world.device):
        log.warning("%s", warning)
    if invocation.deepspeed is not None:
        import_module("toolkit.engine.deepspeed.engine")  # counts as a library; only runs that use DeepSpeed import it
        import_module("toolkit.engine.deepspeed.machine").check_machine(world)
    library_bytes = psutil.Process().memory_info().rss
    loaded = _load_model(config, tokenizer, dataset, world)
    if metrics is not None and metrics.examples is not None:
        check_fit(metrics.examples, loaded.model)
    length = int(np.median(dataset.train.lengths))
    gradients = choose_gradients(loaded.model, length, world, run_dir, resumes=state is not None)
    world.raise_if_stopping()
    base = Base(config.model, *world.on_main(lambda: (fingerprint(loaded.model, loaded.on_disk), identify(loaded))))
    schedule = build_schedule(config.mask, loaded.anatomy, plan.steps_per_epoch, total_steps)
    if masks is None:
        check_rows([phase.mask for phase in schedule.phases], loaded.anatomy, tokenizer, config.model.add_tokens)
    context = RunContext(
        config=config, world=world, dataset=dataset, batch_plan=plan, total_steps=total_steps, schedule=schedule,
        base=base, gradients=gradients, tokenizer=tokenizer, encoder=encoder,
        metrics=metrics, pad_id=padding_id(tokenizer, loaded.model),
        fingerprints=fingerprints(dataset, tokenizer, base, schedule), library_bytes=library_bytes,
        ds_config=load_ds_config(
            invocation.deepspeed, config, world.size, int(loaded.model.config.get_text_config().hidden_size)
        ),
        planners=(), shared_by=invocation.shared_by,
    )  # fmt: skip
    context = _with_plans(context, loaded)
    world.raise_if_stopping()
    steps = plan.text(total_steps, train.epochs)
    log.info("engine %s, %d rank(s) on %s: %s", context.engine_spec.name, world.size, world.device.type, steps)
    return context, ModelHandle(loaded)


def _with_plans(context: RunContext, loaded: LoadedModel) -> RunContext:
    """Plan each phase as expected before it is built; of a rotation keep the plan of the turn that needs most."""
    distinct = context.schedule.phases[:1] if context.schedule.rotation is not None else context.schedule.phases
    passes = [context.passes(phase) for phase in distinct]
    planners = planners_of(context.config, loaded, context.dataset, context.world.device, passes)
    plans = [choose_checkpointing(context, planner)[1] for planner in planners or [None] * len(distinct)]
    if context.schedule.rotation is not None and planners:
        peaks = [plan.memory.peak if plan else 0 for plan in plans]
        most = peaks.index(max(peaks))
        planners, plans = planners[most : most + 1], plans[most : most + 1]
    return replace(context, planners=planners, plans=tuple(plans))


def choose_checkpointing(context: RunContext, planner: Planner | None) -> tuple[Decision, Plan | None]:
    """Decide whether a phase uses activation checkpointing, by recipe or free memory; every rank calls it.

    Returns:
        The decision, and the plan of the phase with it; None if it cannot be planned, as without a ``planner``.
    """
    plan = _plan_with(context, planner, checkpointing=False)
    memory = plan.memory if plan else None
    free = -int(context.world.max(-free_bytes(context.world.device)))  # the tightest rank decides for all
    decision = decide_checkpointing(
        context.config.train.gradient_checkpointing, memory.beside_weights if memory else None, free,
        fixed_moment=memory.fixed_moment if memory else None,
    )  # fmt: skip
    return decision, _plan_with(context, planner, checkpointing=True) if plan and decision.on else plan


def _plan_with(context: RunContext, planner: Planner | None, checkpointing: bool) -> Plan | None:
    """Return the plan of a phase; None, with a warning, if it cannot be planned."""
    if planner is None:
        return None
    try:
        return planner.plan(planner.variant(context.engine_spec, checkpointing))
    except PlanError as error:
        log.warning("%s", error)
        return None


def _load_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, world: World) -> LoadedModel:
    """Load the model and check that the rows fit it."""
    log.info("loading %s", config.model.name_or_path)
    loaded = load_for_training(config, tokenizer)
    check_fit(dataset.rows, loaded.model)
    for note in training_notes(loaded.model.config):
        log.info("%s", note)
    world.raise_if_stopping()
    return loaded


def planners_of(
    config: RunConfig, loaded: LoadedModel, dataset: Dataset, device: torch.device, passes: Sequence[float]
) -> tuple[Planner, ...]:
    """Return the planner of each phase; an empty tuple, with a warning, if the architecture cannot be planned.

    ``loaded`` is the model before a mask is applied; ``passes`` counts those over the training rows in each phase.
    """
    config = config.model_copy(update={"prefix": effective_prefix(config.prefix, device)})
    try:
        return tuple(phase_planners(config, meta_model_of(loaded), workload_of(dataset), passes))
    except PlanError as error:
        log.warning("%s", error)
        return ()
