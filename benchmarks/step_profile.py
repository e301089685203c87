"""Where a training step goes, beside what this machine needs for its arithmetic and for the traffic of its update.

    python benchmarks/step_profile.py [--steps 12] [--save] [--shape NAME | --data ori_pqal.json --rows 12 ...]
        [any flag of launch/train.py, after --]

It sets a run up as launch/train.py does (toolkit.training.context.prepare) and takes its training steps
(toolkit.training.step.train_step) with clocks on their seams; no line of the step is repeated here. Phases are medians
over the steps after the first two. Operations are counted by torch's profiler in a few more steps and take a little
longer there. The floors: the floating point operations of the suffix, forward and backward, at the best rate of the
model's own matrix products, and the bytes an update must touch at the bandwidth of a += b.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.contenders import recipe_flags, thread_variables  # noqa: E402
from benchmarks.floors import UPDATE_BYTES, Products, measure_products, memory_bandwidth  # noqa: E402
from benchmarks.report import head_lines, save, table  # noqa: E402
from benchmarks.seams import PHASES, Seams, update_kinds  # noqa: E402
from benchmarks.workload import Workload, add_flags, prepare  # noqa: E402
from toolkit.commands.cli import set_up_memory  # noqa: E402
from toolkit.config import flags as recipe  # noqa: E402
from toolkit.data.batches import Batch, epoch_order, step_batches  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.training.context import prepare as prepare_run  # noqa: E402
from toolkit.training.step import train_step  # noqa: E402
from toolkit.training.trainer import Trainer  # noqa: E402

WARM_UP, PROFILED = 2, 3


@dataclass(frozen=True)
class Floors:
    """Lower bounds of a step's time on this machine."""

    flops: float
    """Floating point operations of suffix forward and backward, a step."""
    products: Products
    update_bytes: float
    bandwidth: float


def set_up_run(workload: Workload, more: Sequence[str], folder: Path) -> Trainer:
    """Set up a run on ``workload``, with ``more`` flags of launch/train.py."""
    set_up_memory()
    given = [
        "--model.name_or_path", workload.model, "--data.path", workload.data, "--data.validation", "none",
        "--mask.train", f"last:{workload.last}", "head", "--train.epochs", str(len(workload.orders)), *more,
    ]  # fmt: skip
    if "--prefix.cache_dir " in recipe_flags():
        given += ["--prefix.cache_dir", str(folder / "cache")]
    invocation = recipe.parse(recipe.create_parser(__doc__ or ""), ROOT / "recipes" / "quickstart.yaml", given)
    world = distributed.join_process_group(engine_needs_group=invocation.deepspeed is not None)
    trainer = Trainer(*prepare_run(invocation, world), folder)
    trainer.begin(None)
    return trainer


def batches(trainer: Trainer) -> Iterator[list[Batch]]:
    """Yield the micro batches of each step, in the order of a run."""
    for epoch in range(trainer.context.config.train.epochs):
        order = epoch_order(trainer.context.batch_plan.rows, trainer.context.config.train.seed, epoch)
        yield from step_batches(
            trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id
        )


def measure_phases(trainer: Trainer, upcoming: Iterator[list[Batch]], steps: int) -> dict[str, list[float]]:
    """Return the seconds of every phase in each of ``steps`` steps."""
    with Seams(trainer) as seams:
        for _ in range(steps):
            seams.begin()
            micro = next(upcoming)
            seams.mark("data")
            train_step(micro, trainer.state.prefix, trainer.state.engine, trainer.context.world)
            seams.mark("sync and checks")
    return seams.seconds


def measure_operations(trainer: Trainer, upcoming: Iterator[list[Batch]]) -> tuple[list[list[str]], dict[str, float]]:
    """Return the costliest operations (name, calls and ms a step), and the update's seconds a step by kind."""
    on_gpu = trainer.context.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    micro = [next(upcoming) for _ in range(PROFILED)]
    with Seams(trainer), profile(activities=activities, acc_events=True) as profiled:
        for batch in micro:
            train_step(batch, trainer.state.prefix, trainer.state.engine, trainer.context.world)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profiled.key_averages() if event.key.startswith("aten::")]
    events.sort(key=lambda event: float(getattr(event, attribute)), reverse=True)
    rows = [
        [event.key, f"{event.count / PROFILED:.0f}", f"{getattr(event, attribute) / PROFILED / 1e3:.1f}"]
        for event in events[:12]
    ]
    kinds = update_kinds(profiled.events() or [], attribute)
    return rows, {kind: seconds / PROFILED for kind, seconds in kinds.items()}


