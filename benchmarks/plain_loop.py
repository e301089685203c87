"""The reference: a plain torch fine-tuning loop that shares nothing with the toolkit but the token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

Rows = Sequence[tuple[Sequence[int], int]]
"""Per row: token ids, and the index of the first supervised one."""


def train_top(model: Any, last: int) -> list[torch.nn.Parameter]:
    """Untie the head, freeze all but the last blocks and the head of a Llama, and return what trains."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    first = len(model.model.layers) - last
    for name, parameter in model.named_parameters():
        block = re.fullmatch(r"model\.layers\.(\d+)\..*", name)
        parameter.requires_grad_(name == "lm_head.weight" or (block is not None and int(block[1]) >= first))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain_loop(
    model: Any, rows: Rows, orders: Sequence[Sequence[int]], lr: float, fp32_masters: bool, last: int = 4
) -> list[float]:
    """Train with batch 1, AdamW, 10 % linear warmup, linear decay and clipping at 1.0; the loss of each step.

    Args:
        model: a Llama of transformers; changed in place.
        rows: token ids and answer starts.
        orders: for each epoch, the order of the rows.
        lr: peak learning rate.
        fp32_masters: keep float32 copies for the update; without, AdamW updates the weights in their own precision.
        last: how many blocks train, beside the head.
    """
    weights = train_top(model.train(), last)
    masters = [w.detach().float().clone() for w in weights] if fp32_masters else weights
    matrices, vectors = [m for m in masters if m.ndim >= 2], [m for m in masters if m.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    total = sum(len(order) for order in orders)
    warmup = -(-total // 10)
    losses = []
    for step, index in enumerate(i for order in orders for i in order):
        ids, start = rows[index]
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, start:])
        torch.autograd.backward(loss)
        if fp32_masters:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float() if weight.grad is not None else None, None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        factor = step / warmup if step < warmup else (total - step) / max(1, total - warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
        if fp32_masters:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        losses.append(loss.item())
    return losses
