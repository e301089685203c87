"""Rotary frequencies that change with a text's length: those of each sample, whoever shares its batch.

LongRoPE (arXiv 2402.13753) and dynamic NTK scaling choose their frequencies by the longest position of a whole batch,
and the latter also by what ran before. A sample's loss would then depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn


def make_rotary_per_sample(model: nn.Module) -> None:
    """Let each rotary module of ``model`` whose frequencies change with the length choose them sample by sample.

    Samples are told apart by their positions, which begin at 0. Padding has to repeat its sample's last position, as
    ``Batch.layout`` gives it to such a model (``needs_lengths``).
    """
    for module in model.modules():
        if _changes_with_length(module):
            kind = type(module)
            cast(Any, module).__class__ = type(f"PerSample{kind.__name__}", (_PerSample, kind), {})


def needs_lengths(model: nn.Module) -> bool:
    """Return whether a padded batch has to tell ``model`` by positions where its samples end."""
    return any(isinstance(module, _PerSample) for module in model.modules())


class _PerSample(nn.Module):
    """Extends the class of a rotary module."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module's own forward does, with each sample's frequencies.

        Args:
            x: anything of the dtype and on the device of the result.
            position_ids: [B, T], where each sample begins at 0.
            args: the module's own.
            kwargs: the module's own.
        """
        own = super().forward
        if position_ids.dim() != 2 or position_ids.is_meta:  # a plan has no positions to look at
            return own(x, position_ids, *args, **kwargs)
        rows = []
        for row in torch.split(position_ids, 1):
            pieces = []
            for piece in _samples(row):
                self._forget_length()
                pieces.append(own(x, piece, *args, **kwargs))
            rows.append(_joined(pieces, dim=1))
        return _joined(rows, dim=0)

    def _forget_length(self) -> None:
        """Put dynamic scaling back to where it begins: it keeps the frequencies of the longest text so far."""
        types = getattr(self, "rope_type", "")
        for prefix in ("",) if isinstance(types, str) else tuple(f"{kind}_" for kind in types):
            original = getattr(self, f"{prefix}original_inv_freq", None)
            if original is not None and hasattr(self, "original_max_seq_len"):
                setattr(self, f"{prefix}max_seq_len_cached", self.original_max_seq_len)
                self.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)


def _changes_with_length(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    named = types.values() if isinstance(types, dict) else [types]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named)


def _samples(positions: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the samples of a row [1, T], each [1, T_i]."""
    starts = [0, *(positions[0, 1:] == 0).nonzero()[:, 0].add(1).tolist(), positions.shape[1]]
    for start, end in pairwise(starts):
        yield positions[:, start:end]


def _joined(parts: list[Any], dim: int) -> Any:
    """Concatenate the parts' cosines and sines, or their one tensor of both."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim)
    return tuple(torch.cat(tensors, dim) for tensors in zip(*parts, strict=True))
