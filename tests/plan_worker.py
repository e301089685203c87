"""Runs on every rank under a launcher: set a run up, take a step, and count what DeepSpeed holds. Not a test itself.

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

from toolkit.checkpoint.saver import Saver  # noqa: E402
from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.data.batches import epoch_order, step_batches  # noqa: E402
from toolkit.planning.table import as_dict  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.training.phases import content_of  # noqa: E402
from toolkit.training.progress import Progress  # noqa: E402
from toolkit.training.step import train_step  # noqa: E402
from toolkit.training.trainer import Trainer  # noqa: E402

ENGINES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def storages(tensors: Any) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes by kind, from DeepSpeed's own tensors."""
    optimizer = trainer.state.engine._engine.optimizer
    state = optimizer.optimizer.state.values()
    own = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in trainer.state.suffix.parameters()]
    whole = [p for p in trainer.state.suffix.parameters() if hasattr(p, "ds_tensor") and p.ds_persist]
    three = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return {
        "prefix weights": storages(trainer.state.prefix.model.parameters()),
        "suffix weights": storages(own) + storages(whole),
        "masters": storages(
            optimizer.fp32_partitioned_groups_flat if three else optimizer.single_partition_of_fp32_groups
        ),
        "moments": storages([moments[name] for moments in state for name in ("exp_avg", "exp_avg_sq")]),
    }


def one_step(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Train one step and save; the plan beside what was counted."""
    inner = trainer.state.engine._engine.optimizer.optimizer
    step, gradients = inner.step, [0]

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
        gradients[0] += storages(found)  # DeepSpeed steps one parameter group at a time
        return step(*args, **kwargs)

    inner.step = watched
    order = epoch_order(trainer.context.batch_plan.rows, 0, 0)
    batches = next(
        iter(step_batches(trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id))
    )
    train_step(batches, trainer.state.prefix, trainer.state.engine, trainer.context.world)
    folder.mkdir(exist_ok=True)
    trainer.context.world.barrier()
    Saver(folder, trainer.context.world, keep=1).save(
        content_of(trainer.context, trainer.state, Progress(trainer.context.batch_plan.rows))
    )
    assert trainer.plan is not None
    return {
        "plan": as_dict(trainer.plan),
        "held": held(trainer),
        "gradients": gradients[0],
        "written": sum(path.stat().st_size for path in folder.rglob("rank-*.safetensors")),
    }


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    output, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    world = distributed.join_process_group(engine_needs_group=True)
    results = {}
    for engine in ENGINES:
        given = [*rest, "--ds", str(ROOT / "ds_configs" / f"{engine}.json")]
        invocation = flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", given)
        results[engine] = one_step(set_up(invocation, world), Path(output).parent / engine)
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    world.barrier()
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
