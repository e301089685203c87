"""Runs on every rank under a launcher: train one recipe on every engine in every split of a batch. Not a test itself.

Two ranks also train cells with a fault planted. Arguments: FOLDER, then the flags of launch/train.py. The run of each
cell is in the folder under its name.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402, F401
from closeness import FAULTS, planted  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402

ENGINES = ("local", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
PRECISIONS = ("float32", "bfloat16")
ACCUMULATIONS = (1, 2)
RANKS = (1, 2)
GLOBAL_BATCH = 4
FAULTY = ("zero2",)
"""Engines that have each fault planted in them, on two ranks with two micro batches a step."""


def cells(ranks: int) -> Iterator[tuple[str, str, int]]:
    """Engine, precision and accumulation of each cell that so many ranks train."""
    for precision in PRECISIONS:
        for engine in ENGINES:
            for accumulation in ACCUMULATIONS:
                yield engine, precision, accumulation


def name_of(engine: str, precision: str, accumulation: int, ranks: int, fault: str = "") -> str:
    """The run directory of a cell."""
    return f"{engine}-{precision}-{ranks}x{accumulation}{fault}"


def ds_file(engine: str, folder: Path) -> list[str]:
    """Flags that choose an engine."""
    if engine == "local":
        return []
    if engine != "zero0":
        return ["--ds", str(ROOT / "ds_configs" / f"{engine}.json")]
    content = json.loads((ROOT / "ds_configs" / "zero1.json").read_text(encoding="utf-8"))
    content["zero_optimization"] = {"stage": 0}
    path = folder / "zero0.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return ["--ds", str(path)]


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    folder, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    world = distributed.join_process_group(engine_needs_group=True)
    gc.freeze()  # each run collects garbage several times: not of what is loaded for all of them

    def run(engine: str, precision: str, accumulation: int, fault: str = "") -> None:
        given = [
            *rest, *ds_file(engine, Path(folder)), "--model.dtype", precision,
            "--output.dir", str(Path(folder) / name_of(engine, precision, accumulation, world.size, fault)),
            "--train.gradient_accumulation_steps", str(accumulation),
            "--train.micro_batch_size", str(GLOBAL_BATCH // accumulation // world.size),
        ]  # fmt: skip
        code = train_in_group(flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", given), world)
        assert code == 0, code

    for cell in cells(world.size):
        run(*cell)
    if world.size == 2:
        for fault, engine, precision in product(FAULTS, FAULTY, PRECISIONS):
            with planted(FAULTS[fault], world):
                run(engine, precision, 2, fault)
    world.barrier()
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
