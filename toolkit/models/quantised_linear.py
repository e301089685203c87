"""Linear layers that hold their frozen weight in 8 or 4 bits, and dequantise it whenever it is used.

A layer above the frost line is called in forward, and its weight is needed again in backward for the gradient of its
input. Autograd would keep the dequantised weight in between; here backward dequantises it once more (QLoRA, Dettmers et
al., arXiv 2305.14314), so that only the codes are held. The product is that of the plain layer on that weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from toolkit.models.float32_gradients import Float32Linear, fewest_rows, float32_linear, gradient_of_states
from toolkit.models.padded_rows import PaddedLinear, padded_linear
from toolkit.models.quantization import PARTS, Precision, QuantizationSpec, dequantise, quantise

_PRODUCTS = (nn.Linear.forward, Conv1D.forward, Float32Linear.forward, PaddedLinear.forward)
"""Forward passes that are a product with the weight and nothing else."""


class QuantisedWeight(nn.Module):
    """Extends the class of a linear layer whose frozen weight is quantised; ``quantise_layer`` makes one.

    The parts are buffers ``weight_codes`` and so on, which no engine trains or partitions. DeepSpeed casts buffers of
    floating point to the precision of training, so float32 parts are held as bytes.
    """

    bias: nn.Parameter | None
    quantization: QuantizationSpec
    plain_class: type[nn.Module]
    """The layer's class before its weight was quantised."""
    forward_in_float32 = False
    """As ``Float32Linear`` has it."""

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight, dequantised into a new tensor in its original shape and dtype.

        Code that computes with the weight itself (DoRA's norm, some models) thereby finds what the layer computes with.
        """
        dtypes = PARTS[self.quantization.precision]
        return dequantise(
            {name: getattr(self, f"weight_{name}").view(dtypes[name]) for name in dtypes}, self.quantization
        )

    @property
    def quantised_bytes(self) -> int:
        """Return the bytes of the parts."""
        return sum(int(getattr(self, f"weight_{name}").nbytes) for name in PARTS[self.quantization.precision])

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: A002 - torch's name
        """Compute the layer's output, [..., inputs] to [..., outputs], in the dtype of ``input``.

        A class with a forward pass of its own keeps that, and autograd the weight that it multiplies with.
        """
        if self.plain_class.forward not in _PRODUCTS:
            return cast(torch.Tensor, super().forward(input, *args, **kwargs))
        output: torch.Tensor = _Product.apply(input, self.bias, self)  # type: ignore[no-untyped-call]
        return output

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantised weight [outputs, inputs] in ``dtype``."""
        weight = self.weight.to(dtype)
        return weight.t() if self.quantization.transposed else weight

    def product(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute ``linear(states, weight, bias)``, in float32 or with rows padded where the plain layer does."""
        if self.forward_in_float32 and self.uses_float32(len(states.flatten(0, -2)), states.dtype):
            return float32_linear(states, weight, bias)
        pads = issubclass(self.plain_class, (Float32Linear, PaddedLinear)) and states.dtype == self.quantization.dtype
        return (padded_linear if pads else nn.functional.linear)(states, weight, bias)

    def uses_float32(self, rows: int, dtype: torch.dtype) -> bool:
        """Return whether the plain layer computes the gradients of so many rows in float32."""
        is_enough = rows >= fewest_rows(self.forward_in_float32)
        return issubclass(self.plain_class, Float32Linear) and is_enough and dtype == self.quantization.dtype


class _Product(torch.autograd.Function):
    """``linear(states, weight, bias)`` of a quantised layer; keeps the layer in place of its weight."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, bias: torch.Tensor | None, layer: QuantisedWeight) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(states, layer.matrix(states.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        layer: QuantisedWeight = ctx.layer
        needs_states, needs_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        in_float32 = layer.uses_float32(len(rows), gradient.dtype)
        d_states = d_bias = None
        if needs_states:
            weight = layer.matrix(gradient.dtype)
            product = gradient_of_states(rows, weight, True) if in_float32 else layer.product(rows, weight.t())
            d_states = product.to(gradient.dtype).view(*gradient.shape[:-1], -1)
        if needs_bias:
            d_bias = (rows.float() if in_float32 else rows).sum(0).to(gradient.dtype)
        return d_states, d_bias, None


def quantise_layer(layer: nn.Module, precision: Precision) -> None:
    """Quantise the weight of a linear layer in place, and free the plain one; does nothing if that was done before.

    Args:
        layer: an ``nn.Linear`` or GPT-2's ``Conv1D`` with an even number of weights, of which no other module has any.
        precision: precision of the codes.
    """
    if isinstance(layer, QuantisedWeight):
        return
    weight = cast(nn.Parameter, layer._parameters["weight"]).detach()
    spec = QuantizationSpec(precision, tuple(weight.shape), weight.dtype, isinstance(layer, Conv1D))
    plain_class: Any = type(layer)
    layer._parameters["weight"] = None  # keeps its place in the order of names
    for name, part in quantise(weight, spec).items():
        stored = part.reshape(-1).view(torch.uint8) if part.is_floating_point() else part
        layer.register_buffer(f"weight_{name}", stored)
    layer.__class__ = _quantised_class(plain_class)
    assert isinstance(layer, QuantisedWeight)
    layer.quantization, layer.plain_class = spec, plain_class


def quantised_layer_bytes(model: nn.Module) -> int:
    """Return the bytes that the quantised layers of ``model`` hold in place of their weights."""
    return sum(module.quantised_bytes for module in model.modules() if isinstance(module, QuantisedWeight))


def dequantise_layers(model: nn.Module) -> None:
    """Give every quantised layer of ``model`` its class and a plain frozen weight again, the dequantised one."""
    for layer in [module for module in model.modules() if isinstance(module, QuantisedWeight)]:
        weight = layer.weight
        for name in PARTS[layer.quantization.precision]:
            del layer._buffers[f"weight_{name}"]
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        plain: nn.Module = layer
        plain.__class__ = layer.plain_class


@cache
def _quantised_class(plain_class: type) -> type[Any]:
    """Return ``plain_class`` extended by ``QuantisedWeight``."""
    return type(f"Quantised{plain_class.__name__}", (QuantisedWeight, plain_class), {})
