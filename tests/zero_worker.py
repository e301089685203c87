"""Runs on every rank under a launcher: train a few steps and write down what happened. Not a test itself.

Arguments: OUTPUT.json, then the flags of launch/train.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import set_up  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.data.batches import epoch_order, step_batches  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.training.step import train_step  # noqa: E402
from toolkit.training.trainer import Trainer  # noqa: E402


def digests(trainer: Trainer) -> dict[str, str]:
    """SHA-256 of every frozen tensor on this rank, partitioned ones gathered."""
    import deepspeed

    found = {}
    parts = (
        [trainer.state.suffix.model]
        if trainer.state.prefix is None
        else [trainer.state.prefix.model, trainer.state.suffix.model]
    )
    for part in parts:
        for name, parameter in part.named_parameters():
            if name not in trainer.state.mask.names:
                with deepspeed.zero.GatheredParameters([parameter]):
                    data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                    found[name] = hashlib.sha256(data.tobytes()).hexdigest()
    return found


def main() -> None:
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    output, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    invocation = flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", rest)
    world = distributed.join_process_group(engine_needs_group=True)
    trainer = set_up(invocation, world)
    frozen = digests(trainer)
    masters = {name: tensor.clone() for name, tensor in trainer.state.engine.masters().items()}
    result: dict[str, Any] = {"losses": [], "norms": [], "tokens": [], "engine": trainer.state.engine.name}
    rows: list[list[int]] = []
    stack: list[int] = []
    for epoch in range(trainer.context.config.train.epochs):
        order = epoch_order(trainer.context.batch_plan.rows, trainer.context.config.train.seed, epoch)
        for step, batches in enumerate(
            step_batches(trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id)
        ):
            rows += [own for own, is_filler in trainer.context.batch_plan.micro_batches(order, step) if not is_filler]
            outcome = train_step(batches, trainer.state.prefix, trainer.state.engine, world)
            result["losses"].append(outcome.loss)
            result["norms"].append(outcome.grad_norm)
            result["tokens"].append(outcome.supervised_tokens)
            stack.append(len(FWD_MODULE_STACK))
    result["modules_left_on_stack"] = stack[-1] - stack[0]
    after = trainer.state.engine.masters()
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, (rows, frozen == digests(trainer), len(frozen)))
    if world.is_main:
        result["rows_by_rank"] = [[row for own in rank for row in own] for rank, _, _ in every]
        result["frozen_unchanged"] = [unchanged for _, unchanged, _ in every]
        result["frozen_tensors"] = [count for _, _, count in every]
        result["masters_moved"] = {name: not torch.equal(masters[name], after[name]) for name in after}
        result["trained_on_device"] = sum(p.numel() for p in trainer.state.suffix.parameters() if p.requires_grad)
        result["port"] = os.environ["MASTER_PORT"]
        torch.save(after, f"{output}.pt")
        Path(output).write_text(json.dumps(result), encoding="utf-8")
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
