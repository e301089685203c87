"""Products of bfloat16 layers in float32, on processors that compute those faster.

A CPU with tile units for bfloat16 (AMX) multiplies it several times faster than float32; many without them are twice as
slow at it. There the backward pass of a bfloat16 layer is computed from float32 copies, and each gradient is rounded
once, at its end, which is where a bfloat16 product rounds too. Which is faster is measured once a machine. The forward
pass of a layer stays torch's own, bit for bit; only the head, which is the loss's, is a float32 product there too.

A CPU without any instruction for bfloat16 (AVX2 alone) is six to eight times as slow at it. There the forward pass is a
float32 product too, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from toolkit.models.faster_way import is_faster_here, speedup
from toolkit.models.padded_rows import ROW_MULTIPLE, padded_linear

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Computes ``linear`` of states, a weight and a bias."""

FEWEST_ROWS = ROW_MULTIPLE
"""Rows below which converting the weight to float32 costs more time than it saves."""
FEWEST_EMULATED_ROWS = 4
"""The same where bfloat16 is emulated: 576 x 1536, outputs of 4 rows 0.71 and 0.52 ms, of one 0.18 and 0.30."""

FORWARD_SPEEDUP = 3.0
"""How many times faster float32 has to be for the forward pass: more than with bfloat16 instructions, however slow."""

_CHUNK_ELEMENTS = 2**19
"""Elements of a weight that are converted to float32 at once: 2 MiB, which stay in the processor's caches."""


class Float32Linear(nn.Linear):
    """``nn.Linear`` of low-precision weights that computes its gradients in float32 and rounds them."""

    forward_in_float32 = False
    """Whether it computes its output so, too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Compute ``linear(input)``, […, in_features] to […, out_features], in the input's dtype."""
        rows = input.numel() // max(1, input.shape[-1])
        if rows < fewest_rows(self.forward_in_float32) or input.dtype != self.weight.dtype:
            return super().forward(input)
        product = float32_linear if self.forward_in_float32 else padded_linear
        if not torch.is_grad_enabled():
            return product(input, self.weight, self.bias)
        output: torch.Tensor = _Float32Product.apply(input, self.weight, self.bias, product)  # type: ignore[no-untyped-call]
        return output


def fewest_rows(forward_in_float32: bool) -> int:
    """Return the number of rows from which on a layer converts its weight to float32."""
    return FEWEST_EMULATED_ROWS if forward_in_float32 else FEWEST_ROWS


class _Float32Product(torch.autograd.Function):
    """``linear(states, weight, bias)`` whose gradients are computed in float32 and rounded once."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product: Product
    ) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.has_bias = bias is not None
        return product(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        states, weight = ctx.saved_tensors
        needs_states, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2).float()
        d_states = d_weight = None
        if needs_states:
            d_states = gradient_of_states(rows, weight, in_float32=True).to(states.dtype).view(states.shape)
        if needs_weight:
            d_weight = torch.empty_like(weight)
            gradient_of_weight(rows, states.flatten(0, -2), d_weight, in_float32=True)
        return d_states, d_weight, rows.sum(0).to(weight.dtype) if ctx.has_bias and needs_bias else None, None


def float32_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute ``linear(states, weight, bias)``, […, H] and [V, H] to […, V], in float32; it is rounded once."""
    return linear(states.flatten(0, -2), weight, bias, in_float32=True).view(*states.shape[:-1], -1)


def linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, in_float32: bool = False
) -> torch.Tensor:
    """Compute ``states @ weight.T + bias``, [S, H] and [V, H] to [S, V], in the dtype of ``states``.

    With ``in_float32`` the product is computed in float32 and rounded once.
    """
    if not in_float32:
        return nn.functional.linear(states, weight, bias)
    states_float32, output = states.float(), states.new_empty(len(states), len(weight))
    for rows in _row_chunks(weight):
        chunk_bias = None if bias is None else bias[rows].float()
        output[:, rows] = nn.functional.linear(states_float32, weight[rows].float(), chunk_bias)
    return output


def gradient_of_states(gradient: torch.Tensor, weight: torch.Tensor, in_float32: bool = False) -> torch.Tensor:
    """Compute ``gradient @ weight``, [S, V] and [V, H] to [S, H]; the result is float32 if ``in_float32``."""
    if not in_float32:
        return gradient @ weight
    first, *others = _row_chunks(weight)
    total = gradient[:, first].float() @ weight[first].float()
    for rows in others:
        total += gradient[:, rows].float() @ weight[rows].float()
    return total


def gradient_of_weight(
    gradient: torch.Tensor, states: torch.Tensor, out: torch.Tensor, in_float32: bool = False
) -> None:
    """Write ``gradient.T @ states``, of [S, V] and [S, H], into ``out`` [V, H]."""
    if not in_float32:
        torch.mm(gradient.t(), states, out=out)
        return
    states_float32 = states.float()
    for rows in _row_chunks(out):
        out[rows] = gradient[:, rows].float().t() @ states_float32


def _row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Yield slices of rows of ``weight`` [V, H], each small enough to convert to float32 in the caches."""
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def use_float32_gradients(model: nn.Module, forward_too: bool = False) -> None:
    """Let the linear layers of ``model`` compute gradients in float32, before it is cut; ``forward_too`` outputs, too.

    The head belongs to the loss, which does the same (``toolkit.split.supervised_loss``), attention to
    ``toolkit.models.attention_gradients``. Layers that are no ``nn.Linear``, quantised or not, stay.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for module in model.modules():
        if module is head:
            continue
        if type(module) is nn.Linear:
            module.__class__ = Float32Linear
        elif getattr(module, "plain_class", None) is nn.Linear:  # see toolkit.models.quantised_linear
            cast(Any, module).plain_class = Float32Linear
        else:
            continue
        cast(Float32Linear, module).forward_in_float32 = forward_too


def use_faster_forward(model: PreTrainedModel, device: torch.device) -> None:
    """Let a model that does not train compute in float32, rounded once, on a CPU that has no bfloat16 instructions."""
    if device.type == "cpu" and model.dtype == torch.bfloat16 and float32_is_faster() and bfloat16_is_emulated():
        use_float32_gradients(model, forward_too=True)


def uses_float32_gradients(model: nn.Module) -> bool:
    """Return whether ``use_float32_gradients`` was called for ``model``."""
    return any(isinstance(module, Float32Linear) for module in model.modules())


def has_float32_forward(model: nn.Module) -> bool:
    """Return whether ``use_float32_gradients`` was called for ``model``, ``forward_too``."""
    return any(isinstance(module, Float32Linear) and module.forward_in_float32 for module in model.modules())


def float32_is_faster() -> bool:
    """Return whether float32 products are faster than bfloat16 ones on this machine, conversions included."""
    return is_faster_here("float32-gradients.json", "", _measure_speedup)


def bfloat16_is_emulated() -> bool:
    """Return whether this machine is so much slower at bfloat16 products that it has no instructions for them."""
    return is_faster_here("float32-gradients.json", ", forward", _measure_speedup, least=FORWARD_SPEEDUP)


def _measure_speedup() -> float:
    states, weight = torch.ones(256, 512, dtype=torch.bfloat16), torch.ones(1024, 512, dtype=torch.bfloat16)

    def product(dtype: torch.dtype) -> torch.Tensor:
        return (states.to(dtype) @ weight.to(dtype).t()).to(torch.bfloat16)

    return speedup(lambda: product(torch.bfloat16), lambda: product(torch.float32))
