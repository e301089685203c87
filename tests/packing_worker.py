"""Runs on every rank under a launcher: train with packed and with padded micro batches. Not a test itself.

Arguments: OUTPUT.json, then the flags of launch/train.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import set_up  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.data.batches import epoch_order, step_batches  # noqa: E402
from toolkit.data.prefetch import Prefetcher, on_device  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.training.step import train_step  # noqa: E402
from toolkit.training.trainer import Trainer  # noqa: E402


def steps(trainer: Trainer) -> dict[str, Any]:
    """Train to the end of the run."""
    result: dict[str, Any] = {"engine": trainer.state.engine.name, "packed": trainer.state.packing.on, "losses": []}
    tokens = computed = 0
    for epoch in range(trainer.context.config.train.epochs):
        order = epoch_order(trainer.context.batch_plan.rows, trainer.context.config.train.seed, epoch)
        source = step_batches(
            trainer.context.dataset.train,
            order,
            trainer.context.batch_plan,
            trainer.context.pad_id,
            packed=trainer.state.packing.on,
        )
        with Prefetcher() as ahead:
            for batches in ahead(on_device(source, trainer.context.world.device)):
                if len(result["losses"]) == trainer.context.total_steps:
                    break
                tokens += sum(batch.tokens for batch in batches)
                computed += sum(batch.input_ids.numel() for batch in batches)
                result["losses"].append(
                    train_step(batches, trainer.state.prefix, trainer.state.engine, trainer.context.world).loss
                )
    return {**result, "tokens": tokens, "computed": computed}


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    output, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    world = distributed.join_process_group(engine_needs_group=True)
    results = {}
    for mode in ("auto", "off"):
        given = [*rest, "--data.packing", mode]
        invocation = flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", given)
        results[mode] = steps(set_up(invocation, world))
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    world.barrier()
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
