"""Runs on two ranks under a launcher: go on with checkpoints of other engines, stages and ranks. Not a test itself.

Arguments: FOLDER, then the flags of launch/train.py. The folder holds a run of one process, ``local``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoint_parts import edit_state, point_to  # noqa: E402

from toolkit.checkpoint.state import read_state  # noqa: E402
from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.runtime.distributed import World  # noqa: E402
from toolkit.runtime.errors import CheckpointError  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402

CHANGES = {
    "zero1": ("local", 2, {"stage": 1}),
    "zero2": ("local", 2, {"stage": 2}),
    "zero3": ("local", 2, {"stage": 3, "stage3_param_persistence_threshold": 0}),
    "zero1-to-3": ("zero1", 4, {"stage": 3}),
    "zero3-to-1": ("zero3", 4, {"stage": 1}),
    "zero2-to-offloaded-3": ("zero2", 4, {"stage": 3, "offload_optimizer": {"device": "cpu"}}),
    "zero3-to-offloaded-2": ("zero3", 4, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "zero3-to-torch": ("zero3", 4, None),
}
"""Name: whose checkpoint is gone on with, of which step, and under which ZeRO settings; none is torch alone."""
OTHER = ("--mask.train", "blocks:2-3", "head")
"""A mask with tensors of the same shapes in other layers."""


def command(folder: Path, name: str, zero: dict[str, object] | None, rest: list[str]) -> flags.Invocation:
    """The invocation of a run in the folder."""
    given = [*rest, "--output.dir", str(folder / name)]
    if zero is not None:
        ds = folder / f"{name}.json"
        ds.write_text(json.dumps({"zero_optimization": zero, "zero_allow_untested_optimizer": True}))
        given += ["--ds", str(ds)]
    return flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", given)


def go_on(folder: Path, name: str, rest: list[str], world: World) -> int:
    """Go on with another run's checkpoint in a copy of it."""
    source, step, zero = CHANGES[name]
    if world.is_main:
        shutil.copytree(folder / source, folder / name)
        point_to(folder / name, step)
    world.barrier()
    return train_in_group(command(folder, name, zero, rest), world)


def trap(folder: Path, name: str, rest: list[str], world: World) -> str:
    """What is said to a mask of the same size, under a checkpoint whose recipe has been made to agree."""
    if world.is_main:
        checkpoint = point_to(folder / name, 4)
        recipe = read_state(checkpoint).recipe
        recipe["mask"]["train"] = list(OTHER[1:])
        edit_state(checkpoint, recipe=recipe)
    world.barrier()
    try:
        train_in_group(command(folder, name, CHANGES[name][2], [*rest, *OTHER]), world)
    except CheckpointError as error:
        return str(error)
    return "went on"


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    given, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    folder = Path(given)
    world = distributed.join_process_group(engine_needs_group=True)
    result: dict[str, object] = {name: go_on(folder, name, rest, world) for name in CHANGES}
    for name in ("zero1", "zero2", "zero3"):
        if world.is_main:
            shutil.copytree(folder / name, folder / f"{name}-kept")
        result[f"{name} with another mask"] = trap(folder, name, rest, world)
    if world.is_main:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    world.barrier()
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
