"""Parameter groups of AdamW and its learning-rate schedule, for both engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.mask.layer_mask import ParameterGroup


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], train: TrainConfig, optim: OptimConfig
) -> list[dict[str, Any]]:
    """Return the parameter groups of an AdamW: learning rate, weight decay, betas and eps of each.

    Tensors of fewer than two dimensions (biases, norms) decay only in a group with a weight decay of its own.

    Args:
        parameters: by name, what trains.
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
            {"params": p, "lr": learning_rate, "weight_decay": decay, "betas": optim.betas, "eps": optim.eps}
            for p, decay in decays
            if p
        ]
    return settings


def embedding_tables(model: nn.Module) -> frozenset[int]:
    """Return ``id`` of the parameters of ``model`` that are embedding tables, a tied head's included.

    Their gradients are uneven: rows that occur get large ones and the others none. Moments in 8 bits would share scales
    between them, so there these tensors keep float32 moments (Dettmers et al., arXiv 2110.02861, section 2.3).
    """
    return frozenset(id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding))


def current_rate(scheduler: LRScheduler, train: TrainConfig) -> float:
    """Return the learning rate at the scheduler's step; groups with their own keep their ratio to it."""
    return train.learning_rate * float(scheduler.get_last_lr()[0]) / float(scheduler.base_lrs[0])


def warmup_steps(train: TrainConfig, total_steps: int) -> int:
    """Return the steps over which the learning rate rises, rounded up."""
    return math.ceil(train.warmup_ratio * total_steps)


def learns_nothing(train: TrainConfig, total_steps: int) -> bool:
    """Return True if the schedule's rate is 0 at every step of a run; a warmup's first step has rate 0."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = build_scheduler(optimizer, train, total_steps)
    assert isinstance(scheduler, LambdaLR)
    (rule,) = scheduler.lr_lambdas
    return not any(rule(step) for step in range(total_steps))


def build_scheduler(optimizer: torch.optim.Optimizer, train: TrainConfig, total_steps: int) -> LRScheduler:
    """Build a schedule: linear warmup from 0, then the recipe's course to the end of ``total_steps``."""
    scheduler: LRScheduler = get_scheduler(
        train.scheduler,
        optimizer,
        num_warmup_steps=warmup_steps(train, total_steps),
        num_training_steps=total_steps,
    )
    return scheduler


def forward_to(scheduler: LRScheduler, step: int) -> None:
    """Move a schedule that ``build_scheduler`` made, and its optimizer's rates, to after ``step`` steps."""
    assert isinstance(scheduler, LambdaLR)
    rates = [base * rule(step) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
