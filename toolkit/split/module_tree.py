"""Copies of a model's module tree in which other modules stand in some places."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy


def copy_module_tree(
    model: PreTrainedModel, replaced: dict[nn.Module, nn.Module], own_parameters: bool = False
) -> PreTrainedModel:
    """A copy of ``model`` with other modules in some places, which shares the model's storage but no module.

    Args:
        model: is not changed.
        replaced: modules of ``model`` and what stands in their places in the copy.
        own_parameters: parameter objects of its own on the same storage, out of reach of ZeRO-3, which empties those
            it is given (a frozen tied table is in both halves).
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # recurrent models keep their last state as a plain attribute, graph and all
        shared |= {id(value): value for value in vars(module).values() if isinstance(value, torch.Tensor)}
    if own_parameters:
        shared |= {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    shared[id(model.config)] = model.config
    shared |= {id(old): new for old, new in replaced.items()}
    return copy.deepcopy(model, shared)


def entry_module(model: nn.Module, anatomy: Anatomy, boundary: int) -> nn.Module:
    """Return the first module above the frost line: block ``boundary``, or the final norm or head above the last."""
    if boundary < anatomy.block_count:
        return model.get_submodule(f"{anatomy.blocks}.{boundary}")
    return model.get_submodule(anatomy.norm or anatomy.head)


class Arrived(Exception):
    """Ends a pass at the frost line and carries what would have gone on."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Stand(nn.Module):
    """Stands where a module was and lends its plain attributes (attention_type, layer_idx), without its parameters."""

    def __init__(self, original: nn.Module | None = None) -> None:
        super().__init__()
        own = set(vars(self))
        for name, value in vars(original).items() if original is not None else ():
            if name not in own and not isinstance(value, (nn.Module, torch.Tensor)):
                setattr(self, name, value)


class Absent(Stand):
    """In place of what lies above the line, where a pass never comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Always fails."""
        raise RuntimeError("the prefix ran past the frost line")


class Arrival(Stand):
    """In place of the first module above the line."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Ends the pass with what it is given."""
        raise Arrived(hidden_states)


class PassThrough(Stand):
    """In place of a block below the line."""

    def __init__(self, block: nn.Module, returned: int | None) -> None:
        """
        Args:
            block: what it stands for.
            returned: length of the tuple that the block returns, none if it returns the hidden states alone.
        """  # noqa: D205, D212
        super().__init__(block)
        self._returned = returned

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What comes in, in the form in which the block returns it."""
        if self._returned is None:
            return hidden_states
        return (hidden_states, *[None] * (self._returned - 1))


class EmbeddingStub(Stand):
    """In place of an embedding table; what it gives is replaced at the frost line."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__(table)
        self.register_buffer("weight", torch.empty(0, dtype=next(table.parameters()).dtype), persistent=False)

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero that broadcasts."""
        return torch.zeros((), device=ids.device)
