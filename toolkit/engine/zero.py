"""The engine on DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054): only the suffix is handed to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.distributed import World
from toolkit.engine.base import AdamState, Update
from toolkit.engine.ds_config import zero_stage
from toolkit.errors import CheckpointError, ConfigError
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim import build_optimizer, build_scheduler, current_rate, forward_to
from toolkit.prefix.split import Suffix

_TAG = "zero"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """AdamW on ZeRO's partitioned float32 masters. See ``Engine`` for the methods."""

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
        """
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
        """  # noqa: D205, D212
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.name = f"zero-{zero_stage(ds_config)}"
        self._world = world
        self._train = train
        self._copies = copies
        self._parameters = parameters
        self._suffix = suffix
        optimizer = build_optimizer(parameters, groups, train, optim)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._names_by_group = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._scheduler = build_scheduler(optimizer, train, total_steps)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=suffix,
                optimizer=optimizer,
                lr_scheduler=self._scheduler,
                config=ds_config,
                dist_init_required=False,
            )
        except (ValidationError, DeepSpeedConfigError) as error:
            raise ConfigError([" ".join(str(error).split())], "DeepSpeed file, as DeepSpeed reads it") from None
        _unlink_shared_memory(world)

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:  # noqa: D102
        loss: torch.Tensor = self._engine(hidden, batch)
        return loss

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:  # noqa: D102
        self._engine.set_gradient_accumulation_boundary(is_last)
        # ZeRO averages over ranks; the shares are to be summed
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def update(self) -> Update:  # noqa: D102
        learning_rate = current_rate(self._scheduler, self._train)
        self._engine.step()
        self._follow()
        norm = self._engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        return Update(torch.tensor(norm, device=self._world.device), learning_rate)

    @torch.no_grad()
    def _follow(self) -> None:
        """Bring the prefix's copies of trained tensors up to date: DeepSpeed moved the originals elsewhere."""
        import deepspeed

        for name, copy in self._copies.items():
            with deepspeed.zero.GatheredParameters([self._parameters[name]]):  # nothing to gather at stages 1 and 2
                copy.copy_(self._parameters[name])

    def train(self, mode: bool) -> None:  # noqa: D102
        self._engine.train(mode)

    def gathered(self) -> AbstractContextManager[object]:  # noqa: D102
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(self._suffix.parameters()))
        return gathered

    def masters(self) -> dict[str, torch.Tensor]:  # noqa: D102
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = {}
        for name, parameter in self._parameters.items():
            master = safe_get_full_fp32_param(parameter)  # a collective
            if self._world.is_main:
                gathered[name] = master.detach().to("cpu", torch.float32, copy=True)
        return gathered

    def save(self, directory: Path) -> None:  # noqa: D102
        self._engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, directory: Path, masters: dict[str, torch.Tensor]) -> None:  # noqa: D102
        found, _ = self._engine.load_checkpoint(str(directory), tag=_TAG, load_module_strict=False)
        if found is None:
            raise CheckpointError(
                f"{directory} holds no DeepSpeed state; expected the folder {_TAG} that a checkpoint writes"
            )
        self._follow()

    def state(self) -> dict[str, AdamState]:  # noqa: D102
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_moments()
        state = {}
        for name, parameter in self._parameters.items():
            full = [safe_get_full_fp32_param(parameter)]  # these are collectives
            full += [safe_get_full_optimizer_state(parameter, moment) for moment in _MOMENTS]
            if self._world.is_main:
                state[name] = AdamState(*(tensor.detach().to("cpu", torch.float32, copy=True) for tensor in full))
        return state

    @torch.no_grad()
    def adopt(self, state: Mapping[str, AdamState], ages: Mapping[str, int], step: int) -> None:  # noqa: D102
        inner = self._engine.optimizer.optimizer
        for flat, group in self._partitions():
            age = float(ages[self._names_by_group[group][0]])
            inner.state[flat] = {"step": torch.tensor(age, device=flat.device)}
            inner.state[flat] |= {moment: torch.zeros_like(flat) for moment in _MOMENTS}
        self._link_moments()
        for name in self._world.share(sorted(state)):
            parameter, own = self._parameters[name], state.get(name)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in the parameter
            self._set(parameter, self._world.spread(getattr(own, "master", None), shape), None)
            for moment in _MOMENTS if ages[name] else ():
                self._set(parameter, self._world.spread(getattr(own, moment, None), shape), moment)
        forward_to(self._scheduler, step)

    def _set(self, parameter: Any, full: torch.Tensor, moment: str | None) -> None:
        """Set this rank's part of a master, or of a moment, from the whole tensor."""
        from deepspeed import utils

        if hasattr(parameter, "ds_id"):  # safe_set_full_* cannot cut a tensor in unequal parts (DeepSpeed 0.19)
            size = parameter.ds_tensor.numel()
            full = functional.pad(full.flatten(), (0, size * self._world.size - full.numel()))
            own = full.narrow(0, size * self._world.rank, size)
            master, state = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        else:
            own, master, state = full, utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if moment is None:
            master(parameter, own)
        else:
            state(parameter, own, moment)

    def _partitions(self) -> Iterator[tuple[torch.Tensor, int]]:
        """This rank's flat float32 masters, each with the index of its parameter group."""
        zero = self._engine.optimizer
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3 cuts large groups into several
            yield from (
                (flat, zero.sub_group_to_group_id[i]) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)
            )
        else:
            for index, group in enumerate(zero.optimizer.param_groups):
                yield from ((flat, index) for flat in group["params"])

    def _link_moments(self) -> None:
        """Let DeepSpeed find the moments of each tensor, under ZeRO-1 and 2.

        It links them itself after the first update of the first group, when the other groups have none yet, and they
        are others after loading (stage_1_and_2.py and bf16_optimizer.py of DeepSpeed 0.19).
        """
        zero = self._engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def release(self) -> dict[str, torch.Tensor]:  # noqa: D102
        import deepspeed

        zero = self._engine.optimizer
        zero.optimizer.state.clear()
        self._engine.destroy()
        plain = {}
        for name, parameter in self._suffix.model.named_parameters():
            if parameter.requires_grad or hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):  # nothing to gather at stages 1 and 2
                    plain[name] = parameter.detach().clone()
                parameter.data = parameter.data.new_empty(0)
        vars(zero).clear()  # ZeRO-3's optimizer is still referred to after destroy (DeepSpeed 0.19): leave it empty
        del self._engine, self._scheduler, self._suffix, self._copies
        self._parameters = {}
        return plain


def _unlink_shared_memory(world: World) -> None:
    """Let the buffers of DeepSpeed's CPU collectives end with their last process, also a killed one.

    DeepSpeed never unlinks them (shm.cpp of DeepSpeed 0.19): every run would leave 66 MiB of memory a rank behind.
    """
    world.barrier()  # every rank has mapped the others' buffers
    place = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{place}_{world.rank}").unlink(missing_ok=True)
