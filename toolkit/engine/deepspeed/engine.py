"""Train the suffix with DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054), which never sees the frozen prefix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from typing_extensions import override

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.engine.base import Engine, Update
from toolkit.engine.deepspeed.clipping import partitioned_norm, without_norm_and_clipping
from toolkit.engine.deepspeed.config import with_fitting_bucket
from toolkit.engine.deepspeed.device import device_index_as_local_rank
from toolkit.engine.deepspeed.gathering import balanced_module_stack, drain_prefetches, gathered
from toolkit.engine.deepspeed.json_file import zero_stage
from toolkit.engine.deepspeed.muon import import_muon_uncompiled
from toolkit.engine.deepspeed.nvme_state import NvmeSwapper, SwappedFragmentState
from toolkit.engine.deepspeed.optimizers import PartitionedAdamW, PartitionMoments, build_optimizer
from toolkit.engine.deepspeed.process_groups import unlink_shared_memory
from toolkit.mask.apply import plain_name
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.gradients import Clipping
from toolkit.optim.groups import build_scheduler, current_rate, embedding_ids, set_scheduler_step
from toolkit.optim.master_adamw import total_norm
from toolkit.optim.state_fragments import KINDS, MASTER, MOMENTS, FlatState, Fragment, FragmentState
from toolkit.optim.update_monitor import UpdateMonitor, sampled_indices
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError
from toolkit.split.suffix import Suffix


class ZeroEngine(Engine):
    """Train the suffix with AdamW on ZeRO's partitioned fp32 masters.

    Args:
        suffix: as for ``LocalEngine``, like the arguments after it.
        world: this process among all ranks; its process group must be initialised, even for one rank.
        copies: the prefix's copies of trained tensors, such as a tied embedding, by name; refreshed after each update.
        ds_config: DeepSpeed configuration as ``resolve_ds_config`` returns it.
    """

    def __init__(
        self,
        suffix: Suffix,
        parameters: dict[str, nn.Parameter],
        groups: Sequence[ParameterGroup],
        train: TrainConfig,
        optim: OptimConfig,
        total_steps: int,
        world: World,
        copies: Mapping[str, torch.Tensor],
        ds_config: dict[str, Any],
    ) -> None:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError

        import_muon_uncompiled()
        stage = zero_stage(ds_config)
        self.name, self.is_replicated = f"zero-{stage}", stage == 0
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.world = world
        self._train = train
        self._copies, self._parameters = copies, parameters
        self._suffix = suffix
        optimizer = build_optimizer(parameters, groups, train, optim, embedding_ids(suffix.model))
        ds_without_norm = without_norm_and_clipping(ds_config)
        self._computes_norm = ds_without_norm is not None
        elements = sum(parameter.numel() for parameter in parameters.values())
        self._scheduler = build_scheduler(optimizer, train, total_steps)
        try:
            with device_index_as_local_rank(world.device):
                self._engine, *_ = deepspeed.initialize(
                    model=suffix, optimizer=optimizer, lr_scheduler=self._scheduler,
                    config=with_fitting_bucket(ds_without_norm or ds_config, elements), dist_init_required=False,
                )  # fmt: skip
        except (ValidationError, DeepSpeedConfigError) as error:
            raise ConfigError([" ".join(str(error).split())], "DeepSpeed file, as DeepSpeed reads it") from None
        unlink_shared_memory(world)
        if self.is_replicated:  # do not count the step on zero gradients that DeepSpeed 0.19 takes at first in bfloat16
            for state in self._adamw.state.values():
                state["step"].zero_()
        self._update_monitor, self._rate = UpdateMonitor(self._sample), 0.0
        self._sample_indices: dict[int, torch.Tensor] = {}
        self._partition_moments: dict[torch.Tensor, PartitionMoments] = {}
        self._swapper = NvmeSwapper(self._engine.optimizer, self._state_of)

    @override
    def forward_loss(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        with balanced_module_stack():
            loss: torch.Tensor = self._engine(hidden, batch)
        return loss

    @override
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._swapper.close()
        self._engine.set_gradient_accumulation_boundary(is_last)
        # ZeRO averages gradients over ranks, and the loss shares have to be summed
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    @override
    def update(self) -> Update:
        self._rate, self._partition_moments = current_rate(self._scheduler, self._train), {}
        before = self._scheduler.last_epoch
        norm = self._compute_grad_norm()
        self._update_monitor.before()
        if norm is None or self._computes_norm or math.isfinite(norm):
            self._engine.step()
        self._update_monitor.after()
        if self._scheduler.last_epoch == before:  # DeepSpeed does not step it in a skipped step
            self._scheduler.step()
        self._update_copies()
        if norm is None:
            reported = self._engine.get_global_grad_norm()
            norm = torch.tensor(float("nan") if reported is None else float(reported), device=self.world.device)
        return Update(norm, self._rate, self._update_monitor.counts)

    def _sample(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``OptimizerState.sample`` for this rank's partitions; one on NVMe has no elements in memory."""
        adamw = self._adamw
        for flat, group in self._partitions():
            size = flat.numel()
            if size not in self._sample_indices:
                self._sample_indices[size] = sampled_indices([size]).to(flat.device)
            index = self._sample_indices[size]
            values = flat.detach().view(-1).index_select(0, index)
            if not size or not adamw.state.get(flat):
                is_moving = torch.zeros_like(values, dtype=torch.bool)
            elif isinstance(adamw, PartitionedAdamW):
                moment_format, state = adamw.moment_state(flat, group)
                is_moving = moment_format.is_moving(state, index)
            else:
                is_moving = adamw.state[flat]["exp_avg"].view(-1).index_select(0, index) != 0
            yield values, is_moving

    def _compute_grad_norm(self) -> torch.Tensor | None:
        """Return the gradient norm if DeepSpeed does not compute it, and set up clipping by it; else return None.

        At stage 0 in float32 DeepSpeed passes the summed gradients to torch's optimizer without a norm; gradients that
        are not finite are freed, so that the optimizer skips the step.
        """
        zero = self._engine.optimizer
        if self._computes_norm:
            norm = partitioned_norm(zero, self.world)
            clipping = Clipping(norm, self._train.max_grad_norm)
            self._adamw.grad_scale, self._adamw.found_inf = clipping.divisor, clipping.found_inf  # as GradScaler does
            return norm
        if hasattr(zero, "overflow"):
            return None
        norm = total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        if not norm.isfinite():
            for parameter in self._parameters.values():
                parameter.grad = None
        return norm

    @torch.no_grad()
    def _update_copies(self) -> None:
        """Copy trained tensors to the prefix's copies; DeepSpeed moved the originals to its own buffers."""
        for name, copy in self._copies.items():
            with gathered(self._parameters[name]):
                copy.copy_(self._parameters[name])

    @override
    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    @override
    def gathered(self) -> AbstractContextManager[object]:
        drain_prefetches(self._engine)
        return gathered(self._suffix)

    @override
    def gathered_bytes(self) -> int:
        partitioned = (p for p in self._suffix.parameters() if hasattr(p, "ds_numel"))
        return sum(int(p.ds_numel) * p.element_size() for p in partitioned)

    @override
    def fragments(self) -> list[Fragment]:
        fragments: list[Fragment] = []
        adamw = self._adamw
        partitions = self._partitions() if isinstance(adamw, PartitionedAdamW) else ()
        self._partition_moments = {flat: PartitionMoments(adamw, flat, group) for flat, group in partitions}
        for name, parameter in self._parameters.items():
            flat, offset, start, stop = self._locate(parameter)
            if flat is None or start >= stop:
                continue
            part = slice(offset, offset + stop - start)
            if flat in self._partition_moments:
                fragment_state: FragmentState = self._partition_moments[flat].slice_state(part)
            elif self._swapper.is_offloaded(flat):
                fragment_state = SwappedFragmentState(self._swapper, flat, part)
            else:
                state = self._state_of(flat)
                tensors = {MASTER: flat, **state}
                views = {kind: tensors[kind].detach().view(-1)[part] for kind in KINDS}
                fragment_state = FlatState(views, state["step"])
            fragments.append(Fragment(name, start, stop, fragment_state))
        return fragments

    @property
    def _adamw(self) -> Any:
        """Return the AdamW that DeepSpeed wraps; at stage 0 in float32 DeepSpeed uses it without a wrapper."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _partitions(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yield this rank's flat float32 masters, each with its parameter group."""
        zero, groups = self._engine.optimizer, self._adamw.param_groups
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3 splits large groups into sub-groups
            for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield flat, groups[zero.sub_group_to_group_id[index]]
        else:
            for group in groups:
                yield from ((flat, group) for flat in group["params"])

    def _locate(self, parameter: Any) -> tuple[torch.Tensor | None, int, int, int]:
        """Locate this rank's part of a master: flat fp32 tensor, offset in it, start and stop in the parameter.

        The tensor is None if the rank has no part. The attributes are those of stage3.py, stage_1_and_2.py,
        bf16_optimizer.py and unfused_optimizer.py of DeepSpeed 0.19.
        """
        zero = self._engine.optimizer
        if hasattr(parameter, "ds_id"):  # ZeRO-3: every tensor in equal parts, the last one padded
            index, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = size * self.world.rank
            return zero.fp32_partitioned_groups_flat[index], offset, start, min(start + size, parameter.ds_numel)
        if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: each group flattened, then in equal parts
            mapping = parameter._hp_mapping
            if mapping is None:
                return None, 0, 0, 0
            (flat,) = zero.optimizer.param_groups[mapping.param_group_index]["params"]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            return flat, there.start, here.start, here.start + here.numel
        for low, full in zip(getattr(zero, "fp16_groups", ()), getattr(zero, "fp32_groups", ()), strict=True):
            for rounded, master in zip(low, full, strict=True):  # stage 0 in bfloat16: a master for each tensor
                if rounded is parameter:
                    return master, 0, 0, master.numel()
        return parameter, 0, 0, parameter.numel()  # stage 0 in float32

    def _state_of(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the AdamW state of a flat master; before the first update, create it as zeros."""
        state: dict[str, torch.Tensor] = self._adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state |= {moment: torch.zeros_like(master) for moment in MOMENTS}
        return state

    @override
    def continue_at(self, step: int) -> None:
        for partition in self._partition_moments.values():
            partition.save()
        self._partition_moments = {}
        self._swapper.close()
        self._update_monitor.reset()
        set_scheduler_step(self._scheduler, step)

    @torch.no_grad()
    @override
    def release(self) -> dict[str, torch.Tensor]:
        self._swapper.close()
        drain_prefetches(self._engine)
        zero = self._engine.optimizer
        zero.optimizer.state.clear()
        self._engine.destroy()  # removes hooks and buckets; the partitions stay, and can still be gathered below
        tensors = {}
        for name, parameter in self._suffix.model.named_parameters():
            if parameter.requires_grad or hasattr(parameter, "ds_id"):
                with gathered(parameter):
                    tensors[plain_name(name)] = parameter.detach().clone()
                parameter.data = parameter.data.new_empty(0)
        vars(zero).clear()  # ZeRO-3's optimizer is still referenced after destroy() (DeepSpeed 0.19): free its tensors
        del self._engine, self._scheduler, self._suffix, self._copies, self._update_monitor, self._swapper
        self._parameters = {}
        return tensors
