"""Choose length-dependent rotary frequencies by each sample alone, whatever else is in its batch.

LongRoPE (arXiv 2402.13753) and dynamic NTK scaling choose their frequencies by the longest position of a whole batch,
and the latter also by what ran before. A sample's loss would then depend on its neighbours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


def make_rotary_per_sample(model: nn.Module) -> None:
    """Let each rotary module of ``model`` whose frequencies depend on the length choose them sample by sample.

    Samples are told apart by their positions, which begin at 0. Padding must repeat its sample's last position, as
    ``Batch.forward_inputs`` gives it to such a model (``needs_position_ids``).
    """
    for module in model.modules():
        if _depends_on_length(module):
            original_class = type(module)
            cast(Any, module).__class__ = type(
                f"PerSample{original_class.__name__}", (_PerSampleRotary, original_class), {}
            )


def needs_position_ids(model: nn.Module) -> bool:
    """Return whether ``model`` must be told by position ids where each sample of a padded batch ends."""
    return any(isinstance(module, _PerSampleRotary) for module in model.modules())


class _PerSampleRotary(nn.Module):
    """Extends the class of a rotary module, which then runs sample by sample."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on each sample of ``position_ids`` [B, T], where samples begin at 0."""
        original_forward = super().forward
        if position_ids.dim() != 2 or position_ids.is_meta:  # on the meta device positions have no values
            return original_forward(x, position_ids, *args, **kwargs)
        rows = []
        for row in torch.split(position_ids, 1):
            outputs = []
            starts = (row[0, 1:] == 0).nonzero()[:, 0].add(1).tolist()
            for sample in torch.tensor_split(row, starts, dim=1):
                self._reset_dynamic_scaling()
                outputs.append(original_forward(x, sample, *args, **kwargs))
            rows.append(_concatenate(outputs, dim=1))
        return _concatenate(rows, dim=0)

    def _reset_dynamic_scaling(self) -> None:
        """Reset dynamic NTK scaling to its initial frequencies.

        The module keeps those of the longest text so far, which would make a sample's values depend on what ran before.
        """
        types = getattr(self, "rope_type", "")
        for prefix in ("",) if isinstance(types, str) else tuple(f"{kind}_" for kind in types):
            original = getattr(self, f"{prefix}original_inv_freq", None)
            if original is not None and hasattr(self, "original_max_seq_len"):
                setattr(self, f"{prefix}max_seq_len_cached", self.original_max_seq_len)
                self.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)


def _depends_on_length(module: nn.Module) -> bool:
    """Return True if a rotary module's frequencies depend on the length (dynamic NTK, LongRoPE)."""
    rope_type = getattr(module, "rope_type", None)
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


def _concatenate(parts: list[Any], dim: int) -> Any:
    """Concatenate rotary outputs along ``dim``: tuples of cosines and sines, or single tensors."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, dim)
    return tuple(torch.cat(tensors, dim) for tensors in zip(*parts, strict=True))
