"""How fast this machine is at the two things a step cannot do without: matrix products, and memory traffic."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

_REPEATS = 5
UPDATE_BYTES = 2 + 2 + 8 + 8 + 8 + 2
"""Bytes a trained bfloat16 parameter costs an update at least: read its gradient for the norm and again for the update,
read and write float32 master and both moments, write the weight."""


@dataclass(frozen=True)
class Products:
    """Times of the matrix products of the linear layers that train, measured alone."""

    forward: float
    """Seconds of ``x Wᵀ`` of all layers together."""
    input_gradient: float
    """Seconds of ``dy W``."""
    weight_gradient: float
    """Seconds of ``dyᵀ x``."""
    best_rate: float
    """Highest rate of any of them, in FLOP/s."""


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest seconds of several runs of ``work``, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_products(layers: Iterable[tuple[nn.Linear, int]], device: torch.device) -> Products:
    """Time the three products of each linear layer in its own precision.

    Args:
        layers: each with the number of positions it is given.
        device: where they run.
    """
    sizes = Counter((layer.out_features, layer.in_features, rows, layer.weight.dtype) for layer, rows in layers)
    totals, best = [0.0, 0.0, 0.0], 0.0
    for (out, into, rows, dtype), count in sizes.items():
        weight = torch.randn(out, into, device=device).to(dtype)
        x, dy = torch.randn(rows, into, device=device).to(dtype), torch.randn(rows, out, device=device).to(dtype)
        for kind, (a, b) in enumerate(((x, weight.T), (dy, weight), (dy.T, x))):
            seconds = best_seconds(partial(torch.mm, a, b), device)
            totals[kind] += count * seconds
            best = max(best, 2 * rows * out * into / seconds)
    return Products(totals[0], totals[1], totals[2], best)


def memory_bandwidth(device: torch.device, numel: int = 2**26) -> float:
    """Return the bytes a second that ``a += b`` reads and writes in float32, on arrays far larger than a cache."""
    a, b = torch.zeros(numel, device=device), torch.ones(numel, device=device)
    return 12 * numel / best_seconds(lambda: a.add_(b), device)
