"""What a step costs on one rank under DeepSpeed, beside the same step without it.

    python benchmarks/engines.py [--data ori_pqal.json] [--rounds 3] [--engines local zero1 zero2 zero3] [--save]

Each engine sets the same run up as launch/train.py does, in a process of its own, and takes the same steps with clocks
on their seams (benchmarks/seams.py); the engines take turns. SmolLM2-135M, top 4 blocks and untied head, batch 1. The
prefix and the data belong to no engine and are left out of the sums. A ratio compares the same step of the same round;
the table has medians. The operations are those of torch's profiler in three more steps. Exits 1 if one rank under
ZeRO-2 costs more than 1.5 times the step without it (1.1 times on a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import thread_variables  # noqa: E402
from benchmarks.report import bounds_text, gpu_name, head_lines, save, spread, table  # noqa: E402
from benchmarks.workload import Workload, add_flags, prepare  # noqa: E402

ENGINES = ("local", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
_LEFT_OUT = ("data", "prefix or cache read")


@dataclass(frozen=True)
class Round:
    """Times of one engine's steps, in seconds."""

    phases: dict[str, list[float]]
    """By phase, for each step after the warm-up."""
    update: dict[str, float]
    """A step's update, by kind of operation."""

    @property
    def steps(self) -> list[float]:
        """Return the seconds of each step, without data and prefix."""
        counted = [times for phase, times in self.phases.items() if phase not in _LEFT_OUT]
        return [sum(times) for times in zip(*counted, strict=True)]


def measure(engine: str, workload: Path, steps: int, folder: Path) -> Round:
    """Take the steps in this process."""
    from benchmarks.step_profile import WARM_UP, batches, measure_operations, measure_phases, set_up_run

    more = []
    if engine == "zero0":
        (folder / "zero0.json").write_text(json.dumps({"bf16": {"enabled": "auto"}}))
        more = ["--ds", str(folder / "zero0.json")]
    elif engine != "local":
        more = ["--ds", str(ROOT / "ds_configs" / f"{engine}.json")]
    trainer = set_up_run(Workload.read(workload), more, folder)
    upcoming = batches(trainer)
    seconds = measure_phases(trainer, upcoming, WARM_UP + steps)
    _, kinds = measure_operations(trainer, upcoming)
    return Round({phase: times[WARM_UP:] for phase, times in seconds.items()}, kinds)


def run(engine: str, workload: Path, steps: int, folder: Path) -> Round:
    """Take the steps in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", engine, str(workload), str(steps), str(folder)]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{engine} failed:\n{ended.stderr[-3000:]}")
    return Round(**json.loads((folder / "round.json").read_text()))


def report(rounds: dict[str, list[Round]]) -> tuple[str, dict[str, float]]:
    """Return the tables, and each engine's ratio to the step without DeepSpeed."""
    names = list(rounds)
    ratios = {
        name: [
            a / b
            for own, local in zip(rounds[name], rounds["local"], strict=True)
            for a, b in zip(own.steps, local.steps, strict=True)
        ]
        for name in names
    }

    def ms(values: Sequence[float]) -> str:
        return f"{median(values) * 1e3:.1f}"

    phases = [phase for phase in rounds["local"][0].phases if phase not in _LEFT_OUT]
    rows = [
        [phase, *(ms([t for one in rounds[name] for t in one.phases[phase]]) for name in names)] for phase in phases
    ]
    rows.append(["step", *(ms([t for one in rounds[name] for t in one.steps]) for name in names)])
    rows.append(["x local", *(f"{median(ratios[name]):.2f}" for name in names)])
    rows.append(["x local, round by round", *(_by_round(ratios[name], len(rounds[name])) for name in names)])
    kinds = [
        [kind, *(ms([r.update[kind] for r in rounds[name]]) for name in names)] for kind in rounds["local"][0].update
    ]
    text = "\n\n".join(
        [table(["ms a step", *names], rows), table(["of the update, by operation: ms a step", *names], kinds)]
    )
    return text, {name: median(values) for name, values in ratios.items()}


def _by_round(ratios: Sequence[float], rounds: int) -> str:
    size = len(ratios) // rounds
    return spread([median(ratios[i * size : (i + 1) * size]) for i in range(rounds)], ".2f")


def main() -> int:
    """Measure in turns, print one table, check the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, epochs=1)
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine runs; default: 3")
    parser.add_argument("--steps", type=int, default=12, help="steps that count, of a round; default: 12")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=("local", "zero1", "zero2", "zero3"))
    parser.add_argument("--threads", type=int, help="of each process; default: all cores")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    parser.add_argument("--one", nargs=4, metavar=("ENGINE", "WORKLOAD", "STEPS", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        engine, workload, steps, folder = given.one
        told = measure(engine, Path(workload), int(steps), Path(folder))
        (Path(folder) / "round.json").write_text(json.dumps(asdict(told)))
        return 0
    thread_variables(given.threads)
    names = [name for name in ENGINES if name in ("local", "zero2", *given.engines)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given)
        rounds: dict[str, list[Round]] = {engine: [] for engine in names}
        for _ in range(given.rounds):
            for engine in names:
                rounds[engine].append(run(engine, folder / "workload.json", given.steps, folder))
    tables, ratios = report(rounds)
    most = 1.1 if gpu_name() else 1.5
    bounds = {f"one rank under ZeRO-2 costs at most {most} x the step without DeepSpeed": ratios["zero2"] <= most}
    text = f"{head_lines(f'; {given.rounds} rounds of {given.steps} steps')}\n{tables}\n\n{bounds_text(bounds)}"
    print(text)
    if given.save:
        save("engines", text)
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
