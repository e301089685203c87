"""The engine on DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054): only the suffix is handed to it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from typing_extensions import override

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.engine.base import Engine, Update
from toolkit.engine.deepspeed.clipping import partitioned_norm, without_clipping
from toolkit.engine.deepspeed.config import zero_stage
from toolkit.engine.deepspeed.gathering import balanced_module_stack, drain_prefetches, gathered, gathered_bytes
from toolkit.engine.deepspeed.nvme_state import NvmeSwapper, SwappedFragmentState
from toolkit.engine.deepspeed.optimizers import PartitionedAdamW, PartitionMoments, build_optimizer
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.gradients import Clipping
from toolkit.optim.groups import build_scheduler, current_rate, embedding_tables, forward_to
from toolkit.optim.master_adamw import norm_at_once
from toolkit.optim.state_fragments import KINDS, MASTER, MOMENTS, FlatFragmentState, Fragment, FragmentState
from toolkit.optim.update_monitor import UpdateMonitor, sampled_indices
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError
from toolkit.split.suffix import Suffix


class ZeroEngine(Engine):
    """AdamW on ZeRO's partitioned float32 masters.

    Args:
        suffix: on its device, its mask applied.
        parameters: its trainable parameters by their names in the whole model.
        groups: of the mask; they hold all of ``parameters``.
        train: the recipe's training section.
        optim: the recipe's optimizer section.
        total_steps: optimizer steps of the whole run, for the schedule.
        world: the process group must be up, also for one rank.
        copies: trained tensors that the prefix holds too, by name; kept up to date with every update.
        ds_config: as ``resolve_ds_config`` returns it.
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

        stage = zero_stage(ds_config)
        self.name, self.is_replicated = f"zero-{stage}", stage == 0
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.world = world
        self._train = train
        self._copies, self._parameters = copies, parameters
        self._suffix = suffix
        optimizer = build_optimizer(parameters, groups, train, optim, embedding_tables(suffix.model))
        lean = without_clipping(ds_config)
        self._clips = lean is not None
        self._scheduler = build_scheduler(optimizer, train, total_steps)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=suffix, optimizer=optimizer, lr_scheduler=self._scheduler, config=lean or ds_config,
                dist_init_required=False,
            )  # fmt: skip
        except (ValidationError, DeepSpeedConfigError) as error:
            raise ConfigError([" ".join(str(error).split())], "DeepSpeed file, as DeepSpeed reads it") from None
        _unlink_shared_memory(world)
        if self.is_replicated:  # in bfloat16 it makes a step on zero gradients, which would count (DeepSpeed 0.19)
            for own in self._inner.state.values():
                own["step"].zero_()
        self._moved, self._rate = UpdateMonitor(self._sample), 0.0
        self._chosen: dict[int, torch.Tensor] = {}
        self._partition_moments: dict[torch.Tensor, PartitionMoments] = {}
        self._swapper = NvmeSwapper(self._engine.optimizer, self._state_of)

    @override
    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        with balanced_module_stack():
            loss: torch.Tensor = self._engine(hidden, batch)
        return loss

    @override
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._swapper.close()
        self._engine.set_gradient_accumulation_boundary(is_last)
        # ZeRO averages over ranks; the shares are to be summed
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    @override
    def update(self) -> Update:
        self._rate, self._partition_moments = current_rate(self._scheduler, self._train), {}
        before = self._scheduler.last_epoch
        norm = self._own_norm()
        self._moved.before()
        if norm is None or self._clips or math.isfinite(norm):
            self._engine.step()
        self._moved.after()
        if self._scheduler.last_epoch == before:  # a step that DeepSpeed skips does not move it on
            self._scheduler.step()
        self._update_copies()
        if norm is None:
            found = self._engine.get_global_grad_norm()
            norm = torch.tensor(float("nan") if found is None else float(found), device=self.world.device)
        return Update(norm, self._rate)

    @override
    def moved_share(self) -> float | None:
        moved, meant = self.world.sum(*self._moved.counts())  # each rank sees its own partitions
        return self._moved.judge(moved, meant, self._rate)

    def _sample(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``OptimizerState.sample`` of this rank's partitions; one that is on NVMe now has no element here."""
        inner = self._inner
        for flat, group in self._partitions():
            size = flat.numel()
            if size not in self._chosen:
                self._chosen[size] = sampled_indices([size]).to(flat.device)
            chosen = self._chosen[size]
            values = flat.detach().view(-1).index_select(0, chosen)
            if not size or not inner.state.get(flat):
                meant = torch.zeros_like(values, dtype=torch.bool)
            elif isinstance(inner, PartitionedAdamW):
                meant = inner.moving(flat, group, chosen)
            else:
                meant = inner.state[flat]["exp_avg"].view(-1).index_select(0, chosen) != 0
            yield values, meant

    def _own_norm(self) -> torch.Tensor | None:
        """Return the gradient's norm where DeepSpeed does not measure it; the optimizer then clips by it.

        At stage 0 in float32 DeepSpeed hands the summed gradients to torch's optimizer unmeasured; they are dropped if
        they are not finite.
        """
        zero = self._engine.optimizer
        if self._clips:
            norm = partitioned_norm(zero, self.world)
            clipping = Clipping(norm, self._train.max_grad_norm)
            self._inner.grad_scale, self._inner.found_inf = clipping.divisor, clipping.found_inf  # torch's own names
            return norm
        if hasattr(zero, "overflow"):
            return None
        norm = norm_at_once([p.grad for p in self._parameters.values() if p.grad is not None])
        if not norm.isfinite():
            for parameter in self._parameters.values():
                parameter.grad = None
        return norm

    @torch.no_grad()
    def _update_copies(self) -> None:
        """Update the prefix's copies of trained tensors: DeepSpeed moved the originals elsewhere."""
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
        return gathered_bytes(self._suffix)

    @override
    def fragments(self) -> list[Fragment]:
        found: list[Fragment] = []
        inner = self._inner
        self._partition_moments = (
            {flat: PartitionMoments(inner, flat, group) for flat, group in self._partitions()}
            if isinstance(inner, PartitionedAdamW)
            else {}
        )
        for name, parameter in self._parameters.items():
            flat, offset, start, stop = self._locate(parameter)
            if flat is None or start >= stop:
                continue
            part = slice(offset, offset + stop - start)
            if flat in self._partition_moments:
                own: FragmentState = self._partition_moments[flat].part(part)
            elif self._swapper.has(flat):
                own = SwappedFragmentState(self._swapper, flat, part)
            else:
                state = self._state_of(flat)
                kept = {MASTER: flat, **{kind: state[kind] for kind in MOMENTS}}
                views = {kind: kept[kind].detach().view(-1)[part] for kind in KINDS}
                own = FlatFragmentState(views, state["step"])
            found.append(Fragment(name, start, stop, own))
        return found

    @property
    def _inner(self) -> Any:
        """Return the optimizer that DeepSpeed was given; at stage 0 in float32 it stands alone."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _partitions(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield this rank's flat float32 masters, each with the index of its parameter group."""
        zero = self._engine.optimizer
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3 cuts large groups into several
            yield from (
                (flat, zero.sub_group_to_group_id[i]) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)
            )
        else:
            for index, group in enumerate(self._inner.param_groups):
                yield from ((flat, index) for flat in group["params"])

    def _locate(self, parameter: Any) -> tuple[torch.Tensor | None, int, int, int]:
        """Return this rank's part of a master: a float32 tensor, an offset in it, and the part's two ends.

        The tensor is none where the rank has no part. Names are those of stage3.py, stage_1_and_2.py,
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
        """Return AdamW's state of one of its tensors; make it if there is none before the first update."""
        state: dict[str, torch.Tensor] = self._inner.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state |= {moment: torch.zeros_like(master) for moment in MOMENTS}
        return state

    @property
    @override
    def schedule_step(self) -> int:
        return int(self._scheduler.last_epoch)

    @override
    def continue_at(self, step: int) -> None:
        for partition in self._partition_moments.values():
            partition.save()
        self._partition_moments = {}
        self._swapper.close()
        self._moved.reset()
        forward_to(self._scheduler, step)

    @torch.no_grad()
    @override
    def release(self) -> dict[str, torch.Tensor]:
        self._swapper.close()
        drain_prefetches(self._engine)
        zero = self._engine.optimizer
        zero.optimizer.state.clear()
        self._engine.destroy()
        plain = {}
        for name, parameter in self._suffix.model.named_parameters():
            if parameter.requires_grad or hasattr(parameter, "ds_id"):
                with gathered(parameter):
                    plain[name] = parameter.detach().clone()
                parameter.data = parameter.data.new_empty(0)
        vars(zero).clear()  # ZeRO-3's optimizer is still referred to after destroy (DeepSpeed 0.19): leave it empty
        del self._engine, self._scheduler, self._suffix, self._copies, self._moved, self._swapper
        self._parameters = {}
        return plain


def _unlink_shared_memory(world: World) -> None:
    """Unlink the buffers of DeepSpeed's CPU collectives, which then end with their last process, also a killed one.

    DeepSpeed never unlinks them (shm.cpp of DeepSpeed 0.19): every run would leave 66 MiB of memory a rank behind.
    """
    world.barrier()  # every rank has mapped the others' buffers
    place = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{place}_{world.rank}").unlink(missing_ok=True)
