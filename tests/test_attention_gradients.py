"""Gradients of attention, some queries at a time: their values, and what is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.models.attention_gradients import QUERIES, attention_gradients, mark_attention, sdpa

SHAPES = [
    (1, 9, 3, 2 * QUERIES + 5, 64, 64),
    (2, 4, 4, QUERIES, 16, 8),
    (2, 6, 2, QUERIES + 1, 24, 24),
    (1, 3, 1, 2, 8, 8),
]
"""Rows, heads, key heads, tokens, size of keys, size of values."""


class Products(TorchDispatchMode):
    """Counts the scores that products compute, and the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


def states(rows: int, heads: int, key_heads: int, tokens: int, size: int, value_size: int) -> list[torch.Tensor]:
    """Query, key, value and a gradient of the output, laid out as models give them."""
    torch.manual_seed(0)
    kinds = ((heads, size), (key_heads, size), (key_heads, value_size), (heads, value_size))
    return [torch.randn(rows, tokens, h, width).bfloat16().transpose(1, 2) for h, width in kinds]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_are_the_exact_ones_rounded_once(shape: tuple[int, ...]) -> None:
    *inputs, gradient = states(*shape)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    output = scaled_dot_product_attention(*exact, is_causal=True, scale=0.3, enable_gqa=True)
    right = torch.autograd.grad(output, exact, gradient.double())
    ours = attention_gradients(gradient, *inputs, 0.3)
    for wanted, own in zip(right, ours, strict=True):
        assert (own.dtype, own.shape) == (torch.bfloat16, wanted.shape)
        assert (own - wanted).norm() <= (wanted.bfloat16() - wanted).norm() * 1.001


def test_queries_without_a_gradient_are_left_out_and_a_nan_is_not() -> None:
    *inputs, gradient = states(1, 2, 2, 5 * QUERIES, 16, 16)
    gradient[:, :, : 4 * QUERIES] = 0
    with Products() as counted:
        few = attention_gradients(gradient, *inputs, 0.25)
    assert counted.calls["aten::_softmax"] == 1
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    right = torch.autograd.grad(scaled_dot_product_attention(*exact, is_causal=True), exact, gradient.double())
    assert all((own - wanted).norm() <= 2e-3 * wanted.norm() for own, wanted in zip(few, right, strict=True))
    assert not few[0][:, :, : 4 * QUERIES].any()
    gradient[0, 0, 0, 0] = torch.nan
    assert attention_gradients(gradient, *inputs, 0.25)[0].isnan().any()


@pytest.fixture
def layer() -> nn.Module:
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.num_key_value_groups = 3  # type: ignore[assignment]
    mark_attention(module, in_float32=False, in_blocks=True)
    return module


def way_of(module: nn.Module, inputs: list[torch.Tensor], mask: torch.Tensor | None = None, **options: Any) -> str:
    """Name the function that differentiates what ``sdpa`` returns."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    node = sdpa(module, *leaves, mask, **options)[0].grad_fn  # type: ignore[arg-type]
    names = [type(node).__name__, type(node.next_functions[0][0]).__name__]  # type: ignore[union-attr]
    return next((name for name in names if "Attention" in name), names[0])


def test_the_forward_pass_is_torchs_own_and_its_scale_is_kept(layer: nn.Module) -> None:
    *inputs, gradient = states(1, 9, 3, 70, 64, 64)
    for scaling in (None, 0.3):
        found = []
        for blocks in (False, True):
            mark_attention(layer, in_float32=False, in_blocks=blocks)
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            output, _ = sdpa(layer, *leaves, None, scaling=scaling)  # type: ignore[arg-type]
            found.append([output, *torch.autograd.grad(output, leaves, gradient.transpose(1, 2))])
        assert torch.equal(found[0][0], found[1][0])
        for plain, own in zip(found[0][1:], found[1][1:], strict=True):
            assert not torch.equal(plain, own)
            assert (plain - own).norm() < 0.02 * plain.norm()


def test_only_causal_attention_of_bfloat16_without_a_mask_is_computed_so(layer: nn.Module) -> None:
    *inputs, _ = states(1, 9, 3, 40, 16, 16)
    assert way_of(layer, inputs) == "_BlockAttentionBackward"
    others = [
        way_of(layer, inputs, torch.ones(40, 40, dtype=torch.bool).tril()),
        way_of(layer, inputs, is_causal=False),
        way_of(layer, inputs, position_bias=torch.zeros(1, 9, 40, 40, dtype=torch.bfloat16)),
        way_of(layer, inputs, dropout=0.5),
        way_of(layer, [tensor.float() for tensor in inputs]),
        way_of(layer, [inputs[0][:, :, :8], *inputs[1:]]),
        way_of(layer, [tensor[:, :, :1] for tensor in inputs]),
    ]
    assert not any("_BlockAttention" in name for name in others)
    mark_attention(layer, in_float32=True, in_blocks=True)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    assert way_of(layer, inputs, mask) == "_Float32AttentionBackward"
    with torch.no_grad():
        assert sdpa(layer, *inputs, None)[0].grad_fn is None  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["attention_mask", "position_bias"])
def test_what_the_model_adds_to_the_scores_gets_its_gradient(layer: nn.Module, what: str) -> None:
    """Inkling computes a bias of the positions, and learns through it."""
    *inputs, gradient = states(1, 9, 3, 20, 16, 16)
    for in_float32 in (False, True):
        mark_attention(layer, in_float32, in_blocks=True)
        added = torch.zeros(1, 9, 20, 20, dtype=torch.bfloat16, requires_grad=True)
        output, _ = sdpa(layer, *inputs, **{"attention_mask": None, what: added})  # type: ignore[arg-type]
        output.backward(gradient.transpose(1, 2))
        assert added.grad is not None
        assert added.grad.any()


def test_a_scale_of_zero_is_no_missing_one(layer: nn.Module) -> None:
    *inputs, gradient = states(1, 9, 3, 20, 16, 16)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output, _ = sdpa(layer, *leaves, None, scaling=0.0)  # type: ignore[arg-type]
    d_query, d_key, d_value = torch.autograd.grad(output, leaves, gradient.transpose(1, 2))
    assert not d_query.any()
    assert not d_key.any()
    assert d_value.any()
