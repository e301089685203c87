"""Runs on every rank under a launcher: steps with a NaN planted on one rank, under several ZeRO stages. Not a test.

Arguments: OUTPUT.json, then the flags of launch/train.py. Of each step the output has what it did, and whether weights,
masters, moments and step counts are what they were before it, over all ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import plant  # noqa: E402
from helpers import set_up  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.data.batches import epoch_order, step_batches  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.runtime.distributed import World  # noqa: E402
from toolkit.training import guard  # noqa: E402
from toolkit.training.guard import StepGuard  # noqa: E402
from toolkit.training.step import train_step  # noqa: E402
from toolkit.training.trainer import Trainer  # noqa: E402

RUNS = {"zero0": "float32", "zero1": "float32", "zero2": "bfloat16", "zero3": "float32"}
"""Each combination is another class, or another branch, of DeepSpeed's."""
FAULTS = {2: ("loss", 1), 3: ("gradient", 0)}
"""Step, counted from 0: what is not finite, and on which rank."""
STEPS = 6


def snapshot(trainer: Trainer) -> list[torch.Tensor]:
    """What a skipped step must leave alone on this rank: weights and the optimizer's state, step counts included."""
    zero: Any = trainer.state.engine
    state = getattr(zero._engine.optimizer, "optimizer", zero._engine.optimizer).state
    held = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in trainer.state.suffix.parameters()]
    for flat in state:
        held += [flat, *(value for value in state[flat].values() if isinstance(value, torch.Tensor))]
    return [tensor.detach().clone() for tensor in held]


def unchanged(before: list[torch.Tensor], after: list[torch.Tensor], world: World) -> bool:
    same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return world.max(float(not same)) == 0


def steps(trainer: Trainer, world: World) -> list[dict[str, Any]]:
    order = epoch_order(trainer.context.batch_plan.rows, trainer.context.config.train.seed, 0)
    watch = StepGuard(Path("nowhere"), 3, world)
    done = []
    batches_by_step = step_batches(
        trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id
    )
    for step, batches in zip(range(STEPS), batches_by_step, strict=False):
        before = snapshot(trainer)
        kind, rank = FAULTS.get(step, (None, None))
        with plant(trainer.state.engine, kind if rank == world.rank else None):
            outcome = train_step(batches, trainer.state.prefix, trainer.state.engine, world)
        watch.check_step(step + 1, outcome, batches)
        done.append(
            {
                "loss": None if outcome.skipped else outcome.loss,
                "learning_rate": outcome.learning_rate,
                "unchanged": unchanged(before, snapshot(trainer), world),
                "rows": [
                    [e.origin for b in rank for e in b]
                    for rank in world.all_gather_object([b.examples for b in batches])
                ],
            }
        )
    return done


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    output, *rest = words
    world = distributed.join_process_group(engine_needs_group=True)
    result: dict[str, Any] = {}
    messages: list[str] = []
    guard.log.warning = lambda text, *values: messages.append(text % values)  # type: ignore[method-assign]
    for name, dtype in RUNS.items():
        ds = ROOT / "ds_configs" / f"{name.split('-')[0]}.json"
        if name == "zero0":
            ds = Path(f"{output}.ds")
            ds.write_text('{"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}')
        invocation = flags.parse(
            flags.create_parser(""),
            ROOT / "recipes" / "quickstart.yaml",
            [*rest, "--model.dtype", dtype, "--ds", str(ds)],
        )
        messages.clear()
        trainer = set_up(invocation, world)
        result[name] = {"steps": steps(trainer, world), "said": list(messages)}
    if world.is_main:
        Path(output).write_text(json.dumps(result), encoding="utf-8")
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
