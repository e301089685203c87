"""The engine on DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054): only the suffix is handed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.distributed import World
from toolkit.engine.base import Update
from toolkit.engine.ds_config import zero_stage
from toolkit.errors import CheckpointError, ConfigError
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim import build_optimizer, build_scheduler, current_rate
from toolkit.prefix.split import Suffix

_TAG = "zero"


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
        optimizer = build_optimizer(parameters, groups, train, optim)
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
