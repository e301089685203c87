"""An engine without DeepSpeed: torch on one device, or data parallel with one device a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.engine.base import Engine, Update
from toolkit.mask.layer_mask import ParameterGroup
from toolkit.optim.flat_buffers import FlatState, TensorState
from toolkit.optim.groups import build_scheduler, current_rate, embedding_tables, parameter_groups, set_scheduler_step
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.optim.state_fragments import KINDS, Fragment, FragmentState
from toolkit.optim.update_monitor import UpdateMonitor
from toolkit.runtime.distributed import World
from toolkit.split.suffix import Suffix


class LocalEngine(Engine):
    """Train the suffix in its own precision with ``MasterAdamW``, which keeps fp32 or split masters.

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
        settings = parameter_groups(parameters, groups, train, optim)
        accumulates = train.gradient_accumulation_steps > 1
        self._optimizer = MasterAdamW(
            parameters, settings, train.max_grad_norm, accumulates, world.size, name=optim.name,
            tables=embedding_tables(suffix.model),
        )  # fmt: skip
        self._update_monitor, self._rate = UpdateMonitor(self._optimizer.sample), 0.0
        self._scheduler = build_scheduler(self._optimizer, train, total_steps)

    @override
    def forward_loss(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self._suffix(hidden, batch)
        return loss

    @override
    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.collect()

    @override
    def update(self) -> Update:
        self._rate = current_rate(self._scheduler, self._train)
        self._update_monitor.before()
        self._optimizer.step()
        self._update_monitor.after()
        self._scheduler.step()
        return Update(self._optimizer.grad_norm, self._rate)

    @override
    def moved_share(self) -> float | None:
        return self._update_monitor.judge(*self._update_monitor.counts(), self._rate)  # all ranks hold and see the same

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
        return [
            Fragment(name, 0, state.master.numel(), _WholeTensorState(state, self.shapes[name]))
            for name, state in self._optimizer.by_name.items()
        ]

    @property
    @override
    def schedule_step(self) -> int:
        return self._scheduler.last_epoch

    @override
    def continue_at(self, step: int) -> None:
        self._optimizer.write_back()
        self._update_monitor.reset()
        set_scheduler_step(self._scheduler, step)

    @override
    def release(self) -> dict[str, torch.Tensor]:
        del self._optimizer, self._scheduler, self._update_monitor  # the parameters stay as they are: nothing was moved
        return {}


@dataclass(frozen=True)
class _WholeTensorState(FragmentState):
    """The state of a whole tensor as one fragment; ``FragmentState`` documents the methods."""

    tensor_state: TensorState
    shape: torch.Size

    @property
    def updates(self) -> int:
        return int(self.tensor_state.step)

    def read(self) -> Mapping[str, torch.Tensor]:
        return {kind: getattr(self.tensor_state, kind).detach().reshape(-1) for kind in KINDS}

    def write(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        self.tensor_state.write({kind: values.view(self.shape) for kind, values in tensors.items()}, updates)

    def raw(self) -> dict[str, torch.Tensor]:
        return {} if isinstance(self.tensor_state, FlatState) else self.tensor_state.raw()

    def set_raw(self, raw: Mapping[str, torch.Tensor]) -> None:
        self.tensor_state.set_raw(raw)
