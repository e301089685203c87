"""The engine without DeepSpeed: torch on one device, or one device a rank with summed gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.distributed import World
from toolkit.engine.base import AdamState, Update
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim import MasterWeights, build_optimizer, build_scheduler, current_rate, forward_to
from toolkit.prefix.split import Suffix

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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
        self._weights = MasterWeights(parameters)
        self._optimizer = build_optimizer(self._weights.by_name, groups, train, optim)
        self._scheduler = build_scheduler(self._optimizer, train, total_steps)

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:  # noqa: D102
        logits: torch.Tensor = self._suffix(hidden, batch)
        return logits

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:  # noqa: D102
        loss.backward()  # type: ignore[no-untyped-call]
        self._weights.collect_gradients()

    def update(self) -> Update:  # noqa: D102
        gradients = self._weights.gradients()
        if self._world.size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient)
        norm = get_total_norm(gradients)
        if self._train.max_grad_norm:
            clip_grads_with_norm_(self._weights.by_name.values(), self._train.max_grad_norm, norm)
        learning_rate = current_rate(self._scheduler, self._train)
        grad_norm = float(norm)
        if grad_norm < float("inf"):  # the caller stops on NaN and Inf; do not ruin the weights first
            self._optimizer.step()
            self._weights.write_back()
        self._optimizer.zero_grad()
        self._scheduler.step()
        return Update(grad_norm, learning_rate)

    def train(self, mode: bool) -> None:  # noqa: D102
        self._suffix.train(mode)

    def masters(self) -> dict[str, torch.Tensor]:  # noqa: D102
        if not self._world.is_main:
            return {}
        return {name: master.detach().cpu() for name, master in self._weights.by_name.items()}

    def save(self, directory: Path) -> None:  # noqa: D102
        if not self._world.is_main:
            return
        moments = {
            f"{name}.{moment}": self._optimizer.state[master][moment]
            for name, master in self._weights.by_name.items()
            for moment in _MOMENTS
            if moment in self._optimizer.state[master]
        }
        save_file(moments, directory / "moments.safetensors")
        (directory / "schedule.json").write_text(json.dumps(self._scheduler.state_dict()))

    def load(self, directory: Path, masters: dict[str, torch.Tensor]) -> None:  # noqa: D102
        moments = load_file(directory / "moments.safetensors", device=str(self._world.device))
        schedule = json.loads((directory / "schedule.json").read_text())
        with torch.no_grad():
            for name, master in self._weights.by_name.items():
                master.copy_(masters[name])
                for moment in _MOMENTS:
                    self._optimizer.state[master][moment] = moments[f"{name}.{moment}"]
        self._weights.write_back()
        self._scheduler.load_state_dict(schedule)
        for group, learning_rate in zip(self._optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = learning_rate

    def state(self) -> dict[str, AdamState]:  # noqa: D102
        if not self._world.is_main:
            return {}
        state = self._optimizer.state
        return {
            name: AdamState(
                *(t.detach().to("cpu", copy=True) for t in (m, state[m]["exp_avg"], state[m]["exp_avg_sq"]))
            )
            for name, m in self._weights.by_name.items()
        }

    @torch.no_grad()
    def adopt(self, state: Mapping[str, AdamState], ages: Mapping[str, int], step: int) -> None:  # noqa: D102
        for name in self._world.share(sorted(state)):
            master, own = self._weights.by_name[name], state.get(name)
            master.copy_(self._world.spread(getattr(own, "master", None), master.shape))
            if ages[name]:
                self._optimizer.state[master] = {
                    "step": torch.tensor(float(ages[name]), device=master.device),
                    "exp_avg": self._world.spread(getattr(own, "exp_avg", None), master.shape),
                    "exp_avg_sq": self._world.spread(getattr(own, "exp_avg_sq", None), master.shape),
                }
        self._weights.write_back()
        forward_to(self._scheduler, step)

    def release(self) -> dict[str, torch.Tensor]:  # noqa: D102
        del self._weights, self._optimizer, self._scheduler  # the parameters stay as they are: nothing was moved
        return {}
