"""Runs on every rank under a launcher: train scheduled runs under several ZeRO stages. Not a test itself.

Arguments: FOLDER, names of RUNS with commas, then the flags of launch/train.py. Each run is then continued from some of
its checkpoints, and the folder gets what both gave, and what was still alive of an engine after its phase.
"""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.engine.deepspeed.engine import ZeroEngine  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.runtime.distributed import World  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402

RUNS = {
    "zero1": (1, "bfloat16", 2),
    "zero2": (2, "float32", 1),
    "zero3": (3, "float32", 1),
    "zero3-bf16": (3, "bfloat16", 1),
}
"""Stage, precision and accumulation; the first is an optimizer class of DeepSpeed's own."""
RESTARTS = (4, 6)
"""The first is at the border of two phases."""


class Watch:
    """Counts the masters and moments of a phase's engine that are still there when the next engine is made."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.alive: list[int] = []
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._methods = (ZeroEngine.release, ZeroEngine.__init__)
        watch = self

        def release(engine: ZeroEngine) -> dict[str, torch.Tensor]:
            state = engine._engine.optimizer.optimizer.state
            watch._seen = [weakref.ref(t) for master, kept in state.items() for t in (master, *kept.values())]
            watch.held.append(len(watch._seen))
            del state
            return watch._methods[0](engine)

        def construct(engine: ZeroEngine, *args: Any) -> None:
            if watch._seen:
                watch.alive.append(sum(ref() is not None for ref in watch._seen))
            watch._methods[1](engine, *args)

        ZeroEngine.release, ZeroEngine.__init__ = release, construct  # type: ignore[method-assign]

    def stop(self) -> None:
        """Put the engine's own methods back."""
        ZeroEngine.release, ZeroEngine.__init__ = self._methods  # type: ignore[method-assign]


def one(name: str, folder: Path, rest: list[str], world: World) -> dict[str, Any]:
    """Train one run, then again from each restart."""
    stage, dtype, accumulation = RUNS[name]
    run = folder / name
    given = [
        *rest, "--ds", str(ROOT / "ds_configs" / f"zero{stage}.json"), "--model.dtype", dtype, "--output.dir", str(run),
        "--train.gradient_accumulation_steps", str(accumulation), "--output.save_every_steps", "2",
        "--output.keep", "99",
    ]  # fmt: skip
    watch = Watch()

    def go() -> int:
        return train_in_group(flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", given), world)

    codes = [go()]
    watch.stop()
    if world.is_main:
        shutil.copytree(run, folder / f"{name}-whole")
    for step in RESTARTS:
        if world.is_main:
            (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")
        world.barrier()
        codes.append(go())
        if world.is_main:
            shutil.copyfile(run / "metrics.jsonl", folder / f"{name}-from-{step}.jsonl")
    return {"codes": codes, "held": watch.held, "alive": watch.alive}


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    folder, names, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    world = distributed.join_process_group(engine_needs_group=True)
    results = {name: one(name, Path(folder), rest, world) for name in names.split(",")}
    if world.is_main:
        (Path(folder) / "result.json").write_text(json.dumps(results), encoding="utf-8")
    world.barrier()
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
