"""Compare the loss by Triton's kernels, run by its interpreter, with float64; print one JSON line a case.

TRITON_INTERPRET=1 python tests/cross_entropy_worker.py
"""

from __future__ import annotations

import json

import torch

from toolkit.split import cross_entropy_kernels, logit_tiles
from toolkit.split.supervised_loss import COLUMN_MULTIPLE, linear_cross_entropy

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
CASES = (
    (1, 49_153, FLOAT32, 1), (1, 49_153, BFLOAT16, 3), (3, 102_400, BFLOAT16, 1), (3, 102_400, FLOAT16, 3),
    (5, 2, FLOAT32, 1), (5, 2, FLOAT16, 2), (4097, 7, FLOAT32, 1), (9, 4096, FLOAT32, 3), (9, 4097, BFLOAT16, 1),
    (9, 4097, FLOAT32, 1), (0, 11, BFLOAT16, 1),
)  # fmt: skip
"""S positions, V tokens of the vocabulary, precision, tiles."""


def inputs(positions: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return hidden states, weight and bias as leaves, and targets with the first and the last class."""
    generator = torch.Generator().manual_seed(positions + vocabulary)
    shapes: tuple[tuple[int, ...], ...] = ((positions, 16), (vocabulary, 16), (vocabulary,))
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    targets[:1], targets[1:2] = vocabulary - 1, 0
    return leaves, targets


def outcome(leaves: list[torch.Tensor], targets: torch.Tensor, tile_bytes: int) -> list[torch.Tensor]:
    """Return the loss and the gradients of all leaves; the incoming gradient is negative and no power of two."""
    loss = linear_cross_entropy(*leaves, targets, tile_bytes=tile_bytes)
    return [loss.detach(), *torch.autograd.grad(loss * (-0.3 / max(1, len(targets))), leaves)]


def apart(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Return the relative 2-norm of each difference."""
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)) for a, b in pairs]


def columns(vocabulary: int, tiles: int) -> int:
    """Return the columns that tiles must have room for: as ``tile_width`` rounds them, where there are as many."""
    width = -(-vocabulary // tiles)
    return width + -width % COLUMN_MULTIPLE if width > COLUMN_MULTIPLE else width


def main() -> None:
    """Compare each shape, precision and number of tiles."""
    launches: list[str] = []
    for name in ("add_statistics", "replace_by_gradient"):
        kernel = getattr(cross_entropy_kernels, name)
        setattr(cross_entropy_kernels, name, lambda *args, k=kernel, n=name: (launches.append(n), k(*args)))
    logit_tiles.triton_trouble = lambda device: ""
    plain = logit_tiles.has_kernels
    for positions, vocabulary, dtype, tiles in CASES:
        leaves, targets = inputs(positions, vocabulary, dtype)
        tile_bytes = max(1, positions) * leaves[0].element_size() * columns(vocabulary, tiles)
        launches.clear()
        found = outcome(leaves, targets, tile_bytes)
        counted = {name: launches.count(name) for name in sorted(set(launches))}
        logit_tiles.has_kernels = lambda logits, processing: False
        without = outcome(leaves, targets, tile_bytes)
        exact = outcome([leaf.detach().double().requires_grad_() for leaf in leaves], targets, tile_bytes)
        logit_tiles.has_kernels = plain
        case = {"positions": positions, "vocabulary": vocabulary, "dtype": str(dtype), "tiles": tiles}
        print(json.dumps({**case, "launches": counted, "off": apart(found, exact), "plain": apart(without, exact)}))


if __name__ == "__main__":
    main()
