"""Runs on every rank under a launcher: every optimizer under every ZeRO stage, saved and resumed. Not a test itself.

Arguments: OUTPUT.json, then the flags of launch/train.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import set_up  # noqa: E402

from toolkit.commands import cli  # noqa: E402
from toolkit.config import flags  # noqa: E402
from toolkit.data.batches import epoch_order, step_batches  # noqa: E402
from toolkit.mask.apply import apply_mask, trainable_parameters  # noqa: E402
from toolkit.optim.state_fragments import AdamState  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.runtime.distributed import World  # noqa: E402
from toolkit.training.context import prepare  # noqa: E402
from toolkit.training.step import train_step  # noqa: E402
from toolkit.training.trainer import Trainer  # noqa: E402

NAMES = ("adamw_8bit",)
STEPS, SAVED_AFTER = 4, 2
KINDS = ("master", "exp_avg", "exp_avg_sq")


def begin(given: list[str], world: World, masters: dict[str, torch.Tensor] | None = None) -> Trainer:
    """A run from its beginning, or from trained tensors that rank 0 has, as a resumed one."""
    invocation = flags.parse(flags.create_parser(""), ROOT / "recipes" / "quickstart.yaml", given)
    if masters is None:
        return set_up(invocation, world)
    context, model = prepare(invocation, world)
    (phase,) = context.schedule.phases
    apply_mask(model.loaded.model, phase.delta_mask, model.loaded.anatomy)
    masters = world.broadcast_object(masters)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model.loaded.model, phase.delta_mask).items():
            parameter.copy_(masters[name])
    trainer = Trainer(context, model, Path("unused"))
    trainer.begin(None)
    return trainer


def steps_of(trainer: Trainer, first: int, last: int) -> tuple[list[float], list[float | None]]:
    """Losses and moved shares of steps ``first`` to ``last``."""
    order = epoch_order(trainer.context.batch_plan.rows, 0, 0)
    losses, shares = [], []
    for index, batches in enumerate(
        step_batches(trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id)
    ):
        if first <= index < last:
            outcome = train_step(batches, trainer.state.prefix, trainer.state.engine, trainer.context.world)
            losses.append(outcome.loss)
            shares.append(outcome.moved_share)
    return losses, shares


def stored(trainer: Trainer) -> dict[str, int]:
    """Bytes of the optimizer's moments on this rank, and of its masters."""
    zero = trainer.state.engine._engine.optimizer
    three = hasattr(zero, "fp32_partitioned_groups_flat")
    masters = zero.fp32_partitioned_groups_flat if three else [p for p, _ in trainer.state.engine._partitions()]
    moments = [t for own in zero.optimizer.state.values() for key, t in own.items() if key != "step"]
    return {"masters": sum(t.nbytes for t in masters), "moments": sum(t.nbytes for t in moments)}


class Kept:
    """A rank's state as a checkpoint of the same layout keeps it."""

    def __init__(self, trainer: Trainer) -> None:
        self._step = trainer.state.engine.schedule_step
        self._parts = [
            ({kind: t.clone() for kind, t in f.state.read().items()}, f.state.updates,
             {key: t.clone() for key, t in f.state.raw().items()})
            for f in trainer.state.engine.fragments()
        ]  # fmt: skip

    def put_into(self, trainer: Trainer) -> None:
        for fragment, (values, updates, raw) in zip(trainer.state.engine.fragments(), self._parts, strict=True):
            fragment.state.write(values, updates)
            if raw:
                fragment.state.set_raw(raw)
        trainer.state.engine.continue_at(self._step)


def whole_state(trainer: Trainer) -> dict[str, AdamState]:
    return trainer.state.engine.states()


def one(given: list[str], world: World) -> dict[str, Any]:
    """Train, keep the state in the middle and train on; hand the state over as a phase does; train again from it."""
    whole = begin(given, world)
    before, _ = steps_of(whole, 0, SAVED_AFTER)
    middle, masters = Kept(whole), whole.state.engine.masters()
    after, shares = steps_of(whole, SAVED_AFTER, STEPS)
    given_over, bytes_stored = whole_state(whole), stored(whole)
    assert whole.plan is not None
    planned = {kind: whole.plan.memory.most[kind] for kind in bytes_stored}
    whole.state.engine.release()
    again = begin(given, world)
    again.state.engine.load_states(given_over, STEPS)
    taken = whole_state(again)
    again.state.engine.release()
    again = begin(given, world, masters)
    middle.put_into(again)
    resumed, _ = steps_of(again, SAVED_AFTER, STEPS)
    again.state.engine.release()
    return {
        "losses": before + after, "resumed": resumed, "shares": shares, "stored": bytes_stored, "planned": planned,
        "apart": {kind: apart(kind, given_over, taken) for kind in KINDS}, "engine": whole.state.engine.name,
    }  # fmt: skip


def apart(kind: str, first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest relative difference of a tensor; 0 on other ranks than rank 0, which have no state."""
    pairs = [(getattr(own, kind), getattr(second[name], kind)) for name, own in first.items()]
    return max((float((a - b).norm() / a.norm()) for a, b in pairs), default=0.0)


def main() -> None:
    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    output, *rest = [word for word in sys.argv[1:] if word not in local_rank]
    world = distributed.join_process_group(engine_needs_group=True)
    results = {}
    for config in sorted(Path(output).parent.glob("ds-*.json")):
        for name in NAMES:
            given = [*rest, "--optim.name", name, "--ds", str(config)]
            results[f"{config.stem.removeprefix('ds-')} {name}"] = one(given, world)
            if world.is_main:
                print("DONE", config.stem, name, results[f"{config.stem.removeprefix('ds-')} {name}"], flush=True)
    if world.is_main:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    world.barrier()
    distributed.leave_process_group()
    cli.exit_process(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
