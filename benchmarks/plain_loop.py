"""The reference: a plain torch fine-tuning loop that shares nothing with the toolkit but the token ids."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.record import Record
from benchmarks.workload import Workload


def train_top(model: Any, workload: Workload) -> list[torch.nn.Parameter]:
    """Freeze all of a Llama but what ``workload`` trains, and return that."""
    blocks = len(model.model.layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(workload.trains(name, blocks))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain_loop(model: Any, workload: Workload, fp32_masters: bool) -> Record:
    """Train with batch 1, AdamW, 10 % linear warmup, linear decay and clipping at 1.0.

    Args:
        model: a Llama of transformers on its device; changed in place.
        workload: rows, order and learning rate.
        fp32_masters: keep float32 copies for the update; without, AdamW updates the weights in their own precision.
    """
    weights = train_top(model.train(), workload)
    masters = [w.detach().float().clone() for w in weights] if fp32_masters else weights
    matrices, vectors = [m for m in masters if m.ndim >= 2], [m for m in masters if m.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=workload.learning_rate)
    total, warmup = len(workload.sequence), workload.warmup_steps
    record = Record(trainable=sum(weight.numel() for weight in weights))
    for step, (ids, start) in enumerate(workload.sequence):
        record.start()
        tokens = torch.tensor([ids], device=model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, start:])
        torch.autograd.backward(loss)
        if fp32_masters:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float() if weight.grad is not None else None, None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        factor = step / warmup if step < warmup else (total - step) / max(1, total - warmup)
        for group in optimizer.param_groups:
            group["lr"] = workload.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        if fp32_masters:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        record.losses.append(loss.item())
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        record.end()
    return record
