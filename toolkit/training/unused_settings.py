"""Settings that do nothing in this run, for the log."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from toolkit.config.schema import RunConfig
from toolkit.optim.groups import learns_nothing


def unused_settings(config: RunConfig, total_steps: int, device: torch.device) -> Iterator[str]:
    """Say what of the recipe will have no effect: a line each.

    Args:
        config: the recipe.
        total_steps: optimizer steps of the whole run.
        device: where it computes.
    """
    if config.optim.name == "paged_adamw_8bit" and device.type == "cpu":
        yield "optim.name: paged_adamw_8bit pages nothing here and is adamw_8bit: the run computes on the CPU"
    if learns_nothing(config.train, total_steps):
        steps = "one optimizer step" if total_steps == 1 else f"{total_steps} optimizer steps"
        yield (
            f"this run has {steps}, and the learning rate is 0 at {'it' if total_steps == 1 else 'each of them'}: the "
            f"warmup (train.warmup_ratio: {config.train.warmup_ratio:g}) rises from 0, so nothing will be learned. "
            "Expected more steps (rows, train.epochs, or fewer rows a step), or train.warmup_ratio: 0"
        )
