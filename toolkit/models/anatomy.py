"""The parts of a causal language model as plain names. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Part = Literal["embeddings", "block", "norm", "head", "other"]
Component = Literal["attention", "mlp", "norms"]


@dataclass(frozen=True)
class TensorInfo:
    """One parameter as the model names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: Part
    block: int | None = None
    """Index of the block it belongs to, counted from the input; none outside the blocks."""
    component: Component | None = None
    """Which part of its block it belongs to; none outside the blocks, and for what is none of the three."""
    alias_of: str | None = None
    """The tensor's own name, where weights are tied and this is another."""

    @property
    def can_train(self) -> bool:
        """True if it has a gradient; an integer table (which expert a token goes to) has none."""
        return "float" in self.dtype

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        count = 1
        for size in self.shape:
            count *= size
        return count


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
    """Module between the last block and the head, where there is one."""
    head: str
    """Module that turns hidden states into logits."""
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    """Every parameter name in the model's order, aliases of tied tensors included."""

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        """Tensor name to its description."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def tied_head(self) -> TensorInfo | None:
        """The head's tensor, where it shares its storage with the embeddings."""
        for tensor in self.tensors:
            if tensor.part == "head" and tensor.alias_of and self.by_name[tensor.alias_of].part == "embeddings":
                return tensor
        return None
