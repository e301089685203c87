"""Adapters on a base in 8 or 4 bits: what is computed is the plain model's on the dequantised weights."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_adapters import KINDS, batches, build, learn, learn_with_peft  # noqa: F401 (a fixture)
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import make

from toolkit.data.batches import Batch
from toolkit.mask.apply import apply_mask, merge_adapters, trainable_parameters, unused_adapters
from toolkit.models.float32_gradients import Float32Linear, use_float32_gradients
from toolkit.models.padded_rows import PaddedLinear
from toolkit.models.probe import called_modules
from toolkit.models.quantised_linear import QuantisedWeight, dequantise_layers, quantise_layer, quantised_layer_bytes
from toolkit.split.suffix import split

PRECISIONS: Any = ("int8", "nf4")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def layer_of(kind: str, dtype: torch.dtype) -> Any:
    """A frozen layer whose bias trains."""
    torch.manual_seed(0)
    layer: Any = Conv1D(96, 48) if kind == "Conv1D" else nn.Linear(48, 96, bias=kind != "without bias")
    if kind in ("Float32Linear", "float32 outputs", "PaddedLinear"):
        layer.__class__ = PaddedLinear if kind == "PaddedLinear" else Float32Linear
        layer.forward_in_float32 = kind == "float32 outputs"
    layer = layer.to(dtype).requires_grad_(False)
    if layer.bias is not None:
        nn.init.normal_(layer.bias.requires_grad_(True))
    return layer


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["Linear", "without bias", "Conv1D", "Float32Linear", "float32 outputs", "PaddedLinear"]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_layer_is_the_plain_one_on_the_dequantised_weight(
    precision: Any, kind: str, dtype: torch.dtype, rows: int
) -> None:
    """Output and both gradients, bit for bit."""
    plain = layer_of(kind, dtype)
    original, names = plain.weight.detach().clone(), list(plain.state_dict())
    quantise_layer(plain, precision)
    quantised = copy.deepcopy(plain)
    dequantise_layers(plain)
    assert type(plain) is type(layer_of(kind, dtype))
    assert list(plain.state_dict()) == names
    assert torch.equal(quantised.weight, plain.weight)
    assert not torch.equal(plain.weight, original)
    inputs = torch.randn(2, rows, 48).to(dtype)
    upstream, found = torch.randn(2, rows, 96).to(dtype), []
    for layer in (quantised, plain):
        states = inputs.clone().requires_grad_(True)
        output = layer(states)
        output.backward(upstream)
        found.append((output, states.grad, layer.bias.grad if layer.bias is not None else output))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_that_was_quantised_before_takes_the_faster_forward_pass(precision: Any) -> None:
    """As one of an opened run is, which evaluates on a CPU without bfloat16 instructions."""
    model = nn.Sequential(layer_of("Linear", torch.bfloat16))
    layer: Any = model[0]
    quantise_layer(layer, precision)
    use_float32_gradients(model, forward_too=True)
    states = torch.randn(40, 48).bfloat16()
    exact = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double())
    assert (layer(states) - exact).norm() <= (exact.bfloat16() - exact).norm() * 1.001
    dequantise_layers(model)
    assert type(layer) is Float32Linear


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_the_codes_are_held_also_between_forward_and_backward(precision: Any) -> None:
    layer = layer_of("without bias", torch.bfloat16)
    quantise_layer(layer, precision)
    held = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert held == quantised_layer_bytes(layer) < {"int8": 0.6, "nf4": 0.3}[precision] * 2 * 96 * 48
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True))
    assert not saved
    gc.collect()
    whole = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.shape in ((96, 48), (48, 96))]
    assert [t.dtype for t in whole] == ([torch.int8] if precision == "int8" else [])
    output.sum().backward()


class Scaled(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, input: torch.Tensor, scale: float = 2.0) -> torch.Tensor:  # noqa: A002
        return super().forward(input) * scale


def test_a_forward_pass_of_a_layers_own_stays() -> None:
    layer = Scaled(32, 32, bias=False).requires_grad_(False)
    quantise_layer(layer, "nf4")
    plain = copy.deepcopy(layer)
    dequantise_layers(plain)
    states = torch.randn(4, 32, requires_grad=True)
    assert torch.equal(layer(states, scale=3.0), plain(states, scale=3.0))
    assert torch.equal(*(torch.autograd.grad(one(states).sum(), states)[0] for one in (layer, plain)))


def test_the_shortcuts_of_the_last_block_are_those_without_codes(batches: list[Batch]) -> None:  # noqa: F811
    """An MLP without parameters is still one."""
    taken = []
    for precision in ("model", "nf4"):
        model = make("llama")
        entry = {"select": "last:2", "targets": ["q_proj"], "base_precision": precision}
        mask, anatomy = build(model, {"lora": entry})
        apply_mask(model, mask, anatomy)
        prefix, suffix = split(model, anatomy, mask.boundary)
        assert prefix is not None
        taken.append(suffix.choose_shortcuts(prefix(batches[0]), batches[0]))
    assert taken[0] == taken[1]
    assert taken[0].mlp


def test_casting_the_module_changes_no_scale() -> None:
    """DeepSpeed casts what it is given, buffers too."""
    for precision in PRECISIONS:
        layer = layer_of("Linear", torch.float32)
        quantise_layer(layer, precision)
        before = layer.weight
        assert torch.equal(layer.bfloat16().weight, before)


CASES = [
    ("llama", "int8"),
    ("llama", "nf4"),
    ("qwen2", "nf4"),
    ("gemma3_text", "int8"),
    ("gpt2", "int8"),
    ("gpt2", "nf4"),
]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_adapters_learn_what_pefts_own_learn_on_the_dequantised_model(
    name: str,
    precision: str,
    kind: str,
    checkpointed: bool,
    batches: list[Batch],  # noqa: F811
) -> None:
    model = make(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # GPT-2's, which would draw in another order
            module.p = 0.0
    lora = {"select": "last:2", "rank": 4, "alpha": 12, "base_precision": precision, **KINDS[kind]}
    mask, anatomy = build(model, {"lora": lora}, "head", tied="untie")
    apply_mask(model, mask, anatomy, seed=3)
    (layers,) = mask.quantised
    assert layers.modules == mask.adapters[0].modules
    assert sum(isinstance(module, QuantisedWeight) for module in model.modules()) == len(layers.modules)
    start = {name: p.detach().clone() for name, p in trainable_parameters(model, mask).items()}
    reference = make(name)
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in layers.modules:
        quantise_layer(reference.get_submodule(layer), layers.precision)
    dequantise_layers(reference)
    if mask.tied == "untie":
        reference.set_output_embeddings(copy.deepcopy(reference.get_output_embeddings()))
        reference.config.tie_word_embeddings = False
    config = LoraConfig(
        r=4, lora_alpha=12, use_rslora=kind == "rslora", use_dora=kind == "dora", fan_in_fan_out=name == "gpt2",
        target_modules=list(layers.modules),
    )  # fmt: skip
    plain = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    expected, tensors = learn_with_peft(reference, config, start, anatomy.head, batches)
    whole = copy.deepcopy(model)
    dequantise_layers(whole)
    found = learn(model, mask, anatomy, batches, checkpointed)
    assert found == learn(whole, mask, anatomy, batches, checkpointed), "to the bit what the dequantised model learns"
    assert found == pytest.approx(expected, abs=1e-5)
    for tensor, parameter in trainable_parameters(model, mask).items():  # steps of 1e-2, whatever the gradient's size
        assert torch.allclose(parameter, tensors[tensor], atol=3e-5), tensor
    dequantise_layers(model)
    held = {name.replace("base_layer.", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(held[name], p) for name, p in plain.items() if name not in mask.names)


def test_a_layer_whose_weight_the_model_reads_itself_computes_alike(batches: list[Batch]) -> None:  # noqa: F811
    """Mamba multiplies with the weight of dt_proj, which gets no adapter and is quantised all the same."""
    entry = {"select": "last:2", "rank": 4, "targets": ["in_proj", "x_proj", "out_proj"], "base_precision": "int8"}
    found = []
    for held in (True, False):
        model = make("mamba")
        mask, anatomy = build(model, {"lora": entry})
        apply_mask(model, mask, anatomy, seed=3)
        assert any("dt_proj" in module for module in mask.quantised[0].modules)
        if not held:
            dequantise_layers(model)
        prefix, suffix = split(model.eval(), anatomy, mask.boundary)
        assert prefix is not None
        hidden = prefix(batches[0])
        assert not unused_adapters(
            suffix.model, called_modules(suffix.model, lambda s=suffix, h=hidden: s.logits(h, batches[0]))
        )
        loss = suffix(hidden, batches[0])
        loss.backward()
        found.append((loss, [p.grad for p in trainable_parameters(model, mask).values()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0][1], found[1][1], strict=True))


def test_merging_adds_to_the_dequantised_weights_of_all_quantised_layers(batches: list[Batch]) -> None:  # noqa: F811
    model = make("qwen2")
    entry = {"select": "last:2", "rank": 4, "targets": ["q_proj"], "base_precision": "nf4", "dora": True}
    mask, anatomy = build(model, {"lora": entry})
    apply_mask(model, mask, anatomy, seed=3)
    assert len(mask.quantised[0].modules) == 7 * len(mask.adapters[0].modules), "also layers without an adapter"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model, mask).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    ids = batches[0].input_ids
    with torch.no_grad():
        adapted = model.eval()(ids).logits
        merge_adapters(model, {})
        merged = model(ids).logits
    assert not any("codes" in name or "base_layer" in name for name in model.state_dict())
    assert torch.allclose(adapted, merged, atol=1e-4 * float(adapted.abs().max()))
