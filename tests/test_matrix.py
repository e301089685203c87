"""One recipe, one global batch, every engine and split: the same steps and the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from closeness import BFLOAT16_LOSS, BFLOAT16_NORM, FAULTS
from helpers import ENGLISH, make_tiny_model, masters_of, metrics, run_ranks, tiny_flags, train
from matrix_worker import ACCUMULATIONS, ENGINES, FAULTY, GLOBAL_BATCH, PRECISIONS, RANKS, name_of
from safetensors.torch import load_file, save_file

from toolkit.checkpoint.catalog import latest_checkpoint

pytestmark = pytest.mark.distributed

STEPS = 24
SEEDS = (42, 1, 2)


class Cell(NamedTuple):
    """How one engine trained one split of the batch."""

    losses: torch.Tensor
    norms: torch.Tensor
    masters: dict[str, torch.Tensor]


def cell_of(run: Path) -> Cell:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    cell = Cell(torch.tensor(metrics(run)), torch.tensor(metrics(run, "grad_norm")), masters_of(checkpoint))
    assert len(cell.losses) == STEPS
    return cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights bfloat16 holds exactly, and 21 rows, so that the last step of an epoch is short."""
    folder = tmp_path_factory.mktemp("matrix")
    weights = make_tiny_model(folder / "model") / "model.safetensors"
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()
    (folder / "odd.jsonl").write_text("\n".join([*rows, rows[0]]), encoding="utf-8")
    return folder


def flags(folder: Path, run: str = "run") -> list[str]:
    return tiny_flags(folder / "model", folder / run, "--data.path", folder / "odd.jsonl", "--train.epochs", 4)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The folder with the runs of all cells."""
    for ranks in RANKS:
        result = run_ranks("tests/matrix_worker.py", folder, *flags(folder), ranks=ranks)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return folder


class Distance(NamedTuple):
    """Root mean squares of what two runs differ by."""

    loss: float
    norm: float
    """Of the gradient, relative."""
    weight: float

    def times(self, factor: float) -> Distance:
        return Distance(*(factor * own for own in self))

    def over(self, other: Distance) -> float:
        """The largest of the three in units of another distance's."""
        return max(own / most for own, most in zip(self, other, strict=True))


def apart(one: Cell, other: Cell) -> Distance:
    weights = [(one.masters[name] - master).flatten() for name, master in other.masters.items()]
    differences = (one.losses - other.losses, one.norms / other.norms - 1, torch.cat(weights))
    return Distance(*(float(each.double().square().mean().sqrt()) for each in differences))


@pytest.fixture(scope="module")
def allowed(folder: Path) -> dict[str, Distance]:
    """How far two runs may be apart that differ in rounding alone, by precision.

    What bfloat16 costs is taken from one process that splits nothing, beside its float32 run from the same weights,
    over all steps and weights of several orders of the rows. Of two runs with that error each, the difference is
    sqrt(2) times as large if nothing of it is shared. Float32 rounds 2^16 times finer; 2^8 lies in the middle, because
    a step of Adam does not get smaller with a gradient that is mostly rounding.
    """
    costs = []
    for seed in SEEDS:
        pair = []
        for precision in PRECISIONS:
            run = f"{precision}-{seed}"
            given = [*flags(folder, run), "--train.seed", str(seed), "--train.micro_batch_size", str(GLOBAL_BATCH)]
            assert train(*given, "--model.dtype", precision) == 0
            pair.append(cell_of(folder / run))
        costs.append(apart(*pair))
    cost = Distance(*(math.sqrt(sum(own**2 for own in kind) / len(SEEDS)) for kind in zip(*costs, strict=True)))
    return {"bfloat16": cost.times(math.sqrt(2)), "float32": cost.times(2**-8)}


def test_every_engine_and_split_has_the_same_steps_and_weights(
    trained: Path, allowed: dict[str, Distance], summarise: Callable[[str], None]
) -> None:
    lines, wrong = [f"allowed: {allowed}"], []
    for engine, precision, ranks, accumulation in product(ENGINES, PRECISIONS, RANKS, ACCUMULATIONS):
        plain = cell_of(trained / name_of("local", precision, 1, 1))
        found = apart(cell_of(trained / name_of(engine, precision, accumulation, ranks)), plain)
        share = found.over(allowed[precision])
        lines.append(f"{engine:14} {precision:9} {ranks:>5} {accumulation:>12} {share:>6.2f}  {found}")
        if share > 1:
            wrong.append(lines[-1])
    summarise("\n".join(lines))
    assert not wrong
    most = allowed["bfloat16"]
    assert (most.loss < BFLOAT16_LOSS, most.norm < BFLOAT16_NORM) == (True, True), "what other tests allow"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", FAULTY)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_gradient_that_is_not_the_token_mean_of_the_global_batch_is_out_of_bounds(
    trained: Path, allowed: dict[str, Distance], fault: str, engine: str, precision: str
) -> None:
    plain = cell_of(trained / name_of("local", precision, 1, 1))
    found = apart(cell_of(trained / name_of(engine, precision, 2, 2, fault)), plain)
    print(fault, engine, precision, found, "allowed", allowed[precision])
    assert found.over(allowed[precision]) > 2