def measure_floors(trainer: Trainer, micro: list[Batch], trained: int) -> Floors:
    """Count the arithmetic of one step, and measure this machine."""
    with FlopCounterMode(display=False) as counter, Seams(trainer, counter) as seams:
        train_step(micro, trainer.state.prefix, trainer.state.engine, trainer.context.world)
    suffix = trainer.state.suffix
    head = suffix.model.get_submodule(suffix.anatomy.head)
    supervised, tokens = sum(len(b.targets) for b in micro), sum(b.input_ids.numel() for b in micro)
    linear = [m for m in suffix.model.modules() if isinstance(m, torch.nn.Linear)]
    layers = [(m, supervised if m is head else tokens) for m in linear if m.weight.requires_grad]
    device = trainer.context.world.device
    return Floors(
        seams.suffix_flops, measure_products(layers, device), UPDATE_BYTES * trained, memory_bandwidth(device)
    )


def report(
    seconds: dict[str, list[float]], operations: list[list[str]], kinds: dict[str, float], floors: Floors
) -> str:
    """Format the four tables."""
    typical = {phase: sorted(times)[len(times) // 2] for phase in PHASES if (times := seconds[phase][WARM_UP:])}
    total = sum(typical.values())
    rows = [[name, f"{value * 1e3:.1f}", f"{value / total:.0%}"] for name, value in typical.items()]
    rows.append(["step", f"{total * 1e3:.1f}", "100%"])
    products = floors.products
    arithmetic, traffic = floors.flops / products.best_rate, floors.update_bytes / floors.bandwidth
    floor_rows = [
        ["products of the trained layers: forward", f"{products.forward * 1e3:.1f}"],
        ["products: gradient of the input", f"{products.input_gradient * 1e3:.1f}"],
        ["products: gradient of the weight", f"{products.weight_gradient * 1e3:.1f}"],
        [f"arithmetic: {floors.flops / 1e9:.1f} GFLOP at {products.best_rate / 1e9:.0f} GFLOP/s",
         f"{arithmetic * 1e3:.1f}"],
        [f"traffic of the update: {floors.update_bytes / 1e9:.2f} GB at {floors.bandwidth / 1e9:.1f} GB/s",
         f"{traffic * 1e3:.1f}"],
        ["both floors", f"{(arithmetic + traffic) * 1e3:.1f}"],
        ["step / both floors", f"{total / (arithmetic + traffic):.1f}x"],
    ]  # fmt: skip
    parts = sum(kinds.values()) or 1.0
    update_rows = [[kind, f"{value * 1e3:.1f}", f"{value / parts:.0%}"] for kind, value in kinds.items()]
    return "\n\n".join(
        [
            table(["phase", "ms", "share"], rows),
            table(["of the update, by operation", "ms", "share"], update_rows),
            table(["floor, measured alone on this machine", "ms"], floor_rows),
            table(["operation", "calls a step", "ms a step"], operations),
        ]
    )


def main() -> int:
    """Set up, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, epochs=2)
    parser.add_argument("--steps", type=int, default=12, help="steps with clocks; the first two do not count")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    parser.add_argument("recipe", nargs="*", help="flags of launch/train.py, after --")
    given = parser.parse_args()
    needed = given.steps + PROFILED + 1
    if given.steps <= WARM_UP or given.rows * given.epochs < needed:
        parser.error(
            f"--steps {given.steps} needs more than {WARM_UP} steps and {needed} rows over all epochs; "
            f"got {given.rows} rows x {given.epochs} epochs"
        )
    thread_variables(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = set_up_run(prepare(folder, given), given.recipe, folder)
        upcoming = batches(trainer)
        seconds = measure_phases(trainer, upcoming, given.steps)
        operations, kinds = measure_operations(trainer, upcoming)
        trained = sum(p.numel() for p in trainer.state.suffix.model.parameters() if p.requires_grad)
        floors = measure_floors(trainer, next(upcoming), trained)
    shape = given.shape or "SmolLM2-135M"
    tokens = sum(len(example.token_ids) for example in trainer.context.dataset.train) / len(
        trainer.context.dataset.train
    )
    above = head_lines(f"; {shape}, {trained / 1e6:.1f} M parameters train, rows of {tokens:.0f} tokens on average")
    text = f"{above}\n{report(seconds, operations, kinds, floors)}"
    print(text)
    if given.save:
        save(f"step-profile{f'-{given.shape}' if given.shape else ''}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
