"""Parameter groups of AdamW and its learning-rate schedule, for both engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from toolkit.config.schema import OptimConfig, TrainConfig
from toolkit.mask.layer_mask import ParameterGroup


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], train: TrainConfig, optim: OptimConfig
) -> list[dict[str, Any]]:
    """Return the parameter groups for AdamW, each with learning rate, weight decay, betas and eps.

    The groups of the mask are disjoint and name all of ``parameters``; they take a learning rate or weight decay that
    they do not set from ``train``. Tensors of fewer than two dimensions (biases, norms) decay only in a group with a
    weight decay of its own.
    """
    param_groups = []
    for group in groups:
        learning_rate = train.learning_rate if group.learning_rate is None else group.learning_rate
        members = [parameters[name] for name in group.names]
        matrices, vectors = [p for p in members if p.ndim >= 2], [p for p in members if p.ndim < 2]
        if group.weight_decay is not None:
            decays = [(members, group.weight_decay)]
        else:
            decays = [(matrices, train.weight_decay), (vectors, 0.0)]
        param_groups += [
            {"params": p, "lr": learning_rate, "weight_decay": decay, "betas": optim.betas, "eps": optim.eps}
            for p, decay in decays
            if p
        ]
    return param_groups


def embedding_ids(model: nn.Module) -> frozenset[int]:
    """Return the ``id`` of each embedding table of ``model``, a tied head and rows that train by themselves included.

    Their gradients are uneven: rows that occur get large ones and the others none. 8-bit moments would share scales
    between those rows, so the 8-bit optimizers keep float32 moments for these tensors
    (Dettmers et al., arXiv 2110.02861, section 2.3).
    """
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return frozenset(id(parameter) for table in tables for parameter in table.parameters(recurse=False))


def current_rate(scheduler: LRScheduler, train: TrainConfig) -> float:
    """Return the learning rate of the next update, as ``train.learning_rate`` is scheduled.

    Groups with a learning rate of their own follow the same schedule in proportion.
    """
    return train.learning_rate * float(scheduler.get_last_lr()[0]) / float(scheduler.base_lrs[0])


def is_rate_always_zero(train: TrainConfig, total_steps: int) -> bool:
    """Return True if the learning rate is 0 at every step of a run, as in a run of one step that is all warmup."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = build_scheduler(optimizer, train, total_steps)
    assert isinstance(scheduler, LambdaLR)
    (factor_at,) = scheduler.lr_lambdas
    return not any(factor_at(step) for step in range(total_steps))


def build_scheduler(optimizer: torch.optim.Optimizer, train: TrainConfig, total_steps: int) -> LRScheduler:
    """Build the learning-rate scheduler: linear warmup from 0, then ``train.scheduler`` until ``total_steps``."""
    warmup = math.ceil(train.warmup_ratio * total_steps)
    return LambdaLR(optimizer, partial(_rate_factor, train.scheduler, warmup, total_steps))


def _rate_factor(scheduler: str, warmup: int, total: int, step: int) -> float:
    """Return the share of the learning rate that ``step``, from 0, uses.

    It is that of transformers' ``get_scheduler``, to the bit. Importing that takes 55 MiB, for peft and bitsandbytes.
    """
    if step < warmup:
        return step / warmup
    if scheduler == "constant_with_warmup":
        return 1.0
    left = max(1, total - warmup)
    if scheduler == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / left))))
    return max(0.0, (total - step) / left)


def set_scheduler_step(scheduler: LRScheduler, step: int) -> None:
    """Set a scheduler of ``build_scheduler``, and its optimizer's learning rates, to the state after ``step`` steps.

    For a resumed run: it computes the rates directly, where ``scheduler.step`` would have to be called ``step`` times.
    """
    assert isinstance(scheduler, LambdaLR)
    rates = [base * factor_at(step) for base, factor_at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = rates
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
