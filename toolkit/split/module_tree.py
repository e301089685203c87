"""Copy a model's module tree with placeholders for some modules, and extend the classes of others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy


def copy_module_tree(
    model: PreTrainedModel, replacements: Mapping[nn.Module, nn.Module], own_parameters: bool = False
) -> PreTrainedModel:
    """Copy ``model`` with ``replacements`` for some of its modules; the copy shares the model's storage but no module.

    ``own_parameters`` makes new parameter objects on the same storage: ZeRO-3 empties the parameters that it is given,
    and a frozen tied table is in both halves.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # recurrent models keep their last state as a plain attribute, graph and all
        shared |= {id(value): value for value in vars(module).values() if isinstance(value, torch.Tensor)}
    if own_parameters:
        shared |= {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    shared[id(model.config)] = model.config
    shared |= {id(old): new for old, new in replacements.items()}
    return copy.deepcopy(model, shared)


def entry_name(anatomy: Anatomy, boundary: int) -> str:
    """Return the name of the first module above the frost line: block ``boundary``, else the final norm or the head."""
    return f"{anatomy.blocks}.{boundary}" if boundary < anatomy.block_count else anatomy.norm or anatomy.head


def final_norm(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Return the name of the final norm; one without parameters (OLMo's) is not in the anatomy."""
    parent = anatomy.blocks.rpartition(".")[0]
    without_parameters = [
        f"{parent}.{name}".lstrip(".")
        for name, child in model.get_submodule(parent).named_children()
        if "norm" in type(child).__name__.lower() and not any(True for _ in child.parameters())
    ]
    return anatomy.norm or (without_parameters[0] if len(without_parameters) == 1 else None)


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a module's call, positional and by keyword."""


class StopForward(Exception):
    """Ends a forward pass through a model's own code, and holds the arguments of the call at which it ended."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call: Call = args, kwargs


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states among a call's arguments."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a call's arguments with its hidden states replaced by ``hidden``."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


class EndOfPass(nn.Module):
    """Extends the class of a module whose call can end a forward pass through the model's own code."""

    ends_pass = False
    """True if the current pass is to end at this module; ``Suffix`` sets it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; if ``ends_pass``, raise ``StopForward`` instead.

        This overrides ``__call__`` to come before the module's hooks, of which ZeRO-3's gathers its weights.
        """
        if self.ends_pass:
            raise StopForward(args, kwargs)
        return super().__call__(*args, **kwargs)


class BlockList(nn.ModuleList):
    """Extends the class of the list of blocks, of which a slice is a plain list.

    A model's code that runs ``layers[:n]`` has torch build and check a new module list in each pass, in which a GPU may
    wait for the host: 0.1 ms for 30 blocks.
    """

    def __getitem__(self, index: Any) -> Any:
        """Return one block, or the list of a slice's."""
        return list(self._modules.values())[index] if isinstance(index, slice) else super().__getitem__(index)


class Placeholder(nn.Module):
    """Takes a module's place without its parameters; has its other attributes, which models read (layer_idx)."""

    def __init__(self, original: nn.Module | None = None) -> None:
        super().__init__()
        module_attributes = set(vars(self))
        for name, value in vars(original).items() if original is not None else ():
            if name not in module_attributes and not isinstance(value, (nn.Module, torch.Tensor)):
                setattr(self, name, value)


class Absent(Placeholder):
    """Takes the place, in the prefix, of a module above the frost line, which a forward pass must not reach."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: the pass should have ended before."""
        raise RuntimeError("the prefix ran past the frost line")


class PrefixEnd(Placeholder):
    """Takes the place, in the prefix, of the first module above the frost line."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """End the pass, with the arguments of this call."""
        raise StopForward(args, kwargs)


class PassThrough(Placeholder):
    """Takes the place, in the suffix, of a block below the frost line with ``output_count`` outputs.

    The count is None if the block returns a bare tensor instead of a tuple.
    """

    def __init__(self, block: nn.Module, output_count: int | None) -> None:
        super().__init__(block)
        self._output_count = output_count

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states as they came in, and None for every other output."""
        if self._output_count is None:
            return hidden_states
        return (hidden_states, *[None] * (self._output_count - 1))


class EmbeddingStub(Placeholder):
    """Takes the place, in the suffix, of an embedding table; its output is replaced at the frost line."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__(table)
        self.register_buffer("weight", torch.empty(0, dtype=next(table.parameters()).dtype), persistent=False)

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return a zero that broadcasts to any shape."""
        return torch.zeros((), device=ids.device)


def placeholders_below(
    model: nn.Module, anatomy: Anatomy, boundary: int, output_counts: Sequence[int | None]
) -> dict[nn.Module, nn.Module]:
    """Return the placeholders, in a suffix, of each block below ``boundary`` and each embedding table.

    A table that is tied to the head stays. ``output_counts`` are ``Prefix.block_output_counts``.
    """
    head: Any = model.get_submodule(anatomy.head)
    below = list(model.get_submodule(anatomy.blocks).children())[:boundary]
    placeholders: dict[nn.Module, nn.Module] = {
        block: PassThrough(block, count) for block, count in zip(below, output_counts, strict=True)
    }
    for table in map(model.get_submodule, anatomy.embeddings):
        if getattr(table, "weight", None) is not head.weight:
            placeholders[table] = EmbeddingStub(table)
    return placeholders
