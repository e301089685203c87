"""Linear layers of bfloat16 weights on a CPU, whose rows are padded to a multiple of 32.

For each number of rows that a bfloat16 product meets, oneDNN compiles code and keeps it until the process ends: 0.25
MiB a shape, even without its cache of primitives (torch 2.13). A model with adapters has some thirty shapes, so rows of
200 different lengths keep more memory than a small model takes.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

ROW_MULTIPLE = 32
"""Numbers of rows are rounded up to a multiple of it; as few rows, and fewer, are left alone."""


class PaddedLinear(nn.Linear):
    """``nn.Linear`` that pads its rows with zeros, where there are more than ``ROW_MULTIPLE`` of them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Compute ``linear(input)``, […, in_features] to […, out_features]."""
        return padded_linear(input, self.weight, self.bias)


def padded_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute ``linear(states, weight, bias)``; more than ``ROW_MULTIPLE`` rows are padded to a multiple of it."""
    rows = states.flatten(0, -2)
    if len(rows) <= ROW_MULTIPLE:
        return nn.functional.linear(states, weight, bias)
    padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROW_MULTIPLE))
    return nn.functional.linear(padded, weight, bias)[: len(rows)].view(*states.shape[:-1], -1)


def pad_rows(model: nn.Module) -> None:
    """Let the plain linear layers of ``model`` pad their rows, all but the head, whose rows the loss takes in tiles."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = PaddedLinear
