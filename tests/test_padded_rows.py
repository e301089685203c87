"""Linear layers of bfloat16 weights on a CPU meet few numbers of rows, whatever lengths the rows of the data have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import mask
from closeness import assert_rounded_alike
from helpers import tiny_flags, tiny_llama, train
from torch import nn

from toolkit.models import padded_rows
from toolkit.models.padded_rows import ROW_MULTIPLE, PaddedLinear, pad_rows
from toolkit.training import context


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
    monkeypatch.setattr(context, "float32_is_faster", lambda *_: False)
    for name in ("padded", "plain"):
        counted.clear()
        if name == "plain":
            monkeypatch.setattr(context, "pad_rows", lambda model: None)
        flags = tiny_flags(tiny_model, tmp_path / name, "--train.epochs", 1, "--model.dtype", "bfloat16")
        assert train(*flags, *mask(entry)) == 0
        assert bool(counted) is (name == "padded")
        assert all(rows % ROW_MULTIPLE == 0 for rows in counted)
    assert_rounded_alike(tmp_path / "padded", tmp_path / "plain")
