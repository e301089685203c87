from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_rounded_alike
from helpers import make_tiny_model, metrics, tiny_flags, tiny_llama, train
from torch import nn

from toolkit import evaluate, generate
from toolkit.activation_cache.packing import set_attention
from toolkit.mask.adapters import Adapter
from toolkit.mask.apply import add_adapters
from toolkit.models import float32_gradients
from toolkit.models.attention_gradients import mark_attention, sdpa
from toolkit.models.float32_gradients import (
    FEWEST_ROWS,
    Float32Linear,
    has_float32_forward,
    use_faster_forward,
    use_float32_gradients,
    uses_float32_gradients,
)
from toolkit.models.padded_rows import PaddedLinear
from toolkit.models.varlen import VARLEN
from toolkit.training import cut, gradient_choice


def three(function: object, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of ``function`` for fresh copies of ``tensors``."""
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*own)  # type: ignore[operator]
    torch.manual_seed(1)
    gradient = torch.randn_like(output, dtype=torch.float32).bfloat16().to(output.dtype)
    return [output, *torch.autograd.grad(output, own, gradient)]


@pytest.mark.parametrize("shape", [(FEWEST_ROWS, 48, 80), (77, 33, 5), (200, 2048, 1500)])
def test_a_layer_gives_what_torch_gives_and_the_exact_gradients_rounded_once(shape: tuple[int, int, int]) -> None:
    rows, width, out = shape
    torch.manual_seed(0)
    tensors = [torch.randn(2, rows // 2 + 1, width), torch.randn(out, width), torch.randn(out)]
    low = [tensor.bfloat16() for tensor in tensors]

    def run(kind: type[nn.Linear]) -> object:
        layer = kind(width, out, dtype=torch.bfloat16)
        return lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))

    exact = three(nn.functional.linear, *(tensor.double() for tensor in low))
    plain, ours = three(run(nn.Linear), *low), three(run(Float32Linear), *low)
    assert torch.equal(plain[0], ours[0])
    for right, own in zip(exact[1:], ours[1:], strict=True):
        assert own.dtype == torch.bfloat16
        assert own.shape == right.shape
        # no bfloat16 numbers are nearer than the exact ones rounded; float32 decides only what lies halfway otherwise
        assert (own - right).norm() <= (right.bfloat16() - right).norm() * 1.001


@pytest.mark.parametrize("shape", [(FEWEST_ROWS, 48, 80), (77, 33, 5), (200, 2048, 1500)])
@pytest.mark.parametrize("bias", [False, True])
def test_without_bfloat16_instructions_outputs_are_the_exact_ones_rounded_once(
    shape: tuple[int, int, int], bias: bool
) -> None:
    rows, width, out = shape
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(width, out, bias=bias, dtype=torch.bfloat16))
    states = torch.randn(2, rows // 2 + 1, width).bfloat16()
    exact = nn.functional.linear(states.double(), layer[0].weight.double(), layer[0].bias.double() if bias else None)
    plain = layer(states)
    use_float32_gradients(layer)
    assert torch.equal(layer(states), plain)
    assert not has_float32_forward(layer)
    layer[0].__class__ = nn.Linear
    use_float32_gradients(layer, forward_too=True)
    assert has_float32_forward(layer)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            own = layer(states)
        assert (own.dtype, own.shape) == (torch.bfloat16, plain.shape)
        assert (own - exact).norm() <= (exact.bfloat16() - exact).norm() * 1.001
    few, exact_few = states[:, :2].contiguous(), exact[:, :2]  # of 2 rows: from 4 on converting is worth its time
    assert torch.equal(layer(few[:, :1]), nn.functional.linear(few[:, :1], layer[0].weight, layer[0].bias))
    assert (layer(few) - exact_few).norm() <= (exact_few.bfloat16() - exact_few).norm() * 1.001


def test_the_adapters_of_such_a_layer_compute_as_it_does() -> None:
    for forward_too, kind in ((True, Float32Linear), (False, PaddedLinear)):
        model = tiny_llama().bfloat16()
        use_float32_gradients(model, forward_too)
        add_adapters(model, [Adapter(("model.layers.5.mlp.up_proj",), 4, 8.0, 0.0, False, False, "kaiming")], 0)
        adapted = model.get_submodule("model.layers.5.mlp.up_proj")
        assert {type(adapted.lora_A["default"]), type(adapted.lora_B["default"])} == {kind}
        assert has_float32_forward(adapted.lora_A) is has_float32_forward(adapted.lora_B) is forward_too


def test_a_model_that_does_not_train_computes_so_where_bfloat16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for emulated, dtype, device, expected in (
        (True, torch.bfloat16, cpu, True), (False, torch.bfloat16, cpu, False), (True, torch.float32, cpu, False),
        (True, torch.bfloat16, gpu, False),
    ):  # fmt: skip
        monkeypatch.setattr(float32_gradients, "bfloat16_is_emulated", lambda answer=emulated: answer)
        monkeypatch.setattr(float32_gradients, "float32_is_faster", lambda: True)
        model = tiny_llama().to(dtype)
        use_faster_forward(model, device)
        assert has_float32_forward(model) is expected


def test_evaluation_and_answers_take_the_faster_forward_pass(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.epochs", 1, "--model.dtype", "bfloat16")
    assert train(*flags, "--data.validation", "0.3") == 0
    seen = Counter[bool]()
    products = Float32Linear.forward

    def counted(self: Float32Linear, states: torch.Tensor) -> torch.Tensor:
        seen[self.forward_in_float32] += 1
        return products(self, states)

    monkeypatch.setattr(Float32Linear, "forward", counted)
    monkeypatch.setattr(float32_gradients, "float32_is_faster", lambda: True)
    for emulated in (False, True):
        seen.clear()
        monkeypatch.setattr(float32_gradients, "bfloat16_is_emulated", lambda answer=emulated: answer)
        evaluate(tmp_path / "run")
        generate(tmp_path / "run", "A question?", max_new_tokens=1)
        assert set(seen) == ({True} if emulated else set())


@pytest.mark.parametrize("emulated", [False, True])
def test_a_prefix_that_is_loaded_again_computes_as_the_run_does(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated: bool
) -> None:
    """To answer, and where stored hidden states turn out to be missing."""
    monkeypatch.setattr(gradient_choice, "float32_is_faster", lambda: True)
    monkeypatch.setattr(gradient_choice, "bfloat16_is_emulated", lambda: emulated)
    seen: list[tuple[bool, bool]] = []
    reload_base = cut._reload_base

    def reloaded(context: Any, phase: Any) -> Any:
        fresh = reload_base(context, phase)
        seen.append((uses_float32_gradients(fresh.model), has_float32_forward(fresh.model)))
        return fresh

    monkeypatch.setattr(cut, "_reload_base", reloaded)
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.epochs", 1, "--model.dtype", "bfloat16")
    flags += ["--prefix.cache", "on", "--prefix.cache_dir", str(tmp_path / "cache"), "--output.sample_answers", "1"]
    assert train(*flags, "--data.validation", "0.3") == 0
    assert set(seen) == {(True, emulated)}


@pytest.mark.parametrize("attention", ["sdpa", VARLEN])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_attention_gives_what_torch_gives_and_gradients_as_near_to_the_exact_ones(
    attention: str, padded: bool, blocks: bool
) -> None:
    """Of a layer with fewer keys than queries, on rows with padding and without."""
    torch.manual_seed(0)
    model = tiny_llama()
    set_attention(model, attention)
    tokens = torch.randint(0, 60, (2, 40))
    mask = torch.ones_like(tokens)
    mask[1, 30:] = 0

    def run(model: nn.Module) -> list[torch.Tensor]:
        logits = model(input_ids=tokens, attention_mask=mask if padded else None, use_cache=False).logits
        of = [p for name, p in model.named_parameters() if "self_attn" in name]
        return [logits, *torch.autograd.grad(logits[mask.bool()].double().square().mean(), of)]

    exact = run(model.bfloat16().double())
    model.bfloat16()
    plain = run(model)
    use_float32_gradients(model)
    mark_attention(model, in_float32=True, in_blocks=blocks)
    ours = run(model)
    assert torch.equal(plain[0], ours[0])
    assert not all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    off = [sum(float((a - b).norm()) for a, b in zip(exact[1:], own[1:], strict=True)) for own in (plain, ours)]
    # most of it is what the forward pass rounds, in both alike; what the backward pass rounds may happen to add to it
    assert off[1] <= off[0] * 1.05


@pytest.mark.parametrize("blocks", [False, True])
def test_attention_with_dropout_is_left_as_it_is(blocks: bool) -> None:
    """It draws anew each time that it runs."""
    states = [torch.randn(1, 2, 8, 16).bfloat16().requires_grad_() for _ in range(3)]
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    mark_attention(module, in_float32=True, in_blocks=blocks)
    for dropout, ours in ((0.5, False), (0.0, True)):
        output, _ = sdpa(module, *states, None, dropout=dropout)
        names = {type(output.grad_fn).__name__, type(output.grad_fn.next_functions[0][0]).__name__}
        assert any("Attention" in name for name in names - {"ScaledDotProductFlashAttentionForCpuBackward0"}) is ours


def test_a_frozen_weight_and_a_frozen_input_get_no_gradient() -> None:
    layer = Float32Linear(8, 4, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    states = torch.randn(FEWEST_ROWS, 8).bfloat16().requires_grad_()
    layer(states).sum().backward()
    assert (layer.weight.grad, states.grad is None) == (None, False)
    layer.weight.requires_grad_(True)
    layer(states.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_all_linear_layers_are_exchanged_but_the_head_which_is_left_to_the_loss() -> None:
    model = tiny_llama()
    assert not uses_float32_gradients(model)
    use_float32_gradients(model)
    assert uses_float32_gradients(model)
    assert type(model.lm_head) is nn.Linear
    assert sum(type(module) is Float32Linear for module in model.modules()) == 6 * 7


def test_a_run_with_float32_gradients_learns_the_same_from_the_same_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "model", tied=False)

    def run(name: str, faster: bool, emulated: bool = False) -> Path:
        monkeypatch.setattr(gradient_choice, "float32_is_faster", lambda: faster)
        monkeypatch.setattr(gradient_choice, "bfloat16_is_emulated", lambda: emulated)
        monkeypatch.setattr(gradient_choice, "blocks_are_faster", lambda tokens, in_float32: faster)
        flags = tiny_flags(model, tmp_path / name, "--train.epochs", 1, "--prefix.cache", "on")
        assert train(*flags, "--model.dtype", "bfloat16", "--prefix.cache_dir", str(tmp_path / "cache")) == 0
        return tmp_path / name

    plain, cold, warm = run("plain", False), run("cold", True), run("warm", True)
    assert metrics(warm) == metrics(cold) != metrics(plain)
    assert_rounded_alike(cold, plain)
    assert len(list((tmp_path / "cache").glob("*/split.json"))) == 1
    cold, warm = run("cold forward", True, emulated=True), run("warm forward", True, emulated=True)
    assert metrics(warm) == metrics(cold) != metrics(plain)
    assert_rounded_alike(cold, plain)
    assert len(list((tmp_path / "cache").glob("*/split.json"))) == 2, "hidden states of another forward pass"
