"""Lay the hidden states of samples out as a batch has its tokens, and take them apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.data.batches import Batch


def unpad(hidden: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """Split hidden states [B, T, H] of a batch, or [1, T, H] of a packed one, into B views [T_i, H] without padding."""
    if batch.is_packed:
        return list(torch.split(hidden[0], list(batch.lengths)))
    return [row[:length] for row, length in zip(hidden, batch.lengths, strict=True)]


def lay_out(rows: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
    """Lay B samples [T_i, H] out as [B, T, H] with zeros as padding, or as a packed batch's [1, T, H]."""
    if batch.is_packed:
        return torch.cat(list(rows))[None]
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def lay_out_into(out: torch.Tensor, rows: Sequence[torch.Tensor], batch: Batch) -> None:
    """Write what ``lay_out`` returns into ``out``, which has its shape."""
    if batch.is_packed:
        torch.cat(list(rows), out=out[0])
        return
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
        line[len(row) :] = 0
