"""Products of bfloat16 matrices in float32, on processors that compute those faster.

A CPU with tile units for bfloat16 (AMX) multiplies it several times faster than float32; many without them are twice as
slow at it. There a product of bfloat16 matrices is computed from float32 copies and rounded once at its end, which is
where a bfloat16 product rounds too. Which is faster is measured once a machine.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from toolkit.files import replace_text
from toolkit.models.bundled import cache_root

log = logging.getLogger("frostline")

FEWEST_ROWS = 32
"""With fewer rows than that, bringing the weight to float32 takes longer than it saves."""

_PART = 2**21
"""Elements of a weight that are float32 at once, of 4 bytes: a few MiB, which stay in the processor's caches."""
_WORTH_IT = 1.2
"""How many times faster float32 has to be."""
_ATTENTION = "_in_float32"


@dataclass(frozen=True)
class Pace:
    """What is computed in float32."""

    linear: bool = False
    attention: bool = False

    @property
    def text(self) -> str:
        """For the log and for names of what depends on it; empty where nothing is."""
        return " and ".join(name for name, on in asdict(self).items() if on)


class Float32Linear(nn.Linear):
    """``nn.Linear`` of low-precision weights that computes in float32 and rounds its result."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """[…, in_features] to […, out_features] in the input's dtype."""
        rows = input.numel() // max(1, input.shape[-1])
        if rows < FEWEST_ROWS or input.dtype != self.weight.dtype:
            return super().forward(input)
        output: torch.Tensor = _Float32Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Float32Product(torch.autograd.Function):
    """``linear(states, weight, bias)``; gradients are float32 products too, each rounded once."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.has_bias = bias is not None
        return linear(states.flatten(0, -2), weight, bias, in_float32=True).view(*states.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        states, weight = ctx.saved_tensors
        to_states, to_weight, to_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2).float()
        d_states = d_weight = None
        if to_states:
            d_states = gradient_of_states(rows, weight, in_float32=True).to(states.dtype).view(states.shape)
        if to_weight:
            d_weight = torch.empty_like(weight)
            gradient_of_weight(rows, states.flatten(0, -2), d_weight, in_float32=True)
        return d_states, d_weight, rows.sum(0).to(weight.dtype) if ctx.has_bias and to_bias else None


def linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, in_float32: bool = False
) -> torch.Tensor:
    """``states @ weight.T + bias``, [S, H] and [V, H] to [S, V] in their dtype."""
    if not in_float32:
        return nn.functional.linear(states, weight, bias)
    exact, output = states.float(), states.new_empty(len(states), len(weight))
    for part in _parts(weight):
        own = None if bias is None else bias[part].float()
        output[:, part] = nn.functional.linear(exact, weight[part].float(), own)
    return output


def gradient_of_states(gradient: torch.Tensor, weight: torch.Tensor, in_float32: bool = False) -> torch.Tensor:
    """``gradient @ weight``, [S, V] and [V, H] to [S, H]; float32 if it is computed in that."""
    if not in_float32:
        return gradient @ weight
    first, *others = _parts(weight)
    total = gradient[:, first].float() @ weight[first].float()
    for part in others:
        total += gradient[:, part].float() @ weight[part].float()
    return total


def gradient_of_weight(
    gradient: torch.Tensor, states: torch.Tensor, out: torch.Tensor, in_float32: bool = False
) -> None:
    """Put ``gradient.T @ states``, of [S, V] and [S, H], into ``out`` [V, H]."""
    if not in_float32:
        torch.mm(gradient.t(), states, out=out)
        return
    exact = states.float()
    for part in _parts(out):
        out[part] = gradient[:, part].float().t() @ exact


def _parts(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of ``weight`` that are brought to float32 together."""
    rows = max(1, _PART // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Transformers' ``sdpa``, in float32 for the layers that ``quicken`` marked; any other is left as it is."""
    if not getattr(module, _ATTENTION, False) or query.dtype != torch.bfloat16:
        output, _ = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
        return output, None
    dtype = query.dtype
    mask = args[0] if args else kwargs.pop("attention_mask", None)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    exact = (states.float() for states in (query, key, value))
    output, _ = sdpa_attention_forward(module, *exact, mask, *args[1:], **kwargs)
    return output.to(dtype), None


AttentionInterface.register("sdpa", sdpa)


def quicken(model: PreTrainedModel, pace: Pace) -> None:
    """Let the linear and attention layers of ``model`` compute as ``pace`` says, before it is cut.

    The head belongs to the loss, which does the same (``toolkit.loss``). Layers of other classes than ``nn.Linear``,
    such as quantised ones, stay as they are.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if pace.linear and type(module) is nn.Linear and module is not head:
            module.__class__ = Float32Linear
        if pace.attention and hasattr(module, "is_causal"):
            setattr(module, _ATTENTION, True)
    if pace.text:
        log.info("bfloat16 %s layers: products in float32, rounded once, which this CPU is faster at", pace.text)


def pace_in(model: nn.Module) -> Pace:
    """What ``quicken`` was told for ``model``."""
    modules = list(model.modules())
    linear = any(type(module) is Float32Linear for module in modules)
    return Pace(linear, any(hasattr(module, _ATTENTION) for module in modules))


def pace_of(dtype: torch.dtype, device: torch.device) -> Pace:
    """What is faster in float32 on this machine; measured once, and kept beside the converted models.

    It has to stay the same from run to run, because it moves the last bit of what is computed.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return Pace()
    return _kept(cache_root() / "float32-products.json")


@cache
def _kept(path: Path) -> Pace:
    machine = f"{_processor()}, torch {torch.__version__}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Pace(**known[machine])
    except (OSError, ValueError, KeyError, TypeError):
        pace = Pace(linear=_gain(_linear) >= _WORTH_IT, attention=_gain(_attention) >= _WORTH_IT)
    with suppress(OSError):  # a cache that cannot be written is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({machine: asdict(pace)}))
    return pace


def _processor() -> str:
    """The processor's name and whether it has tile units; the kernel's word where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value for key, value in facts.items()}
    tiles = " with AMX" if "amx_bf16" in found.get("flags", "").split() else ""
    return found.get("model name", platform.machine()).strip() + tiles


def _gain(work: Callable[[torch.dtype], Callable[[], object]]) -> float:
    """How many times faster ``work`` is in float32: the best of a few goes each, in turns.

    On one thread, by its own clock, so that other processes do not count.
    """
    goes = {dtype: work(dtype) for dtype in (torch.bfloat16, torch.float32)}
    best = dict.fromkeys(goes, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(8):
            for dtype, go in goes.items():
                start = time.thread_time()
                go()
                best[dtype] = min(best[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]


def _linear(dtype: torch.dtype) -> Callable[[], object]:
    states, weight = torch.ones(256, 512, dtype=torch.bfloat16), torch.ones(1024, 512, dtype=torch.bfloat16)
    return lambda: (states.to(dtype) @ weight.to(dtype).t()).to(torch.bfloat16)


def _attention(dtype: torch.dtype) -> Callable[[], object]:
    states = torch.ones(1, 8, 256, 64, dtype=torch.bfloat16)

    def go() -> object:
        own = states.to(dtype).requires_grad_()
        attended = nn.functional.scaled_dot_product_attention(own, own, own, is_causal=True)
        return torch.autograd.grad(attended.sum(), own)

    return go
