from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import make_tiny_model, metrics, tiny_flags, tiny_llama, train
from torch import nn

from toolkit.models import products
from toolkit.models.products import FEWEST_ROWS, Float32Linear, Pace, pace_in, pace_of, quicken
from toolkit.train import setup

BOTH = Pace(linear=True, attention=True)


def three(function: object, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of ``function`` for fresh copies of ``tensors``."""
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*own)  # type: ignore[operator]
    torch.manual_seed(1)
    return [output, *torch.autograd.grad(output, own, torch.randn_like(output, dtype=torch.float32).to(output.dtype))]


@pytest.mark.parametrize("shape", [(FEWEST_ROWS, 48, 80), (77, 33, 5), (200, 2048, 1500)])
def test_a_float32_layer_is_closer_to_the_exact_product_than_a_bfloat16_one(shape: tuple[int, int, int]) -> None:
    rows, width, out = shape
    torch.manual_seed(0)
    tensors = [torch.randn(2, rows // 2 + 1, width), torch.randn(out, width), torch.randn(out)]
    low = [tensor.bfloat16() for tensor in tensors]

    def run(kind: type[nn.Linear]) -> object:
        layer = kind(width, out, dtype=torch.bfloat16)
        return lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))

    exact = three(nn.functional.linear, *(tensor.double() for tensor in low))
    plain, ours = three(run(nn.Linear), *low), three(run(Float32Linear), *low)
    for right, theirs, own in zip(exact, plain, ours, strict=True):
        assert own.dtype == torch.bfloat16
        assert own.shape == right.shape
        assert (own - right).norm() <= (theirs - right).norm() * 1.001


def test_a_frozen_weight_and_a_frozen_input_get_no_gradient() -> None:
    layer = Float32Linear(8, 4, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    states = torch.randn(FEWEST_ROWS, 8).bfloat16().requires_grad_()
    layer(states).sum().backward()
    assert (layer.weight.grad, states.grad is None) == (None, False)
    layer.weight.requires_grad_(True)
    layer(states.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_only_what_is_faster_is_exchanged_and_the_head_is_left_to_the_loss() -> None:
    model = tiny_llama()
    assert pace_in(model) == Pace()
    quicken(model, Pace())
    assert pace_in(model) == Pace()
    quicken(model, Pace(linear=True))
    assert pace_in(model) == Pace(linear=True)
    assert type(model.lm_head) is nn.Linear
    assert sum(type(module) is Float32Linear for module in model.modules()) == 6 * 7
    quicken(model, BOTH)
    assert pace_in(model) == BOTH


def test_attention_in_float32_is_closer_to_the_exact_one() -> None:
    model = tiny_llama().double()
    tokens = torch.arange(60).view(2, 30)
    exact = model(input_ids=tokens).logits
    model.bfloat16()
    plain = model(input_ids=tokens).logits
    quicken(model, BOTH)
    ours = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert not torch.equal(plain, ours)
    # weights were rounded too, which both have in common
    assert (ours - exact).norm() <= (plain - exact).norm() * 1.05


def test_what_was_measured_is_kept_and_only_asked_of_bfloat16_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "new"))
    gains = iter([1.5, 1.1])
    monkeypatch.setattr(products, "_gain", lambda work: next(gains))
    cpu = torch.device("cpu")
    assert pace_of(torch.float32, cpu) == pace_of(torch.bfloat16, torch.device("meta")) == Pace()
    assert pace_of(torch.bfloat16, cpu) == Pace(linear=True)
    products._kept.cache_clear()
    assert pace_of(torch.bfloat16, cpu) == Pace(linear=True)  # read: nothing is left to measure
    (path,) = (tmp_path / "new").iterdir()
    path.write_text(json.dumps({"another machine": {}}))
    products._kept.cache_clear()
    gains = iter([0.2, 1.3])
    assert pace_of(torch.bfloat16, cpu) == Pace(attention=True)
    products._kept.cache_clear()


def test_both_kinds_of_speed_are_measured() -> None:
    assert products._gain(products._linear) > 0
    assert products._gain(products._attention) > 0


def test_a_run_in_float32_learns_the_same_and_has_activations_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "model", tied=False)

    def run(name: str, pace: Pace) -> list[float]:
        monkeypatch.setattr(setup, "pace_of", lambda dtype, device: pace)
        flags = tiny_flags(model, tmp_path / name, "--train.epochs", 1, "--prefix.cache", "on")
        assert train(*flags, "--model.dtype", "bfloat16", "--prefix.cache_dir", str(tmp_path / "cache")) == 0
        return metrics(tmp_path / name)

    plain, cold, warm = run("plain", Pace()), run("cold", BOTH), run("warm", BOTH)
    assert warm == cold
    assert cold != plain
    assert cold == pytest.approx(plain, abs=2e-2)
    assert len(list((tmp_path / "cache").glob("*/split.json"))) == 2
