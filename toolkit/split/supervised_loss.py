"""The supervised loss: cross entropy over the answers' tokens, as the mean over a whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from toolkit.data.batches import Batch
from toolkit.models.float32_gradients import gradient_of_states, gradient_of_weight, linear

Forward = Callable[[torch.Tensor | None, Batch], torch.Tensor]
"""``hidden[b]`` (or none) and a batch to the cross entropy summed over its supervised positions, a float32 scalar."""

LogitFunction = Callable[[torch.Tensor], torch.Tensor]
"""What a model does to its head's output; applied in tiles, it is elementwise: any [..., V'] to the same shape."""

TILE_BYTES = 2**27
"""Most bytes of logits at once, in the model's precision."""
BLOCK_BYTES = 2**22
"""Most bytes of float32 scores at once; small enough for a core's cache."""
PROCESSED_BYTES = 2**26
"""The same where something is done to the head's output."""


def supervised_loss(forward: Forward, hidden: torch.Tensor | None, batch: Batch, global_tokens: float) -> torch.Tensor:
    """Compute this micro batch's share of the global mean, ``sum(cross_entropy(logits, targets)) / global_tokens``.

    Shares add up, over micro batches and ranks, to the mean over all supervised tokens of the global batch; a mean of
    means would weigh short answers higher. The softmax is computed in float32.

    Args:
        forward: runs the suffix.
        hidden: [B, T, hidden_size] from the prefix; none where there is none.
        batch: the micro batch; a filler gives exactly 0.
        global_tokens: supervised tokens of the optimizer step over all micro batches and ranks.

    Returns:
        A float32 scalar with gradient.
    """
    return forward(hidden, batch) * (0.0 if batch.is_filler else 1.0 / global_tokens)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the cross entropy over S positions, with a softmax in float32 of logits [S, V] and targets [S]."""
    return torch.nn.functional.cross_entropy(_scores(logits), targets, reduction="sum")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    processing: LogitFunction | None = None,
    tile_bytes: int = TILE_BYTES,
    in_float32: bool = False,
) -> torch.Tensor:
    """Sum ``cross_entropy(processing(hidden @ weight.T + bias).float(), targets)`` without all of its logits.

    The vocabulary is taken in tiles, so that no more than ``tile_bytes`` of logits exist at once; the softmax's
    normaliser is built up over them. One tile is kept for backward; of several nothing is kept, and backward computes
    each again. A row of the weight's gradient comes from one product over all positions, so tiles cost it no precision;
    that of ``hidden`` is added up over tiles in float32. Only the gradients that are asked for are computed.

    Args:
        hidden: [S, H].
        weight: [V, H] of the same dtype.
        bias: [V], or none.
        targets: [S] class indices from 0 to V - 1.
        processing: what is done to the logits before the softmax; none is nothing.
        tile_bytes: at least one column of logits is computed at a time, however small this is.
        in_float32: products are computed in float32 and rounded once (see ``toolkit.models.float32_gradients``).

    Returns:
        A float32 scalar (float64 for float64 inputs).
    """
    width = tile_width(len(targets), len(weight), hidden.element_size(), tile_bytes)
    loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, processing, width, in_float32
    )
    return loss


def tile_width(positions: int, vocabulary: int, element_size: int, tile_bytes: int = TILE_BYTES) -> int:
    """Return the columns of a tile: as many as fit, in tiles of about the same width."""
    most = max(1, tile_bytes // (max(1, positions) * element_size))
    tiles = -(-vocabulary // most)
    return -(-vocabulary // tiles)


def _tiles(vocabulary: int, width: int) -> Iterator[slice]:
    for start in range(0, vocabulary, width):
        yield slice(start, min(start + width, vocabulary))


def _blocks(logits: torch.Tensor, processing: LogitFunction | None) -> Iterator[slice]:
    """Yield rows of a tile to convert to float32 together; ``processing`` runs a model's Python, so not too few."""
    rows = max(1, (BLOCK_BYTES if processing is None else PROCESSED_BYTES) // (4 * logits.shape[1]))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _scores(logits: torch.Tensor) -> torch.Tensor:
    """Convert logits to the precision of the softmax."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes ``linear_cross_entropy``; Cut Cross-Entropy (arXiv 2411.09009) does the same in one GPU kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        processing: LogitFunction | None,
        width: int,
        in_float32: bool,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        normaliser = hidden.new_full((len(targets),), -torch.inf, dtype=exact)
        picked = torch.zeros_like(normaliser)
        keep = width >= len(weight) and any(ctx.needs_input_grad[:3])
        kept = None
        for tile in _tiles(len(weight), width):
            logits = linear(hidden, weight[tile], None if bias is None else bias[tile], in_float32)
            for rows in _blocks(logits, processing):
                own, chosen = _summarise(logits[rows], _own_targets(targets[rows], tile), processing)
                normaliser[rows] = torch.logaddexp(normaliser[rows], own)
                picked[rows] += chosen
            kept = logits if keep else None
            del logits  # before the next tile is made
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, kept)
        ctx.processing, ctx.width, ctx.in_float32 = processing, width, in_float32
        return (normaliser - picked).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight, bias, targets, normaliser, kept = ctx.saved_tensors
        to_hidden, to_weight, to_bias, *_ = ctx.needs_input_grad
        # the scale enters the softmax's exponent and the small factors: a pass of its own over [S, V] or [V, H] it has
        # none, and products see each value rounded once
        size, sign = gradient.abs(), gradient.sign().to(hidden.dtype)
        shift = normaliser - size.log()
        signed = hidden * sign
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if to_weight else None
        d_bias = torch.empty_like(bias) if to_bias else None
        d_hidden = None
        for tile in _tiles(len(weight), ctx.width):
            logits = kept
            if logits is None:
                logits = linear(hidden, weight[tile], None if bias is None else bias[tile], ctx.in_float32)
            for rows in _blocks(logits, ctx.processing):
                _differentiate(logits[rows], shift[rows], size, _own_targets(targets[rows], tile), ctx.processing)
            if d_weight is not None:
                gradient_of_weight(logits, signed, d_weight[tile], ctx.in_float32)
            if d_bias is not None:
                d_bias[tile] = logits.sum(0, dtype=shift.dtype) * sign
            if to_hidden:
                part = gradient_of_states(logits, weight[tile], ctx.in_float32)
                d_hidden = part if kept is not None else _added(d_hidden, part)
            del logits
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype) * sign
        return d_hidden, d_weight, d_bias, None, None, None, None


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return _scores(part) if total is None else total.add_(part)


def _own_targets(targets: torch.Tensor, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's target as a column [rows, 1] of the tile (any if it lies elsewhere), and if it is there."""
    local = targets - tile.start
    inside = (local >= 0) & (local < tile.stop - tile.start)
    return local.clamp(0, tile.stop - tile.start - 1).unsqueeze(1), inside


def _summarise(
    logits: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor], processing: LogitFunction | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's logarithm of summed exponentials and its target's score (0 if that lies elsewhere)."""
    index, inside = targets
    scores = _scores(logits if processing is None else processing(logits))
    return torch.logsumexp(scores, dim=1), scores.gather(1, index).squeeze(1).where(inside, 0.0)


def _differentiate(
    logits: torch.Tensor,
    shift: torch.Tensor,
    size: torch.Tensor,
    targets: tuple[torch.Tensor, torch.Tensor],
    processing: LogitFunction | None,
) -> None:
    """Put into ``logits`` the gradient with respect to them: ``size * (softmax - one_hot)``, through ``processing``."""
    index, inside = targets
    if processing is None:
        before = after = logits
    else:
        with torch.enable_grad():
            before = logits.detach().clone().requires_grad_()
            after = processing(before)
    exact = torch.promote_types(after.dtype, torch.float32)
    scores = after.detach().to(exact, copy=processing is not None)  # autograd may have kept what processing gave
    scores.sub_(shift.unsqueeze(1)).exp_()
    scores.scatter_(1, index, scores.gather(1, index) - size.where(inside, 0.0).unsqueeze(1))
    if processing is not None:
        (scores,) = torch.autograd.grad(after, before, scores.to(after.dtype))
    if scores.data_ptr() != logits.data_ptr():
        logits.copy_(scores)
