"""The parts of ``benchmarks/gpu.py`` that measure single operations, and what all its parts share."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import nn

from benchmarks.floors import UPDATE_BYTES, synchronise
from benchmarks.shapes import EXAONE_2_4B, Shape
from toolkit.config.schema import OptimName
from toolkit.optim import master_adamw
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.split import supervised_loss
from toolkit.split.supervised_loss import linear_cross_entropy

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
CHUNK = 320 * 65_536
"""Elements of one launch of torch's multi-tensor kernels: 320 blocks of 65,536."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: str
    bound: str = ""
    holds: bool | None = None
    """Whether the bound holds; None for a row without a bound."""

    @property
    def cells(self) -> list[str]:
        """Return the line's cells."""
        return [self.what, self.value, self.bound, {None: "", True: "ok", False: "MISS"}[self.holds]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured."""

    copied: int
    """Bytes of the tensor that is copied within the device."""
    product: int
    """Rows and columns of the square matrices that are multiplied."""
    sent: int
    """Bytes that go from the host to the device."""
    loss: tuple[int, int, int]
    """S supervised positions, V tokens of the vocabulary, H hidden size."""
    updated: int
    """Elements that an optimizer updates."""
    shape: Shape
    """Of the model whose steps are timed."""
    batches: tuple[tuple[int, int, int], ...]
    """Rows, tokens a row and supervised tokens a row of each timed batch."""
    rows: int
    """Rows of the short runs, of which a quarter is held out."""


SIZES = {
    "cuda": Sizes(
        2**31, 8192, 8 * 2048 * 2560 * 2, (2048, 102_400, 2560), 214_016 * 2560, EXAONE_2_4B,
        ((1, 700, 60), (1, 700, 699), (8, 2048, 256), (4, 2048, 2047)), 20,
    ),
    "cpu": Sizes(
        2**20, 64, 2**16, (16, 256, 16), 2**16, Shape(32, 6, 4, 2, 64, 260), ((1, 32, 8), (2, 32, 16)), 4
    ),
}  # fmt: skip
"""By device; on a CPU so small that the script itself is tried."""


def measure(parts: Sequence[str], device: str) -> list[Row]:
    """Measure the named parts one after the other; one that raises is a missed bound, and the others go on."""
    from benchmarks import gpu_runs

    functions: dict[str, Callable[[torch.device, Sizes], Iterator[Row]]] = {
        "ceilings": ceilings, "loss": loss, "update": update, "runs": gpu_runs.runs, "steps": gpu_runs.steps,
    }  # fmt: skip
    rows: list[Row] = []
    for part in parts:
        try:
            for row in functions[part](torch.device(device), SIZES[device]):
                print(" ".join(row.cells), file=sys.stderr, flush=True)
                rows.append(row)
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(f"{part} to its end", type(error).__name__, "no error", holds=False))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def median_ms(work: Callable[[], object], device: torch.device, repeats: int = 5, warm_up: int = 2) -> float:
    """Return the median time of several runs in milliseconds, the device's work included."""
    times = []
    for _ in range(warm_up + repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_up:]) * 1e3


def has_bitsandbytes() -> bool:
    """Return whether bitsandbytes is installed, which the 8-bit optimizers and 4-bit weights need."""
    return importlib.util.find_spec("bitsandbytes") is not None


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


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ``norm(found - exact) / norm(exact)`` in float64."""
    expected = exact.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


def loss(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Compare the tiled loss and its gradients with float64, then time it by ``BLOCK_BYTES``."""
    for positions, vocabulary, tile in ((37, 1003, 2**27), (700, 4099, 2**18), (700, 4099, 2**27)):
        for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            off = _loss_error(positions, vocabulary, tile, dtype, device)
            what = f"loss and gradients, S={positions} V={vocabulary} {_name(dtype)}, tiles of {tile:,} bytes"
            yield Row(f"{what}: error", f"{off:.1e}", f"{allowed:.0e}", off < allowed)
    positions, vocabulary, hidden_size = sizes.loss
    hidden = torch.randn(positions, hidden_size, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (positions,), device=device)

    def work() -> None:
        torch.autograd.backward(linear_cross_entropy(hidden, weight, None, targets))
        hidden.grad = weight.grad = None

    for size in (supervised_loss.BLOCK_BYTES, 2**26, 2**31):
        with mock.patch.object(supervised_loss, "BLOCK_BYTES", size):
            taken = median_ms(work, device)
        yield Row(f"loss forward and backward, S={positions}, blocks of {size:,} bytes, ms", f"{taken:.1f}")


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


def update(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Compare each optimizer's masters with the CPU's float32 AdamW, then time an update by its piece."""
    names: tuple[OptimName, ...] = ("adamw", "adamw_bf16", *(("adamw_8bit",) if has_bitsandbytes() else ()))
    for name in names:
        allowed = 1e-6 if name == "adamw" else 2e-2
        for dtype in (torch.bfloat16, torch.float32):
            found, steps = masters_after(name, dtype, device)
            expected, _ = masters_after("adamw", dtype, torch.device("cpu"))
            off = relative_error(found, expected)
            holds = off < allowed and steps == 4
            yield Row(f"{name}, {_name(dtype)} weights: error of the masters", f"{off:.1e}", f"{allowed:.0e}", holds)
    weight = nn.Parameter(torch.zeros(sizes.updated // 256, 256, dtype=torch.bfloat16, device=device))
    gradient = torch.randn_like(weight)
    for name in names:
        for piece in (master_adamw.LARGEST_PIECE, CHUNK, 2**27) if name == "adamw" else (master_adamw.LARGEST_PIECE,):
            settings = [{**ADAMW, "params": [weight]}]
            optimizer = MasterAdamW({"weight": weight}, settings, 1.0, piece=piece, name=name)

            def work(optimizer: MasterAdamW = optimizer) -> None:
                weight.grad = gradient
                optimizer.step()

            what = f"update of {weight.numel() / 1e6:.1f} M elements, {name}, pieces of {piece / 2**20:.0f} Mi, ms"
            yield Row(what, f"{median_ms(work, device):.2f}")
            del optimizer, work
    if not has_bitsandbytes():
        yield Row("adamw_8bit", "left out: bitsandbytes is not installed")
    yield Row("bytes that an update moves, GB", f"{UPDATE_BYTES * weight.numel() / 1e9:.2f}")


def masters_after(name: OptimName, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, float]:
    """Return all masters and the number of updates after five steps, of which the third has an infinite gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        str(shape): nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in ((300, 256), (257,), (1000, 64))
    }
    optimizer = MasterAdamW(weights, [{**ADAMW, "params": list(weights.values())}], 1.0, name=name)
    for step in range(5):
        for weight in weights.values():
            gradient = torch.randn(weight.shape, generator=generator)
            if step == 2:
                gradient.view(-1)[0] = float("inf")  # this step must change nothing
            weight.grad = gradient.to(device, dtype)
        optimizer.step()
    states = list(optimizer.by_name.values())
    return torch.cat([state.read()["master"].cpu() for state in states]), float(states[0].updates)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
