"""An engine without DeepSpeed: torch on one device, or data parallel with one device a rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from typing_extensions import override

from toolkit.config.policy import most_micro_batches, reduce_dtype
from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.engine.base import Engine, Update
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.gradient_buckets import GradientBuckets
from toolkit.optim.groups import build_scheduler, current_rate, embedding_ids, parameter_groups, set_scheduler_step
from toolkit.optim.kernel_choice import agree_on_kernels, kernels_if
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.optim.state_fragments import Fragment
from toolkit.optim.update_monitor import UpdateMonitor
from toolkit.runtime.distributed import World
from toolkit.split.suffix import Suffix


class LocalEngine(Engine):
    """Train the suffix in its own precision with ``MasterAdamW``, which keeps fp32 masters.

    Args:
        suffix: suffix on its device, with the mask applied.
        parameters: trainable parameters of the suffix, by their names in the whole model.
        groups: parameter groups of the mask, which together name all of ``parameters``.
        train: the recipe's training section.
        optim: the recipe's optimizer section.
        total_steps: optimizer steps of the whole run, for the learning-rate schedule.
        world: this process among the ranks over which gradients are summed.
    """

    name = "local"
    is_replicated = True

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
        self._suffix = suffix
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._train = train
        self.world = world
        param_groups = parameter_groups(parameters, groups, train, optim)
        accumulates = most_micro_batches(train) > 1
        self.kernels = agree_on_kernels(world)
        """Whether kernels of our own update the state that is float32, and why."""
        self.buckets: GradientBuckets | None = None
        """Sums gradients over several ranks; None for one."""
        if world.size > 1:
            self.buckets = GradientBuckets(list(parameters.values()), getattr(torch, reduce_dtype(train)))
        self._optimizer = MasterAdamW(
            parameters, param_groups, train.max_grad_norm, accumulates, self.buckets, name=optim.name,
            embedding_ids=embedding_ids(suffix.model), kernels=kernels_if(self.kernels),
        )  # fmt: skip
        self._update_monitor, self._rate = UpdateMonitor(self._optimizer.sample), 0.0
        self._scheduler = build_scheduler(self._optimizer, train, total_steps)

    @override
    def forward_loss(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self._suffix(hidden, batch)
        return loss

    @override
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        with self._optimizer.collecting(is_last):
            loss.backward()  # type: ignore[no-untyped-call]

    @override
    def update(self) -> Update:
        self._rate = current_rate(self._scheduler, self._train)
        self._update_monitor.before()
        self._optimizer.step()
        self._update_monitor.after()
        self._scheduler.step()
        return Update(self._optimizer.grad_norm, self._rate, self._update_monitor.counts)

    @override
    def train(self, mode: bool) -> None:
        self._suffix.train(mode)

    @override
    def gathered(self) -> AbstractContextManager[object]:
        return nullcontext()

    @override
    def gathered_bytes(self) -> int:
        return 0

    @override
    def fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, self.shapes[name].numel(), state) for name, state in self._optimizer.by_name.items()]

    @override
    def continue_at(self, step: int) -> None:
        self._optimizer.write_back()
        self._update_monitor.reset()
        set_scheduler_step(self._scheduler, step)

    @override
    def release(self) -> dict[str, torch.Tensor]:
        if self.buckets is not None:
            self.buckets.close()
            self.buckets = None
        del self._optimizer, self._scheduler, self._update_monitor  # the parameters stay as they are: nothing was moved
        return {}
