"""Fit the readout of line_probe.py: gradients regressed on hidden states, every fold by the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

FOLDS = 4
RIDGES, DAMPINGS = (0.3, 1.0, 3.0, 10.0), (1.0, 3.0)
"""Ridges of the regression, times the mean of the kernel's diagonal; dampings of the Fisher matrix, times its own.

Its rank is at most the number of positions; with little damping the loss bends more than the matrix says."""
FAR = 2.0
"""Longest step, in steps that the Fisher matrix foretells as best."""


def readout_kernels(hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each frost line from the highest down, and the [N, N] kernel of a readout of the hidden states from it on.

    The kernel is 1, for a constant, plus the mean over the lines b … n of the inner products of the hidden states, each
    of which is scaled to a root mean square of 1 and divided by the root of its size.

    Args:
        hidden: [blocks + 1, N, hidden_size].
    """
    total = torch.zeros(hidden.shape[1], hidden.shape[1], device=hidden.device)
    for number, line in enumerate(range(len(hidden) - 1, -1, -1), start=1):
        states = torch.nn.functional.normalize(hidden[line].float(), dim=-1)
        total += states @ states.T
        if line < len(hidden) - 1:
            yield line, total / number + 1


def fisher_factors(slope: torch.Tensor, fold: torch.Tensor, damping: float) -> torch.Tensor:
    """Return [FOLDS, H, H] Cholesky factors of the damped Fisher matrix of ``slope`` [N, H] over each fold's others."""
    factors = []
    for number in range(FOLDS):
        others = slope[fold != number]
        fisher = others.T @ others / len(others)
        fisher.diagonal().add_(damping * fisher.diagonal().mean().clamp_min(1e-30))
        factors.append(torch.linalg.cholesky(fisher))
    return torch.stack(factors)


def out_of_fold(kernel: torch.Tensor, targets: torch.Tensor, fold: torch.Tensor, ridge: float) -> torch.Tensor:
    """Predict ``targets`` [N, H] of each fold by kernel ridge regression on the other folds."""
    predicted = torch.zeros_like(targets)
    for number in range(FOLDS):
        others, own = fold != number, fold == number
        fitted = kernel[others][:, others]
        fitted.diagonal().add_(ridge * kernel.diagonal().mean())
        predicted[own] = kernel[own][:, others] @ torch.cholesky_solve(targets[others], torch.linalg.cholesky(fitted))
    return predicted


def best_step(
    kernel: torch.Tensor, slope: torch.Tensor, fold: torch.Tensor, factors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the step [N, H] of each fold's rows: predicted negative gradients by the inverse Fisher matrix.

    Ridge, damping and length of a fold's step are those that serve the rows of the others best, to second order: of the
    largest decrease ``(-slope · d)² / (2 d · F d)`` of their loss, with d the direction and F the damped Fisher matrix.

    Args:
        kernel: [N, N] of the readout.
        slope: [N, H] gradients of the loss.
        fold: [N] folds.
        factors: ``fisher_factors`` of each damping.
    """
    owned = torch.nn.functional.one_hot(fold, FOLDS).to(slope.dtype)
    steps, decreases = [], []
    for ridge in RIDGES:
        predicted = out_of_fold(kernel, -slope, fold, ridge)
        for factor in factors:
            direction = torch.zeros_like(slope)
            for number in range(FOLDS):
                own = fold == number
                direction[own] = torch.cholesky_solve(predicted[own].T, factor[number]).T
            along, bend = ((direction * one).sum(1) @ owned for one in (-slope, predicted))  # [FOLDS] each
            along, bend = (along.sum() - along).clamp_min(0), (bend.sum() - bend).clamp_min(1e-30)
            decreases.append(along.square() / (2 * bend))
            steps.append(direction * (along / bend)[fold, None])
    best = torch.stack(decreases).argmax(0)
    return torch.stack(steps)[best[fold], torch.arange(len(fold), device=fold.device)]


def step_sizes(base: torch.Tensor, slope: torch.Tensor, trial: torch.Tensor, row_fold: torch.Tensor) -> torch.Tensor:
    """Return for each row how far to go along the direction, by the rows of the other folds.

    A parabola through the loss at 0, its slope there and the loss at 1 has its lowest point there, from 0 to ``FAR``.

    Args:
        base: [R] losses of the rows at 0.
        slope: [R] derivatives of their losses along the direction.
        trial: [R] their losses at 1.
        row_fold: [R] folds.
    """
    steps = torch.zeros_like(base)
    for number in range(FOLDS):
        others = row_fold != number
        down = -float(slope[others].sum())
        bend = float((trial - base - slope)[others].sum())
        far = down / (2 * bend) if bend > 0 else FAR
        steps[row_fold == number] = min(max(far, 0.0), FAR) if down > 0 else 0.0
    return steps


def mean_with_error(gains: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """Return the mean a token of gains [R] summed over rows with ``counts`` [R] tokens, and its standard error.

    The error is that of a ratio of two sums over rows, by linearisation.
    """
    rows, tokens = len(gains), float(counts.sum())
    mean = float(gains.sum()) / tokens
    spread = float((gains - mean * counts).square().sum())
    return mean, math.sqrt(spread * rows / (rows - 1)) / tokens
