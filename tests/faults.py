"""Faults for tests to plant: a loss or a gradient that is not finite, memory and disks that run out."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _BreakGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


@contextmanager
def plant(engine: Any, kind: str | None) -> Iterator[None]:
    """While entered, ``engine`` computes a NaN ``loss``, a finite loss with an infinite ``gradient``, or as ever."""
    original = engine.forward_loss

    def faulty(*arguments: Any) -> torch.Tensor:
        loss = original(*arguments)
        return loss * float("nan") if kind == "loss" else _BreakGradient.apply(loss)

    if kind is not None:
        engine.forward_loss = faulty
    try:
        yield
    finally:
        engine.__dict__.pop("forward_loss", None)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While entered, no file can grow beyond ``size`` bytes: writes stop in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
