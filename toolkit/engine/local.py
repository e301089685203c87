"""The engine without DeepSpeed: torch on one device, or one device a rank with summed gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.distributed import World
from toolkit.engine.base import AdamState, Update
from toolkit.engine.master_adamw import MasterAdamW
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim import build_scheduler, current_rate, forward_to, parameter_groups
from toolkit.prefix.split import Suffix


class LocalEngine:
    """AdamW on float32 masters, beside the suffix in its own precision. See ``Engine`` for the methods."""

    name = "local"

    def __init__(
        self,
        suffix: Suffix,
        parameters: dict[str, nn.Parameter],
        groups: Sequence[ParameterGroup],
        train: TrainConfig,
        optim: OptimConfig,
        total_steps: int,
        world: World,
    ) -> None:
        """
        Args:
            suffix: on its device, its mask applied.
            parameters: its trainable parameters by their names in the whole model.
            groups: of the mask; they hold all of ``parameters``.
            train: the recipe's training section.
            optim: the recipe's optimizer section.
            total_steps: optimizer steps of the whole run, for the schedule.
            world: gradients are summed over its ranks.
        """  # noqa: D205, D212
        self._suffix = suffix
        self._train = train
        self._world = world
        settings = parameter_groups(parameters, groups, train, optim)
        accumulates = train.gradient_accumulation_steps > 1
        self._optimizer = MasterAdamW(parameters, settings, train.max_grad_norm, accumulates, world.size)
        self._scheduler = build_scheduler(self._optimizer, train, total_steps)

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:  # noqa: D102
        loss: torch.Tensor = self._suffix(hidden, batch)
        return loss

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:  # noqa: D102
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.collect()

    def update(self) -> Update:  # noqa: D102
        learning_rate = current_rate(self._scheduler, self._train)
        self._optimizer.step()
        self._scheduler.step()
        return Update(self._optimizer.grad_norm, learning_rate)

    def train(self, mode: bool) -> None:  # noqa: D102
        self._suffix.train(mode)

    def gathered(self) -> AbstractContextManager[object]:  # noqa: D102
        return nullcontext()

    def masters(self) -> dict[str, torch.Tensor]:  # noqa: D102
        if not self._world.is_main:
            return {}
        return {name: state.master.detach().cpu() for name, state in self._optimizer.by_name.items()}

    def save(self, directory: Path) -> None:  # noqa: D102
        if not self._world.is_main:
            return
        state = {
            f"{name}.{kind}": getattr(own, kind).cpu()
            for name, own in self._optimizer.by_name.items()
            for kind in ("exp_avg", "exp_avg_sq")
        }
        state |= {f"{name}.step": own.step.cpu().clone() for name, own in self._optimizer.by_name.items()}
        save_file(state, directory / "moments.safetensors")
        (directory / "schedule.json").write_text(json.dumps(self._scheduler.state_dict()))

    @torch.no_grad()
    def load(self, directory: Path, masters: dict[str, torch.Tensor]) -> None:  # noqa: D102
        saved = load_file(directory / "moments.safetensors")
        schedule = json.loads((directory / "schedule.json").read_text())
        for name, state in self._optimizer.by_name.items():
            state.master.copy_(masters[name])
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                getattr(state, kind).copy_(saved[f"{name}.{kind}"])
        self._optimizer.write_back()
        self._scheduler.load_state_dict(schedule)
        for group, learning_rate in zip(self._optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = learning_rate

    def state(self) -> dict[str, AdamState]:  # noqa: D102
        if not self._world.is_main:
            return {}
        return {
            name: AdamState(
                *(tensor.detach().to("cpu", copy=True) for tensor in (own.master, own.exp_avg, own.exp_avg_sq))
            )
            for name, own in self._optimizer.by_name.items()
        }

    @torch.no_grad()
    def adopt(self, state: Mapping[str, AdamState], ages: Mapping[str, int], step: int) -> None:  # noqa: D102
        for name in self._world.share(sorted(state)):
            here, own = self._optimizer.by_name[name], state.get(name)
            here.master.copy_(self._world.spread(getattr(own, "master", None), here.master.shape))
            if ages[name]:
                here.step.fill_(ages[name])  # shared by its group, whose tensors are all of one age
                for kind in ("exp_avg", "exp_avg_sq"):
                    getattr(here, kind).copy_(self._world.spread(getattr(own, kind, None), here.master.shape))
        self._optimizer.write_back()
        forward_to(self._scheduler, step)

    def release(self) -> dict[str, torch.Tensor]:  # noqa: D102
        del self._optimizer, self._scheduler  # the parameters stay as they are: nothing was moved
        return {}
