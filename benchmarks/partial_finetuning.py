"""What partial fine-tuning costs: the toolkit and its peers on the same rows, in the same order, under the same mask.

    python benchmarks/partial_finetuning.py --data PATH/TO/ori_pqal.json [--rounds 3] [--save]
        [--trl-python ENV/bin/python] [--llamafactory-python ENV/bin/python] [--contenders NAME ...]

Each contender trains the top four blocks and the untied head of SmolLM2-135M (or of a --shape of random weights) in a
process of its own: bfloat16, batch 1, AdamW 1e-5, 10 % linear warmup, linear decay, clipping at 1.0. A round runs
each once; the order rotates from round to round. The table gives the median and the range over the rounds:

    run            seconds from the start of the first step, or of the filling of the cache, to the end of the last
                   step, with all that happens in between (data, logging, the toolkit's checkpoints between epochs)
    first, later   seconds of the first epoch, with the filling of the cache, and of a later one, each from the start
                   of its first step to the end of its last
    process        seconds from the start of the process to its end, with imports, loading and set-up
    peak           most memory: resident (ru_maxrss), or held on the GPU where there is one
    x              the masters loop divided by this contender, within a round

Exits 1 if a bound is missed. With --shape, only the bounds on the losses count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import (  # noqa: E402
    DoesNotFitError,
    Outcome,
    importable,
    outcome_columns,
    outcome_row,
    ratio,
    recipe_flags,
    run_peer,
    run_toolkit,
    thread_variables,
)
from benchmarks.record import SAME_LEARNING, rms  # noqa: E402
from benchmarks.report import bounds_text, head_lines, save, table  # noqa: E402
from benchmarks.workload import Workload, add_flags, prepare  # noqa: E402

MASTERS = "plain loop, fp32 masters"
COLD, WARM = "frostline, cold cache", "frostline, warm cache"
TRAINER_CHECKPOINTED, LLAMA_FACTORY = "Trainer, checkpointing", "LLaMA-Factory freeze"

NAMES = {
    "cold": COLD, "warm": WARM, "int8": "frostline, int8 prefix", "nf4": "frostline, nf4 prefix",
    "plain": "plain loop, bf16 AdamW", "masters": MASTERS, "trainer": "Trainer",
    "trainer-checkpointing": TRAINER_CHECKPOINTED, "trl": "TRL SFTTrainer",
    "trl-checkpointing": "TRL SFTTrainer, checkpointing", "llamafactory": LLAMA_FACTORY,
    "llamafactory-checkpointing": "LLaMA-Factory freeze, checkpointing",
}  # fmt: skip
"""What ``--contenders`` takes, and how the table calls it."""

PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("plain.py", ()),
    "masters": ("plain.py", ("--fp32-masters",)),
    "trainer": ("trainer.py", ()),
    "trl": ("trl_sft.py", ()),
    "llamafactory": ("llama_factory.py", ()),
}

Result = Outcome | str
"""A run, or why there is none."""


class Field:
    """All contenders on one workload."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, workload: Workload) -> None:
        self._pythons = {"trl": arguments.trl_python, "llamafactory": arguments.llamafactory_python}
        self._folder, self._runs = folder, 0
        self._keys = recipe_flags()
        self._cache: Path | None = None
        self._placed = ("--prefix.placement", "cpu") if arguments.shape == "larger-than-gpu" else ()
        self._workload = workload

    def run(self, name: str) -> Result:
        """Run contender ``name`` of ``NAMES`` once."""
        self._runs += 1
        try:
            return self._toolkit(name) if name in ("cold", "warm", "int8", "nf4") else self._peer(name)
        except DoesNotFitError:
            return "out of memory"

    def _has(self, key: str) -> bool:
        return f"--{key} " in self._keys

    def _scratch(self) -> Path:
        return self._folder / f"run-{self._runs}"

    def _toolkit(self, name: str) -> Result:
        cached = self._has("prefix.cache") and self._has("prefix.cache_dir")
        if (name == "warm" and not cached) or (name in ("int8", "nf4") and not self._has("prefix.precision")):
            return "not in this version"
        if self._placed and not self._has("prefix.placement"):
            return "needs prefix.placement"
        if name == "warm" and self._cache is None:
            self._toolkit("cold")
            self._runs += 1
        cache = self._folder / f"cache-{self._runs}" if name != "warm" else self._cache
        given = ("--prefix.cache", "on", "--prefix.cache_dir", str(cache)) if cached else ()
        precision = ("--prefix.precision", name) if name in ("int8", "nf4") else ()
        outcome = run_toolkit(self._workload, self._scratch(), *given, *precision, *self._placed)
        if name == "cold":
            self._cache = cache
        return outcome

    def _peer(self, name: str) -> Result:
        base, _, checkpointed = name.partition("-")
        script, switches = PEERS[base]
        python = self._pythons.get(base) or sys.executable
        if base in self._pythons and not importable(python, base):
            return "not installed"
        switches += ("--checkpointing",) if checkpointed else ()
        return run_peer(self._folder / "workload.json", self._scratch(), script, switches, python)


