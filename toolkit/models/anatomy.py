"""The parts of a causal language model as plain names. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Part = Literal["embeddings", "block", "norm", "head", "other"]
Component = Literal["attention", "mlp", "norms"]


@dataclass(frozen=True)
class TensorInfo:
    """One parameter name of a model, and what is known of its tensor without the weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: Part
    block: int | None = None
    """Index of the block it belongs to, counted from the input; None outside the blocks."""
    component: Component | None = None
    """Part of the block that it belongs to; None outside the blocks, and for anything that is none of the three."""
    linear: tuple[int, int] | None = None
    """Input and output features of the linear layer whose weight this is; None for any other tensor."""
    alias_of: str | None = None
    """Canonical name of the tensor if its weight is tied and ``name`` is another name of it; else None."""

    @property
    def can_train(self) -> bool:
        """Return True for a floating-point tensor; an integer one (a table of experts by token id) has no gradient."""
        return "float" in self.dtype

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Anatomy:
    """Name the parts of a model, by module and tensor.

    Found by structure (``toolkit.models.anatomy_detection``), so it holds for models whose modules have other names.
    """

    embeddings: tuple[str, ...]
    """Module names of the token and position embeddings."""
    blocks: str
    """Name of the module list that holds the transformer blocks."""
    block_count: int
    norm: str | None
    """Name of the final norm, between the last block and the head; None if the model has none with parameters."""
    head: str
    """Name of the module that turns hidden states into logits."""
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    """Every parameter name in the model's order, aliases of tied tensors included."""
    token_table: str | None = None
    """Module name of the embedding table with one row for each token."""
    added: tuple[int, ...] = ()
    """Ids of the tokens that ``model.add_tokens`` added to the model and its deltas."""

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        """Map each tensor name to its description."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def tied_head(self) -> TensorInfo | None:
        """Return the head's tensor if it is tied to the embeddings; None if it is not."""
        for tensor in self.tensors:
            if tensor.part == "head" and tensor.alias_of and self.by_name[tensor.alias_of].part == "embeddings":
                return tensor
        return None
