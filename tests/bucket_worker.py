"""Runs on every rank under a launcher: train cases, and write down how gradients were summed. Not a test itself.

Arguments: FOLDER, with a model and rows; the run of each case is in it under its name, and sums.json.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from collective_worker import Collectives  # noqa: E402
from helpers import tiny_flags  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.optim import gradient_buckets  # noqa: E402
from toolkit.optim.gradient_buckets import GradientBuckets  # noqa: E402
from toolkit.runtime import distributed, signals  # noqa: E402
from toolkit.runtime.distributed import World  # noqa: E402
from toolkit.training import trainer  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402

LOW, SHORT = ("--model.dtype", "bfloat16"), ("--train.reduce_dtype", "bfloat16")
ADAPTERS = json.dumps({"lora": {"select": "last:3", "rank": 4}})
ROWS = json.dumps({"rows": {"select": ["embeddings"], "from": 5, "to": 90}})
PHASES = json.dumps([{"train": ["last:1"], "until_step": 3}])
CASES: dict[str, tuple[str, ...]] = {
    "float32": ("--train.gradient_checkpointing", "on"),
    "accumulated": ("--train.micro_batch_tokens", "500", "--train.gradient_accumulation_steps", "4"),
    "tied": ("--mask.train", "last:2", "head", "--mask.tied", "both"),
    "adapters": ("--mask.train", ADAPTERS, "head", "--mask.tied", "untie"),
    "rows": ("--mask.train", ROWS, "last:2", "--mask.tied", "both", "--optim.name", "adamw_8bit"),
    "schedule": ("--mask.schedule", PHASES),
    "bfloat16 in float32": LOW,
    "bfloat16": (*LOW, *SHORT),
    "bfloat16 accumulated": (*LOW, *SHORT, "--train.gradient_accumulation_steps", "2"),
    "float32 in bfloat16": SHORT,
}
"""Flags of each case, on two ranks; one rank trains them with twice the micro batches."""


def case_flags(folder: Path, name: str, ranks: int) -> list[str]:
    """Flags of a case on so many ranks."""
    given = tiny_flags(
        folder / "model", folder / f"{name} {ranks}", "--data.path", folder / "odd.jsonl", "--train.max_steps", 6,
        "--prefix.cache", "off", *CASES[name],
    )  # fmt: skip
    if ranks == 1:
        key = "--train.gradient_accumulation_steps"
        before = int(given[given.index(key) + 1]) if key in given else 1
        given += [key, str(2 * before)]
    return given


class Watch:
    """Notes how many buckets were taken while the last backward pass of each step ran, and how many there are."""

    def __init__(self) -> None:
        self.early: list[int] = []
        self.buckets: list[int] = []
        take = GradientBuckets._take

        def watched(buckets: GradientBuckets, all_left: bool = False) -> None:
            if all_left and buckets._is_last:
                self.early.append(buckets._next)
                self.buckets.append(len(buckets._buckets))
            take(buckets, all_left)

        GradientBuckets._take = watched  # type: ignore[method-assign]


def run(name: str, folder: Path, world: World, watch: Watch) -> dict[str, Any]:
    """Train a case, and return what was seen on this rank."""
    invocation = flags.parse(
        flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", case_flags(folder, name, world.size)
    )
    step, before = trainer.train_step, []

    def marked(*given: Any) -> Any:
        before.append(collectives.seen.copy())
        return step(*given)

    watch.early, watch.buckets = [], []
    trainer.train_step = marked
    try:
        with signals.record_signals({}), Collectives() as collectives:
            assert train_in_group(invocation, world) == 0
    finally:
        trainer.train_step = step
    steps = [dict(later - earlier) for earlier, later in pairwise(before)]
    return {"early": watch.early, "buckets": watch.buckets, "steps": steps}


def uneven(world: World) -> bool:
    """Whether gradients add up where the second rank has a pass less, which reaches a layer less."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
    parameters, passes = list(layers.parameters()), 3 - world.rank
    buckets, own = GradientBuckets(parameters, torch.float32), [torch.zeros_like(p) for p in parameters]
    for number in range(passes):
        states = torch.full((2, 8), 1.0 + number)
        for index, layer in enumerate(layers):
            states = states if world.rank and index == 2 else layer(states)
        loss = states.square().sum()
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        own = [a if b is None else a + b for a, b in zip(own, found, strict=True)]
        with buckets.collecting(is_last=number == passes - 1):
            loss.backward()
    summed, (first, second) = buckets.wait(), world.all_gather_object(own)
    return all(torch.equal(summed[p], a + b) for p, a, b in zip(parameters, first, second, strict=True))


def main() -> None:
    folder = Path(next(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
    world, watch = distributed.join_process_group(), Watch()
    gradient_buckets.BUCKET_BYTES = 2**14  # the tiny model would fit in one
    result: dict[str, Any] = {"uneven": world.all_gather_object(uneven(world))}
    for name in CASES:
        by_rank = world.all_gather_object(run(name, folder, world, watch))
        result[name] = {key: [of_rank[key] for of_rank in by_rank] for key in by_rank[0]}
    if world.is_main:
        (folder / "sums.json").write_text(json.dumps(result), encoding="utf-8")
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    main()
