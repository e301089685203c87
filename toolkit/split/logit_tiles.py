"""The cross entropy of one tile of logits and its gradient: Triton's kernels on NVIDIA cards, torch's elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import torch

from toolkit.runtime.triton_support import triton_trouble

LogitFunction = Callable[[torch.Tensor], torch.Tensor]
"""What a model does to its head's output; if it is applied in tiles, it is elementwise, [..., V'] to the same shape."""

BLOCK_BYTES = 2**22
"""Most bytes of a tile's logits that are converted to float32 at once; small enough for a core's cache."""
LARGE_BLOCK_BYTES = 2**26
"""The same on a GPU without Triton's kernels, and if the model processes its head's output: there, calls cost more."""


def add_statistics(
    logits: torch.Tensor, targets: torch.Tensor, first: int, normaliser: torch.Tensor, target_logits: torch.Tensor,
    processing: LogitFunction | None,
) -> None:  # fmt: skip
    """Add a tile to each row's log-sum-exp, and its target's logit if the tile has it. Overwrites these two.

    Args:
        logits: [S, W] with adjacent columns.
        targets: [S] int64, indices in the whole vocabulary.
        first: index of the tile's first column.
        normaliser: [S] float32, the log-sum-exp of the tiles before; minus infinity before the first.
        target_logits: [S] float32, 0 where no tile before had the target.
        processing: function of the logits, applied before the softmax; None leaves them as they are.
    """
    if has_kernels(logits, processing):
        _kernels().add_statistics(logits, targets, first, normaliser, target_logits)
        return
    for chunk in _row_chunks(logits, processing):
        within = _targets_in_tile(targets[chunk], first, logits.shape[1])
        log_sum, of_target = _log_sum_and_target(logits[chunk], within, processing)
        normaliser[chunk] = torch.logaddexp(normaliser[chunk], log_sum)
        target_logits[chunk] += of_target


def replace_by_gradient(
    logits: torch.Tensor, targets: torch.Tensor, first: int, shift: torch.Tensor, magnitude: torch.Tensor,
    processing: LogitFunction | None,
) -> None:  # fmt: skip
    """Overwrite a tile with its gradient, ``exp(logits - shift) - magnitude * one_hot(targets)``, rounded once.

    Args:
        logits: [S, W] with adjacent columns.
        targets: [S] int64, indices in the whole vocabulary.
        first: index of the tile's first column.
        shift: [S] float32, the normaliser less the logarithm of ``magnitude``.
        magnitude: float32 scalar, the size of the incoming gradient.
        processing: function of the logits, applied before the softmax; None leaves them as they are.
    """
    if has_kernels(logits, processing):
        _kernels().replace_by_gradient(logits, targets, first, shift, magnitude)
        return
    for chunk in _row_chunks(logits, processing):
        within = _targets_in_tile(targets[chunk], first, logits.shape[1])
        _logits_to_gradient(logits[chunk], shift[chunk], magnitude, within, processing)


def has_kernels(logits: torch.Tensor, processing: LogitFunction | None) -> bool:
    """Return whether Triton's kernels serve these logits; not if the model processes them, or in float64."""
    return processing is None and logits.dtype != torch.float64 and not triton_trouble(logits.device)


def kernel_text(device: torch.device, processing: LogitFunction | None) -> str:
    """Say for the log how a tile is computed on a GPU; empty elsewhere."""
    if device.type != "cuda":
        return ""
    if processing is not None:
        return "; tiles by torch's operations: the model changes its logits"
    trouble = triton_trouble(device)
    return f"; tiles by torch's operations: {trouble}" if trouble else "; tiles by Triton's kernels"


@cache
def _kernels() -> ModuleType:
    return importlib.import_module("toolkit.split.cross_entropy_kernels")  # it imports Triton, which many do without


def to_softmax_dtype(logits: torch.Tensor) -> torch.Tensor:
    """Convert logits to float32, or float64 if they have it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _row_chunks(logits: torch.Tensor, processing: LogitFunction | None) -> Iterator[slice]:
    """Yield slices of a tile's rows to convert to float32 together."""
    largest = LARGE_BLOCK_BYTES if processing is not None or logits.device.type == "cuda" else BLOCK_BYTES
    rows = max(1, largest // (4 * logits.shape[1]))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _targets_in_tile(targets: torch.Tensor, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's target as a column [rows, 1] of the tile (any if it lies elsewhere), and if it is there."""
    local = targets - first
    inside = (local >= 0) & (local < width)
    return local.clamp(0, width - 1).unsqueeze(1), inside


def _log_sum_and_target(
    logits: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor], processing: LogitFunction | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's log-sum-exp over the tile, and its target's logit (0 if that lies in another tile)."""
    index, inside = targets
    scores = to_softmax_dtype(logits if processing is None else processing(logits))
    return torch.logsumexp(scores, dim=1), scores.gather(1, index).squeeze(1).where(inside, 0.0)


def _logits_to_gradient(
    logits: torch.Tensor,
    shift: torch.Tensor,
    magnitude: torch.Tensor,
    targets: tuple[torch.Tensor, torch.Tensor],
    processing: LogitFunction | None,
) -> None:
    """Overwrite ``logits`` with their gradient: ``magnitude * (softmax - one_hot)``, back through ``processing``."""
    index, inside = targets
    if processing is None:
        head_output = processed = logits
    else:
        with torch.enable_grad():
            head_output = logits.detach().clone().requires_grad_()
            processed = processing(head_output)
    softmax_dtype = torch.promote_types(processed.dtype, torch.float32)
    # copied, as autograd may have saved the output of processing, which is changed in place here
    scores = processed.detach().to(softmax_dtype, copy=processing is not None)
    scores.sub_(shift.unsqueeze(1)).exp_()
    scores.scatter_(1, index, scores.gather(1, index) - magnitude.where(inside, 0.0).unsqueeze(1))
    if processing is not None:
        (scores,) = torch.autograd.grad(processed, head_output, scores.to(processed.dtype))
    if scores.data_ptr() != logits.data_ptr():
        logits.copy_(scores)
