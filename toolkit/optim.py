"""AdamW, its float32 masters and its learning-rate schedule: one module for both engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.mask.layer_mask import ParameterGroup


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], train: TrainConfig, optim: OptimConfig
) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), fused into one kernel a device.

    Tensors of fewer than two dimensions (biases, norms) decay only in a group with a weight decay of its own.

    Args:
        parameters: by name, what is updated: float32 masters (local engine), or the trainable parameters that
            DeepSpeed replaces by its own float32 partitions.
        groups: disjoint, of the mask; they hold all of ``parameters``.
        train: learning rate and weight decay where a group has none of its own.
        optim: betas and eps.
    """
    settings = []
    for group in groups:
        learning_rate = train.learning_rate if group.learning_rate is None else group.learning_rate
        own = [parameters[name] for name in group.names]
        matrices, vectors = [p for p in own if p.ndim >= 2], [p for p in own if p.ndim < 2]
        if group.weight_decay is not None:
            decays = [(own, group.weight_decay)]
        else:
            decays = [(matrices, train.weight_decay), (vectors, 0.0)]
        settings += [
            {"params": tensors, "lr": learning_rate, "weight_decay": decay} for tensors, decay in decays if tensors
        ]
    return torch.optim.AdamW(settings, lr=train.learning_rate, betas=optim.betas, eps=optim.eps, fused=True)


def current_rate(scheduler: LRScheduler, train: TrainConfig) -> float:
    """The recipe's learning rate at the scheduler's step; groups with a rate of their own keep their ratio to it."""
    return train.learning_rate * float(scheduler.get_last_lr()[0]) / float(scheduler.base_lrs[0])


def warmup_steps(train: TrainConfig, total_steps: int) -> int:
    """Steps over which the learning rate rises, rounded up."""
    return math.ceil(train.warmup_ratio * total_steps)


def build_scheduler(optimizer: torch.optim.Optimizer, train: TrainConfig, total_steps: int) -> LRScheduler:
    """Linear warmup from 0, then the recipe's course to the end of ``total_steps``."""
    scheduler: LRScheduler = get_scheduler(
        train.scheduler,
        optimizer,
        num_warmup_steps=warmup_steps(train, total_steps),
        num_training_steps=total_steps,
    )
    return scheduler


def forward_to(scheduler: LRScheduler, step: int) -> None:
    """Put a schedule that ``build_scheduler`` made to where it is after ``step`` steps, and its optimizer's rates."""
    assert isinstance(scheduler, LambdaLR)
    rates = [base * rule(step) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class MasterWeights:
    """Float32 masters of trainable parameters.

    bfloat16 keeps 8 bits of mantissa: at a learning rate of 1e-5 most AdamW updates are smaller than half a unit in
    the last place and would round to nothing. The masters take the updates; the parameters are their rounded copies
    (Micikevicius et al., arXiv 1710.03740). Parameters that are float32 already are their own masters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """
        Args:
            parameters: name to trainable parameter.
        """  # noqa: D205, D212
        self._parameters = list(parameters.values())
        self.by_name: dict[str, nn.Parameter] = {
            name: parameter
            if parameter.dtype == torch.float32
            else nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            for name, parameter in parameters.items()
        }
        self._pairs = [
            (parameter, master)
            for parameter, master in zip(self._parameters, self.by_name.values(), strict=True)
            if parameter is not master
        ]

    def collect_gradients(self) -> None:
        """Add the parameters' gradients to the masters' in float32 and free them."""
        for parameter, master in self._pairs:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """The masters' gradients, zeros for a tensor that no gradient reached."""
        for master in self.by_name.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.by_name.values() if master.grad is not None]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters."""
        if self._pairs:
            torch._foreach_copy_([p for p, _ in self._pairs], [m for _, m in self._pairs])
