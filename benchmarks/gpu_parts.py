"""The parts of ``benchmarks/gpu.py`` that measure single operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.floors import UPDATE_BYTES, synchronise
from benchmarks.gpu_table import Row, Sizes, has_bitsandbytes, median_ms
from toolkit.config.schema import OptimName
from toolkit.optim.kernel_choice import choose_kernels, kernels_if
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.optim.update_kernels import KernelFactory
from toolkit.split import logit_tiles
from toolkit.split.supervised_loss import TILE_BYTES, linear_cross_entropy

NEW_LENGTHS = range(301, 310)
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@contextmanager
def without_triton() -> Iterator[None]:
    """Use torch's operations in the place of Triton's kernels."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(logit_tiles, "triton_trouble", return_value="left out"))
        stack.enter_context(mock.patch("toolkit.engine.local.kernels_if", return_value=None))
        yield


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {"": nullcontext, ", no Triton": without_triton}
"""With what loss and steps are timed, as a context."""


def ceilings(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Measure what the device does at best."""
    source = torch.empty(sizes.copied // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    rate = 2 * sizes.copied / median_ms(lambda: target.copy_(source), device) / 1e9
    yield Row("copy on the device, TB/s read and written", f"{rate:.2f}")
    a, b = (torch.randn(sizes.product, sizes.product, device=device).bfloat16() for _ in range(2))
    rate = 2 * sizes.product**3 / median_ms(lambda: a @ b, device) / 1e9
    yield Row(f"bfloat16 product of {sizes.product} squared, TFLOP/s", f"{rate:.1f}")
    host = torch.zeros(sizes.sent // 2, dtype=torch.bfloat16)
    memories = {"pageable": host} | ({"pinned": host.pin_memory()} if device.type == "cuda" else {})
    for name, memory in memories.items():
        rate = sizes.sent / median_ms(partial(memory.to, device, non_blocking=True), device) / 1e6
        yield Row(f"host to device, {name}, GB/s", f"{rate:.1f}")
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION  # torch's first choice on an H100, and not of a run
    for name, backend in backends.items():
        with sdpa_kernel(backend):
            taken = [_attention_ms(length, device) for length in NEW_LENGTHS]
        yield Row(f"{name} attention of a new length, forward and backward, ms", f"{statistics.median(taken):.1f}")


def _attention_ms(length: int, device: torch.device) -> float:
    """Return the milliseconds of attention over one row, forward and backward; the first of its length in a process."""
    query, key, value = (torch.randn(1, 8, length, 64, device=device).bfloat16().requires_grad_() for _ in range(3))
    synchronise(device)
    started = time.perf_counter()
    torch.autograd.backward(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum())
    synchronise(device)
    return (time.perf_counter() - started) * 1e3


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ``norm(found - exact) / norm(exact)`` in float64."""
    expected = exact.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


def loss(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Compare the tiled loss and its gradients with float64, then time it with Triton's kernels, and without."""
    for positions, vocabulary, tile in ((37, 1003, 2**27), (700, 4099, 2**18), (700, 4099, 2**27)):
        for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            off = _loss_error(positions, vocabulary, tile, dtype, device)
            what = f"loss and gradients, S={positions} V={vocabulary} {_name(dtype)}, tiles of {tile:,} bytes"
            yield Row(f"{what}: error", f"{off:.1e}", f"{allowed:.0e}", off < allowed)
    positions, vocabulary, hidden_size = sizes.loss
    hidden = torch.randn(positions, hidden_size, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (positions,), device=device)

    def work(tile: int) -> None:
        torch.autograd.backward(linear_cross_entropy(hidden, weight, None, targets, tile_bytes=tile))
        hidden.grad = weight.grad = None

    for tile in (TILE_BYTES, 2**30):
        for title, variant in VARIANTS.items():
            with variant():
                taken = median_ms(partial(work, tile), device)
            yield Row(f"loss forward and backward{title}, S={positions}, tiles of {tile:,} bytes, ms", f"{taken:.1f}")


def _loss_error(positions: int, vocabulary: int, tile: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative error of the loss and of both gradients against float64."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(positions, 64, generator=generator), torch.randn(vocabulary, 64, generator=generator) * 0.3
    targets = torch.randint(vocabulary, (positions,), generator=generator).to(device)
    hidden, weight = (value.to(device, dtype).requires_grad_() for value in values)
    found = linear_cross_entropy(hidden, weight, None, targets, tile_bytes=tile)
    torch.autograd.backward(found / positions)
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    exact = nn.functional.cross_entropy(exact_hidden @ exact_weight.T, targets, reduction="sum")
    torch.autograd.backward(exact / positions)
    pairs = ((found[None], exact[None]), (hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad))
    return max(relative_error(a, b) for a, b in pairs if a is not None and b is not None)


@dataclass(frozen=True)
class Way:
    """One way to update."""

    title: str
    name: OptimName
    kernels: KernelFactory | None
    accumulates: bool = False


def update(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Compare the masters of each way with the CPU's float32 AdamW, then time it for one tensor and for many."""
    choice = choose_kernels(device)
    yield Row("update of float32 moments", choice.reason)
    ways = [Way("adamw by torch's kernels", "adamw", None)]
    if kernels := kernels_if(choice):
        ways += [
            Way("adamw by one kernel", "adamw", kernels),
            Way("adamw by one kernel, summed", "adamw", kernels, True),
        ]
    if has_bitsandbytes():
        ways.append(Way("adamw_8bit", "adamw_8bit", kernels))
    for dtype in (torch.bfloat16, torch.float32):
        expected, _ = masters_after(Way("", "adamw", None), dtype, torch.device("cpu"))
        for way in ways:
            found, steps = masters_after(way, dtype, device)
            off, allowed = relative_error(found, expected), 1e-6 if way.name == "adamw" else 2e-2
            holds = off < allowed and steps == 4
            yield Row(
                f"{way.title}, {_name(dtype)} weights: error of the masters", f"{off:.1e}", f"{allowed:.0e}", holds
            )
    top = [*sizes.shape.block().values()] * 4 + [(sizes.shape.vocabulary, sizes.shape.hidden)]
    for shapes in ([(sizes.updated // 256, 256)], top):
        for way in ways:
            yield _timed_update(shapes, way, device)
    if not has_bitsandbytes():
        yield Row("adamw_8bit", "left out: bitsandbytes is not installed")
    yield Row("bytes that an update of so many elements moves, GB", f"{UPDATE_BYTES * sizes.updated / 1e9:.2f}")


def _timed_update(shapes: Sequence[tuple[int, ...]], way: Way, device: torch.device) -> Row:
    """Time an update of bfloat16 tensors, with norm and clipping."""
    weights = {str(i): nn.Parameter(torch.zeros(shape, device=device).bfloat16()) for i, shape in enumerate(shapes)}
    gradients = [torch.randn_like(weight) for weight in weights.values()]
    optimizer = MasterAdamW(
        weights, _groups(weights.values()), 1.0, way.accumulates, name=way.name, kernels=way.kernels
    )

    def work() -> None:
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        optimizer.collect()
        optimizer.step()

    elements = sum(weight.numel() for weight in weights.values())
    what = f"update of {elements / 1e6:.1f} M elements in {len(weights)} tensor(s), {way.title}, ms"
    return Row(what, f"{median_ms(work, device):.2f}")


def _groups(weights: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the parameter groups of a recipe: matrices, then vectors, which do not decay."""
    every = list(weights)
    parts = (
        ([w for w in every if w.ndim > 1], ADAMW),
        ([w for w in every if w.ndim < 2], {**ADAMW, "weight_decay": 0.0}),
    )
    return [{**settings, "params": members} for members, settings in parts if members]


def masters_after(way: Way, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, float]:
    """Return all masters and the number of updates after five steps, of which the third has an infinite gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        str(shape): nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in ((300, 256), (257,), (1000, 64))  # of the vector no end is aligned
    }
    optimizer = MasterAdamW(
        weights, _groups(weights.values()), 1.0, way.accumulates, name=way.name, kernels=way.kernels
    )
    for step in range(5):
        for weight in weights.values():
            gradient = torch.randn(weight.shape, generator=generator)
            if step == 2:
                gradient.view(-1)[0] = float("inf")  # this step must change nothing
            weight.grad = gradient.to(device, dtype)
        optimizer.collect()
        optimizer.step()
    states = list(optimizer.by_name.values())
    return torch.cat([state.read()["master"].cpu() for state in states]), float(states[0].updates)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
