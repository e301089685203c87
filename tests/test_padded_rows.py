"""Linear layers of bfloat16 weights on a CPU meet few numbers of rows, whatever lengths the rows of the data have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import mask
from closeness import assert_rounded_alike
from helpers import run_script, tiny_flags, tiny_llama, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.models import padded_rows
from toolkit.models.padded_rows import ROW_MULTIPLE, PaddedLinear, pad_rows
from toolkit.models.quantised_linear import quantise_layer
from toolkit.training import gradient_choice


@pytest.mark.parametrize("rows", [1, ROW_MULTIPLE, ROW_MULTIPLE + 1, 77])
def test_a_padded_layer_gives_torchs_output_and_gradients(rows: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 80)
    found = []
    for kind in (nn.Linear, PaddedLinear):
        plain.__class__ = kind
        states = torch.linspace(-1, 1, rows * 48).reshape(1, rows, 48).requires_grad_()
        output = plain(states)
        assert output.shape == (1, rows, 80)
        found.append([output, *torch.autograd.grad(output.square().sum(), [states, plain.weight, plain.bias])])
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


class Products(TorchDispatchMode):
    """Records the shapes of the left factors of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(args[func is torch.ops.aten.addmm.default].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [nn.Linear, PaddedLinear])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantised_layer_pads_in_backward_as_in_forward(precision: Any, kind: type[nn.Linear]) -> None:
    """Ten lengths make two shapes of each factor, where the plain layer pads; else each its own."""
    layer = nn.Linear(64, 96, bias=False).bfloat16().requires_grad_(False)
    layer.__class__ = kind
    quantise_layer(layer, precision)
    lengths = range(40, 90, 5)
    with Products() as products:
        for length in lengths:
            layer(torch.ones(1, length, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert len(products.shapes) == 2 * len(lengths)
    expected = {64, 96} if kind is PaddedLinear else set(lengths)
    assert set(products.shapes) == {(rows, width) for rows in expected for width in (64, 96)}


def test_all_layers_of_a_model_are_padded_but_its_head() -> None:
    model = tiny_llama()
    pad_rows(model)
    assert type(model.lm_head) is nn.Linear
    assert sum(type(module) is PaddedLinear for module in model.modules()) == 6 * 7


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of rows that the products of padded layers see, where they are more than are left alone."""
    seen: set[int] = set()
    pad: Callable[..., torch.Tensor] = nn.functional.pad

    def count(states: torch.Tensor, *args: Any) -> torch.Tensor:
        padded = pad(states, *args)
        if states.dim() == 2:
            seen.add(len(padded))
        return padded

    monkeypatch.setattr(padded_rows.nn.functional, "pad", count)
    return seen


@pytest.mark.parametrize("entry", ["last:2", {"lora": {"select": "last:2", "rank": 4}}], ids=["whole", "adapters"])
def test_a_run_in_bfloat16_on_a_cpu_pads_and_learns_the_same(
    entry: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: set[int]
) -> None:
    monkeypatch.setattr(gradient_choice, "float32_is_faster", lambda: False)
    for name in ("padded", "plain"):
        counted.clear()
        if name == "plain":
            monkeypatch.setattr(gradient_choice, "pad_rows", lambda model: None)
        flags = tiny_flags(tiny_model, tmp_path / name, "--train.epochs", 1, "--model.dtype", "bfloat16")
        assert train(*flags, *mask(entry)) == 0
        assert bool(counted) is (name == "padded")
        assert all(rows % ROW_MULTIPLE == 0 for rows in counted)
    assert_rounded_alike(tmp_path / "padded", tmp_path / "plain")


SHAPES = """
import ctypes, sys
import torch
from toolkit.commands.cli import set_up_memory

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

set_up_memory()
weights = [torch.ones(width, 64, dtype=torch.bfloat16) for width in (64, 96, 128, 160)]
for rows in range(32, 32 * 50, 32):
    for weight in weights:
        torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
    if rows == 32 * 10:
        before = resident()
print((resident() - before) / 2**20)
"""


def test_code_for_few_shapes_of_products_is_kept() -> None:
    """156 shapes would keep 0.25 MiB each in the cache that torch has beside oneDNN's own."""
    done = run_script("launch/train.py", launcher=(sys.executable, "-c", SHAPES))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 25