def compare(field: Field, names: list[str], rounds: int) -> dict[str, list[Result]]:
    """Run every contender once a round, the order rotated by one each time."""
    results: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if results[name] and isinstance(results[name][0], str):
                continue  # what cannot run once is not tried again
            result = field.run(name)
            results[name].append(result)
            shown = result if isinstance(result, str) else f"run {result.run:.1f} s"
            print(f"round {number + 1}: {NAMES[name]}: {shown}", file=sys.stderr, flush=True)
    return results


def result_table(results: dict[str, list[Result]], epochs: int) -> str:
    """Format one row for each contender; ratios are medians of those within a round."""
    base = [result for result in results.get("masters", []) if isinstance(result, Outcome)]
    columns = outcome_columns(epochs)
    rows = []
    for name, runs in results.items():
        outcomes = [result for result in runs if isinstance(result, Outcome)]
        missing = [NAMES[name], str(runs[0]), *[""] * (len(columns) - 2)]
        rows.append(outcome_row(NAMES[name], outcomes, base) if outcomes else missing)
    return table(columns, rows)


def bounds(results: dict[str, list[Result]], speed: bool) -> dict[str, bool]:
    """Return whether each claim about the contenders that ran holds."""
    ran = {NAMES[name]: [r for r in runs if isinstance(r, Outcome)] for name, runs in results.items()}
    ran = {name: runs for name, runs in ran.items() if runs}
    found: dict[str, bool] = {}
    trained = {outcome.record.trainable for runs in ran.values() for outcome in runs}
    found[f"all train the same number of parameters ({', '.join(f'{n:,}' for n in sorted(trained))})"] = (
        len(trained) == 1
    )
    if COLD in ran and MASTERS in ran:
        apart = rms(ran[COLD][0].record.losses, ran[MASTERS][0].record.losses)
        found[f"step losses within {SAME_LEARNING} of the masters loop's (root mean square {apart:.4f})"] = (
            apart <= SAME_LEARNING
        )
    if COLD in ran and WARM in ran:
        first, *others = (run.record.losses for run in (*ran[COLD], *ran[WARM]))
        if torch.cuda.is_available():  # where the backward pass of flash attention adds up in no fixed order
            apart = max(rms(first, losses) for losses in others)
            found[f"losses with cold and warm cache within {SAME_LEARNING} (root mean square {apart:.4f})"] = (
                apart <= SAME_LEARNING
            )
        else:
            found["every loss is bit-identical between cold and warm cache"] = all(other == first for other in others)
    claims: list[tuple[str, str, float, str, Callable[[Outcome], float]]] = [
        (COLD, MASTERS, 2.5, "run", lambda o: o.run), (COLD, LLAMA_FACTORY, 2.5, "run", lambda o: o.run),
        (COLD, TRAINER_CHECKPOINTED, 5.0, "run", lambda o: o.run),
        (COLD, MASTERS, 3.0, "later epoch", lambda o: o.later_epoch),
        (WARM, MASTERS, 3.0, "first epoch", lambda o: o.first_epoch),
        (WARM, MASTERS, 2.0, "peak memory", lambda o: o.peak_bytes),
    ]  # fmt: skip
    for ours, other, factor, what, measure in claims if speed else []:
        if ours in ran and other in ran:
            times = ratio(ran[other], ran[ours], measure)
            found[f"{what}: {ours} {factor}x below {other} (measured {times:.2f}x)"] = times >= factor
    return found


def main() -> int:
    """Prepare the workload, run the rounds, print and save the table, check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--rounds", type=int, default=1, help="how often each contender runs; default: 1")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME",
                        help=f"which run, of {', '.join(NAMES)}; default: all")  # fmt: skip
    parser.add_argument("--threads", type=int, help="threads of each process; default: one a core")
    parser.add_argument("--trl-python", help="a Python that has trl; default: this one")
    parser.add_argument("--llamafactory-python", help="a Python that has llamafactory; default: this one")
    parser.add_argument("--directory", type=Path, help="where models, caches and runs go; default: a temporary one")
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results/")
    given = parser.parse_args()
    thread_variables(given.threads)
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        field = Field(given, Path(folder), prepare(Path(folder), given))
        results = compare(field, given.contenders, given.rounds)
    name = given.shape or "SmolLM2-135M"
    above = head_lines(f"; {name}, {given.rows} rows, {given.epochs} epochs, {given.rounds} rounds")
    held = bounds(results, speed=given.shape is None)
    text = f"{above}\n{result_table(results, given.epochs)}\n\n{bounds_text(held)}"
    print(text)
    if given.save:
        save(f"partial-finetuning{f'-{given.shape}' if given.shape else ''}", text)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
