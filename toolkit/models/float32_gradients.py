"""Gradients of bfloat16 layers in float32, on processors that compute those faster.

A CPU with tile units for bfloat16 (AMX) multiplies it several times faster than float32; many without them are twice as
slow at it. There the backward pass of a bfloat16 layer is computed from float32 copies, and each gradient is rounded
once, at its end, which is where a bfloat16 product rounds too. Which is faster is measured once a machine. The forward
pass of a layer stays torch's own, bit for bit; only the head, which is the loss's, is a float32 product there too.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from toolkit.models.bundled import cache_root
from toolkit.models.padded_rows import ROW_MULTIPLE, padded_linear
from toolkit.runtime.paths import replace_text

log = logging.getLogger("frostline")

FEWEST_ROWS = ROW_MULTIPLE
"""Rows below which converting the weight to float32 costs more time than it saves."""

_CHUNK_ELEMENTS = 2**19
"""Elements of a weight that are converted to float32 at once: 2 MiB, which stay in the processor's caches."""
_LEAST_SPEEDUP = 1.2
"""Least speed-up of a float32 product over a bfloat16 one at which float32 is used."""
_MARK_ATTRIBUTE = "_gradient_in_float32"
"""Attribute that marks the attention layers whose gradients are computed in float32."""


class Float32Linear(nn.Linear):
    """``nn.Linear`` of low-precision weights that computes its gradients in float32 and rounds them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Compute ``linear(input)``, […, in_features] to […, out_features], in the input's dtype."""
        rows = input.numel() // max(1, input.shape[-1])
        if rows < FEWEST_ROWS or input.dtype != self.weight.dtype:
            return super().forward(input)
        if not torch.is_grad_enabled():
            return padded_linear(input, self.weight, self.bias)
        output: torch.Tensor = _Float32Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Float32Product(torch.autograd.Function):
    """``linear(states, weight, bias)`` whose gradients are computed in float32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.has_bias = bias is not None
        return padded_linear(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        states, weight = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2).float()
        d_states = d_weight = None
        if needs_states:
            d_states = gradient_of_states(rows, weight, in_float32=True).to(states.dtype).view(states.shape)
        if needs_weight:
            d_weight = torch.empty_like(weight)
            gradient_of_weight(rows, states.flatten(0, -2), d_weight, in_float32=True)
        return d_states, d_weight, rows.sum(0).to(weight.dtype) if ctx.has_bias and needs_bias else None


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Query, key, value and a mask to the attended values."""


class _Float32Attention(torch.autograd.Function):
    """``attend(query, key, value, mask)`` whose backward computes it once more in float32 and differentiates that.

    torch's bfloat16 kernel takes longer for its backward pass alone, and keeps 9 MiB for each length of rows that it
    meets (torch 2.13).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, attend: Attend
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.attend = attend
        return attend(query, key, value, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        *states, mask = ctx.saved_tensors
        in_float32 = [tensor.detach().float().requires_grad_() for tensor in states]
        with torch.enable_grad():
            output = ctx.attend(*in_float32, mask.float() if mask is not None and mask.is_floating_point() else mask)
        gradients = torch.autograd.grad(output, in_float32, gradient.float())
        return *(g.to(tensor.dtype) for g, tensor in zip(gradients, states, strict=True)), None, None


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


def sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Run transformers' ``sdpa``, with float32 gradients in the layers that ``use_float32_gradients`` marked."""

    def attend(*states: torch.Tensor | None) -> torch.Tensor:
        output: torch.Tensor = sdpa_attention_forward(module, *states, *args[1:], **kwargs)[0]
        return output

    mask = args[0] if args else kwargs.pop("attention_mask", None)
    in_float32 = getattr(module, _MARK_ATTRIBUTE, False) and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if not in_float32 or kwargs.get("dropout"):  # a second pass would drop other values
        return attend(query, key, value, mask), None
    return _Float32Attention.apply(query, key, value, mask, attend), None  # type: ignore[no-untyped-call]


def use_float32_gradients(model: PreTrainedModel) -> None:
    """Let the linear and attention layers of ``model`` compute gradients in float32, before it is cut.

    The head belongs to the loss, which does the same (``toolkit.split.supervised_loss``). Layers of other classes than
    ``nn.Linear``, such as quantised ones, stay as they are.
    """
    AttentionInterface.register("sdpa", sdpa)  # other models' attention goes through it unchanged
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = Float32Linear
        if hasattr(module, "is_causal"):
            setattr(module, _MARK_ATTRIBUTE, True)
    log.info("bfloat16 layers: gradients in float32, rounded once, which this CPU is faster at")


def uses_float32_gradients(model: nn.Module) -> bool:
    """Return whether ``use_float32_gradients`` was called for ``model``."""
    return any(isinstance(module, Float32Linear) for module in model.modules())


def float32_is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether float32 products are faster on this machine; measured once, kept beside the converted models.

    It has to stay the same from run to run, because it moves the last bit of gradients.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return _saved_or_measured(cache_root() / "float32-gradients.json")


@cache
def _saved_or_measured(path: Path) -> bool:
    """Return whether float32 products are enough faster here, as saved at ``path``; measure and save it if it is not.

    The file keeps the answers of all machines that share it.
    """
    saved: Any = None
    with suppress(OSError, ValueError):
        saved = json.loads(path.read_text(encoding="utf-8"))
    by_machine = saved if isinstance(saved, dict) else {}
    if isinstance(faster := by_machine.get(machine()), bool):
        return faster
    faster = _measure_speedup() >= _LEAST_SPEEDUP
    with suppress(OSError):  # where it cannot be saved, the next run measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({**by_machine, machine(): faster}))
    return faster


def machine() -> str:
    """Name the processor, its tile units (AMX) and torch's version: the key that a measurement is saved under."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        processor = platform.processor() or platform.machine()
    else:
        pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
        fields = {key.strip(): value for key, value in pairs}
        tiles = " with AMX" if "amx_bf16" in fields.get("flags", "").split() else ""
        processor = fields.get("model name", platform.machine()).strip() + tiles
    return f"{processor}, torch {torch.__version__}"


def _measure_speedup() -> float:
    """Measure how many times faster a product is in float32 than in bfloat16, conversions included.

    The best of eight alternating trials, on one thread and by that thread's CPU time, so that other processes do not
    count.
    """
    states, weight = torch.ones(256, 512, dtype=torch.bfloat16), torch.ones(1024, 512, dtype=torch.bfloat16)
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(8):
            for dtype in best:
                start = time.thread_time()
                (states.to(dtype) @ weight.to(dtype).t()).to(torch.bfloat16)
                best[dtype] = min(best[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]
