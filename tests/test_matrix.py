"""One recipe, one global batch, every engine and split: the same steps and the same weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import ENGLISH, masters_of, metrics, run_script, tiny_flags
from matrix_worker import ACCUMULATIONS, ENGINES, PRECISIONS, RANKS, name_of

from toolkit.checkpoint.catalog import latest_checkpoint

pytestmark = pytest.mark.distributed

STEPS = 36


class Cell(NamedTuple):
    """How one engine trained one split of the batch."""

    losses: list[float]
    masters: dict[str, torch.Tensor]


Cells = dict[tuple[str, str, int, int], Cell]


@pytest.fixture(scope="module")
def cells(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """All cells: by engine, precision, ranks and accumulation. 21 rows, so that the last step of an epoch is short."""
    folder = tmp_path_factory.mktemp("matrix")
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()
    (folder / "odd.jsonl").write_text("\n".join([*rows, rows[0]]), encoding="utf-8")
    flags = tiny_flags(tiny_model, folder, "--data.path", folder / "odd.jsonl", "--train.epochs", 6)
    for ranks in RANKS:
        launcher = ("deepspeed", "--num_gpus", str(ranks))
        result = run_script("tests/matrix_worker.py", folder, *flags, launcher=launcher)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    found = {}
    for engine, precision, ranks, accumulation in product(ENGINES, PRECISIONS, RANKS, ACCUMULATIONS):
        run = folder / name_of(engine, precision, accumulation, ranks)
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None
        masters = masters_of(checkpoint)
        found[engine, precision, ranks, accumulation] = Cell(metrics(run), masters)
    return found


def apart(one: Cell, other: Cell) -> tuple[float, float]:
    """Largest differences of a step's loss and of a trained weight."""
    loss = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    return loss, max(float((one.masters[name] - master).abs().max()) for name, master in other.masters.items())


def test_every_engine_and_split_has_the_same_steps_and_weights(
    cells: Cells, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = cells["local", "float32", 1, 1]
    rounding = apart(cells["local", "bfloat16", 1, 1], plain)
    """What bfloat16 costs one process that splits nothing."""
    allowed = {"float32": (1e-5, 2e-5), "bfloat16": rounding}
    lines, wrong = [], []
    for (engine, precision, ranks, accumulation), cell in cells.items():
        assert len(cell.losses) == STEPS
        found = apart(cell, cells["local", precision, 1, 1])
        lines.append(f"{engine:14} {precision:9} {ranks:>5} {accumulation:>12} {found[0]:>10.1e} {found[1]:>10.1e}")
        if any(own > most for own, most in zip(found, allowed[precision], strict=True)):
            wrong.append(lines[-1])
    with capsys.disabled():
        head = "precision ranks accumulation loss apart weight apart, over"
        print(f"\n{'engine':14} {head} {STEPS} steps from local 1 x 1")
        print("\n".join(lines))
        print(f"allowed: float32 {allowed['float32']}, bfloat16 {rounding[0]:.1e} {rounding[1]:.1e}, its own rounding")
    assert not wrong
