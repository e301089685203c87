"""The supervised loss: cross entropy over the answers' tokens, as the mean over a whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from toolkit.data.batches import Batch
from toolkit.mask.row_layers import RowPlaces, TrainedRows
from toolkit.models.float32_gradients import gradient_of_states, gradient_of_weight, linear
from toolkit.split.logit_tiles import LogitFunction, add_statistics, replace_by_gradient, to_softmax_dtype

SuffixLoss = Callable[[torch.Tensor | None, Batch], torch.Tensor]
"""``Suffix.forward``: ``hidden[b]`` (None without a prefix) and a batch to the summed loss, a float32 scalar."""

TILE_BYTES = 2**27
"""Most bytes of a tile of logits, in the model's precision."""
COLUMN_MULTIPLE = 64
"""GPUs multiply a matrix whose rows are no multiple of 16 bytes several times slower."""


def supervised_loss(
    sum_loss: SuffixLoss, hidden: torch.Tensor | None, batch: Batch, global_tokens: float
) -> torch.Tensor:
    """Compute this micro batch's share of the global mean, ``sum(cross_entropy(logits, targets)) / global_tokens``.

    Shares add up, over micro batches and ranks, to the mean over all supervised tokens of the global batch; a mean of
    means would weigh short answers higher. A share is a float32 scalar with gradient; that of a filler is exactly 0.

    Args:
        sum_loss: ``engine.forward`` or a suffix, which return the cross entropy summed over the micro batch.
        hidden: [B, T, hidden_size] from the prefix; None without a prefix.
        batch: micro batch.
        global_tokens: supervised tokens of the optimizer step over all micro batches and ranks.
    """
    return sum_loss(hidden, batch) * (0.0 if batch.is_filler else 1.0 / global_tokens)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the cross entropy over S positions, with a softmax in float32 of logits [S, V] and targets [S]."""
    return torch.nn.functional.cross_entropy(to_softmax_dtype(logits), targets, reduction="sum")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    processing: LogitFunction | None = None,
    tile_bytes: int = TILE_BYTES,
    in_float32: bool = False,
    rows: TrainedRows | None = None,
) -> torch.Tensor:
    """Sum ``cross_entropy(processing(hidden @ weight.T + bias).float(), targets)`` without all of its logits.

    The vocabulary is divided into tiles, so that no more than ``tile_bytes`` of logits exist at once; the softmax's
    normaliser is accumulated over them. A single tile is kept for backward; of several none is kept, and backward
    computes each again. A row of the weight's gradient comes from one product over all positions, so tiles cost it no
    precision; that of ``hidden`` is added up over tiles in float32. Only the gradients that are asked for are computed.

    Args:
        hidden: [S, H].
        weight: [V, H] of the same dtype.
        bias: [V], or None.
        targets: [S] class indices from 0 to V - 1.
        processing: function of the logits, applied before the softmax; None leaves them as they are.
        tile_bytes: most bytes of a tile of logits, which has at least one column.
        in_float32: True computes products in float32 and rounds once (see ``toolkit.models.float32_gradients``).
        rows: rows that take the place of some of ``weight``'s, with a gradient of their own size; None if none do.

    Returns:
        A float32 scalar (float64 for float64 inputs).
    """
    width = tile_width(len(targets), len(weight), hidden.element_size(), tile_bytes)
    values, places = rows or (None, None)
    loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, values, processing, width, in_float32, places
    )
    return loss


def tile_width(positions: int, vocabulary: int, element_size: int, tile_bytes: int = TILE_BYTES) -> int:
    """Return the columns of a tile: as many as fit in ``tile_bytes``, then evened out over the tiles.

    Of several tiles all but the last have a multiple of ``COLUMN_MULTIPLE`` columns if they have as many.
    """
    most = max(1, tile_bytes // (max(1, positions) * element_size))
    if most < vocabulary:
        most -= most % COLUMN_MULTIPLE if most >= COLUMN_MULTIPLE else 0
    tiles = -(-vocabulary // most)
    width = -(-vocabulary // tiles)
    return min(most, width + -width % COLUMN_MULTIPLE) if tiles > 1 else width


def _tiles(vocabulary: int, width: int) -> Iterator[slice]:
    """Yield the vocabulary in slices of ``width`` columns, the last one shorter."""
    for start in range(0, vocabulary, width):
        yield slice(start, min(start + width, vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes ``linear_cross_entropy``; Cut Cross-Entropy (arXiv 2411.09009) does the same in one GPU kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        values: torch.Tensor | None,
        processing: LogitFunction | None,
        width: int,
        in_float32: bool,
        places: RowPlaces | None,
    ) -> torch.Tensor:
        softmax_dtype = torch.promote_types(hidden.dtype, torch.float32)
        normaliser = hidden.new_full((len(targets),), -torch.inf, dtype=softmax_dtype)
        target_logits = torch.zeros_like(normaliser)
        keep_logits = width >= len(weight) and any(ctx.needs_input_grad[:5])
        kept = None
        for tile in _tiles(len(weight), width):
            logits = _tile_of_logits(hidden, weight, bias, values, places, tile, in_float32)
            add_statistics(logits, targets, tile.start, normaliser, target_logits, processing)
            kept = logits if keep_logits else None
            del logits  # before the next tile is made
        ctx.save_for_backward(hidden, weight, bias, targets, values, normaliser, kept)
        ctx.processing, ctx.width, ctx.in_float32, ctx.places = processing, width, in_float32, places
        return (normaliser - target_logits).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight, bias, targets, values, normaliser, kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _, needs_values, *_ = ctx.needs_input_grad
        # The incoming gradient, a scalar, is folded into the softmax's exponent (magnitude) and into hidden (sign).
        # This saves a multiplication of [S, V] or [V, H], and the products see each value rounded once.
        magnitude, sign = gradient.abs(), gradient.sign().to(hidden.dtype)
        shift = normaliser - magnitude.log()
        signed_hidden = hidden * sign
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
        d_bias = torch.empty_like(bias) if needs_bias else None
        d_values = torch.empty_like(values) if needs_values else None
        d_hidden = None
        for tile in _tiles(len(weight), ctx.width):
            logits = kept
            if logits is None:
                logits = _tile_of_logits(hidden, weight, bias, values, ctx.places, tile, ctx.in_float32)
            replace_by_gradient(logits, targets, tile.start, shift, magnitude, ctx.processing)
            if d_weight is not None:
                gradient_of_weight(logits, signed_hidden, d_weight[tile], ctx.in_float32)
            if d_bias is not None:
                d_bias[tile] = logits.sum(0, dtype=shift.dtype) * sign
            from_rows = _gradients_of_rows(logits, signed_hidden, values, ctx.places, tile, d_values, ctx.in_float32)
            if needs_hidden:
                from_tile = gradient_of_states(logits, weight[tile], ctx.in_float32)
                if from_rows is not None:
                    from_tile = to_softmax_dtype(from_rows).add_(from_tile)
                d_hidden = from_tile if kept is not None else _accumulate(d_hidden, from_tile)
            del logits
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype) * sign
        return d_hidden, d_weight, d_bias, None, d_values, None, None, None, None


def _tile_of_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor | None,
    places: RowPlaces | None, tile: slice, in_float32: bool,
) -> torch.Tensor:  # fmt: skip
    """Return the logits [S, width] of a tile, of which the columns at ``places`` are those of ``values``."""
    tile_bias = None if bias is None else bias[tile]
    logits = linear(hidden, weight[tile], tile_bias, in_float32)
    if values is not None and places is not None and (within := places.within(tile)):
        part, columns = within
        own_bias = None if tile_bias is None else tile_bias[columns]
        logits[:, columns] = linear(hidden, values[part], own_bias, in_float32)
    return logits


def _gradients_of_rows(
    gradient: torch.Tensor, hidden: torch.Tensor, values: torch.Tensor | None, places: RowPlaces | None, tile: slice,
    out: torch.Tensor | None, in_float32: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Take the columns of the rows out of a tile's gradient [S, width], which then is that of the frozen table alone.

    Writes the gradient of the rows into ``out``, and returns their part of the states' gradient [S, H].
    """
    if values is None or places is None or (within := places.within(tile)) is None:
        return None
    part, columns = within
    own = gradient[:, columns].clone()
    gradient[:, columns] = 0
    if out is not None:
        gradient_of_weight(own, hidden, out[part], in_float32)
    return gradient_of_states(own, values[part], in_float32)


def _accumulate(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """Accumulate the gradient of hidden states over tiles, in the precision of the softmax, in place."""
    return to_softmax_dtype(part) if total is None else total.add_(part)
