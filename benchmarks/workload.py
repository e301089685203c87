"""What every contender trains on: one file with the model, the rows as token ids, and their order in each epoch.

Written by ``benchmarks/prepare.py``. Reading it needs nothing but Python, so a process of another environment can.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS, EPOCHS = 40, 3
SHAPES = ("tiny", "smollm2-135m", "exaone-2.4b", "larger-than-gpu")

Row = tuple[list[int], int]
"""Token ids, and the index of the first supervised one."""


@dataclass(frozen=True)
class Workload:
    """One training run, the same for all contenders."""

    model: str
    """Directory of a Llama whose head is a tensor of its own."""
    data: str
    """The rows as text, for the toolkit, which makes the same token ids of them."""
    rows: list[Row]
    orders: list[list[int]]
    """For each epoch, the order of the rows."""
    seed: int
    """The toolkit's ``train.seed``, from which ``orders`` follow."""
    learning_rate: float = 1e-5
    last: int = 4
    """Blocks that train, beside the head."""
    micro_batch: int = 1
    """Rows of a step; divides the rows of an epoch."""
    dtype: str = "bfloat16"
    validation: list[Row] = field(default_factory=list)
    """Rows whose loss a peer that knows how computes after each epoch."""

    @property
    def sequence(self) -> list[Row]:
        """Return the rows of all epochs in order."""
        return [self.rows[index] for order in self.orders for index in order]

    @property
    def warmup_steps(self) -> int:
        """Return a tenth of all steps, rounded up."""
        return -(-len(self.sequence) // self.micro_batch // 10)

    def trains(self, name: str, blocks: int) -> bool:
        """Return whether the tensor ``name`` of a Llama with ``blocks`` blocks trains."""
        words = name.split(".")
        return name == "lm_head.weight" or (words[1] == "layers" and int(words[2]) >= blocks - self.last)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Workload:
        """Read a workload that ``save`` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: [(ids, start) for ids, start in values[name]] for name in ("rows", "validation")}
        return Workload(**{**values, **rows})


def add_flags(parser: argparse.ArgumentParser, epochs: int = EPOCHS) -> None:
    """Add the flags that choose a workload; ``flags`` gives them back."""
    parser.add_argument("--data", type=Path, help="PubMedQA's ori_pqal.json; default: the English sample rows")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows from the start of the file; default: {ROWS}")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"passes over the rows; default: {epochs}")
    parser.add_argument(
        "--shape", choices=SHAPES, help="a model of random weights of this shape; default: the bundled SmolLM2-135M"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer of such a model; default: the bundled one")


def flags(arguments: argparse.Namespace) -> list[str]:
    """Return the command line that ``add_flags`` parses to ``arguments``."""
    names = ("data", "rows", "epochs", "shape", "tokenizer")
    return [word for name in names if (value := getattr(arguments, name)) for word in (f"--{name}", str(value))]


def prepare(folder: Path, arguments: argparse.Namespace, *more: str) -> Workload:
    """Have ``benchmarks/prepare.py`` write the workload of ``add_flags`` into ``folder``, and return it.

    In a process of its own, so that the caller stays small (see ``benchmarks.process.run_process``).
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "prepare.py"), str(folder), *flags(arguments), *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Workload.read(folder / "workload.json")


def shown_command(words: list[str] | None = None) -> str:
    """Return the command line with paths shortened to their last part, for a report."""
    words = sys.argv if words is None else words
    shown = [Path(word).name if "/" in word else word for word in words[1:]]
    return " ".join(["python", f"benchmarks/{Path(words[0]).name}", *shown])
