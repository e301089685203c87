"""Runs on every rank under a launcher: train scheduled runs under several ZeRO stages. Not a test itself.

Arguments: FOLDER, then the flags of launch/train.py. Each run is then continued from some of its checkpoints, and the
folder gets what both gave, and what was still alive of an engine after its phase.
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

from toolkit import cli, distributed  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.distributed import World  # noqa: E402
from toolkit.engine.zero import ZeroEngine  # noqa: E402
from toolkit.train.run import train  # noqa: E402

RUNS = {
    "zero1": (1, "float32", 1),
    "zero2": (2, "float32", 1),
    "zero3": (3, "float32", 1),
    "zero1-bf16": (1, "bfloat16", 2),
    "zero3-bf16": (3, "bfloat16", 1),
}
"""Stage, precision and accumulation; the fourth is another optimizer class of DeepSpeed."""
RESTARTS = (3, 6, 9, 12, 15)


class Watch:
    """Which tensors that DeepSpeed makes for a phase outlive it."""

    def __init__(self) -> None:
        self.alive: list[int] = []
        self._release = ZeroEngine.release
        watch = self

        def release(engine: ZeroEngine) -> dict[str, torch.Tensor]:
            inner = engine._engine.optimizer.optimizer
            masters = [flat for flat, _ in engine._partitions()]
            held = [*masters, *(t for m in masters for t in inner.state.get(m, {}).values())]
            seen = [weakref.ref(tensor) for tensor in held]
            del inner, masters, held
            plain = watch._release(engine)
            watch.alive.append(sum(ref() is not None for ref in seen))
            return plain

        ZeroEngine.release = release  # type: ignore[method-assign]


def one(name: str, folder: Path, rest: list[str], world: World) -> dict[str, Any]:
    """Train one run, then again from each restart."""
    stage, dtype, accumulation = RUNS[name]
    run = folder / name
    given = [
        *rest, "--ds", str(ROOT / "ds_configs" / f"zero{stage}.json"), "--model.dtype", dtype, "--output.dir", str(run),
        "--train.gradient_accumulation_steps", str(accumulation), "--output.save_every_steps", "3", "--output.keep", "99",
    ]  # fmt: skip
    watch = Watch()

    def go() -> int:
        return train(flags.parse(flags.parser(""), ROOT / "recipes" / "quickstart.yaml", given), world)

    codes = [go()]
    result: dict[str, Any] = {"alive": watch.alive.copy()}
    ZeroEngine.release = watch._release  # type: ignore[method-assign]
    if world.is_main:
        shutil.copytree(run, folder / f"{name}-whole")
    for step in RESTARTS:
        if world.is_main:
            (run / "checkpoints" / "latest").write_text(f"step-{step:08d}")
        world.barrier()
        codes.append(go())
        if world.is_main:
            shutil.copyfile(run / "metrics.jsonl", folder / f"{name}-from-{step}.jsonl")
    return {**result, "codes": codes}


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    folder, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    world = distributed.start(engine_needs_group=True)
    results = {name: one(name, Path(folder), rest, world) for name in RUNS}
    if world.is_main:
        (Path(folder) / "result.json").write_text(json.dumps(results), encoding="utf-8")
    world.barrier()
    distributed.stop()
    cli.leave(0)


if __name__ == "__main__":
    main()
