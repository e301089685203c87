"""Runs on every rank under a launcher: train, and write down the collectives of each step. Not a test itself.

Arguments: OUTPUT.json, then the flags of launch/train.py.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.runtime import distributed, signals  # noqa: E402
from toolkit.training import trainer  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives by name and precision."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kinds = {str(leaf.dtype) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            self.seen[" ".join([func._schema.name, *sorted(kinds)])] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    output, *rest = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    invocation = flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", rest)
    world = distributed.join_process_group()
    step, before = trainer.train_step, []

    def marked(*args: Any) -> Any:
        before.append(collectives.seen.copy())
        return step(*args)

    trainer.train_step = marked
    with signals.record_signals({}), Collectives() as collectives:
        code = train_in_group(invocation, world)
    if world.is_main:
        steps = [dict(later - earlier) for earlier, later in pairwise(before)]
        Path(output).write_text(json.dumps(steps), encoding="utf-8")
    distributed.leave_process_group()
    cli.exit_process(code)


if __name__ == "__main__":
    main()
