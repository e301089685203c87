"""Copy a model's module tree, with other modules in some places or other classes of some modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy


def copy_module_tree(
    model: PreTrainedModel, replaced: dict[nn.Module, nn.Module], own_parameters: bool = False
) -> PreTrainedModel:
    """Copy ``model`` with other modules in some places; the copy shares the model's storage but no module.

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


def entry_name(anatomy: Anatomy, boundary: int) -> str:
    """Name the first module above the frost line: block ``boundary``, or the final norm or head above the last."""
    return f"{anatomy.blocks}.{boundary}" if boundary < anatomy.block_count else anatomy.norm or anatomy.head


def final_norm(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Name the norm between the last block and the head; one without parameters (OLMo's) is not in the anatomy."""
    parent = anatomy.blocks.rpartition(".")[0]
    plain = [
        f"{parent}.{name}".lstrip(".")
        for name, child in model.get_submodule(parent).named_children()
        if "norm" in type(child).__name__.lower() and not any(True for _ in child.parameters())
    ]
    return anatomy.norm or (plain[0] if len(plain) == 1 else None)


def extend_class(module: nn.Module, extension: type[nn.Module]) -> None:
    """Put the methods of ``extension`` before those of the module's own class; its parameters keep their names."""
    kind = type(module)
    module.__class__ = type(f"{extension.__name__}{kind.__name__}", (extension, kind), {})


class Arrived(Exception):
    """Ends a pass through a model's own code and carries the arguments of the call that it ends at."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = args, kwargs

    @property
    def hidden(self) -> torch.Tensor:
        """Hidden states among the arguments."""
        args, kwargs = self.call
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden


def with_hidden(
    hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


class EndOfPass(nn.Module):
    """Extends the class of a module that a pass through the model's own code can end at."""

    ends_pass = False
    """True while such a pass is under way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, or end the pass before any hook of the module (ZeRO-3's fetches its weights) has run."""
        if self.ends_pass:
            raise Arrived(args, kwargs)
        return super().__call__(*args, **kwargs)


class DetachedOutput(nn.Module):
    """Extends the class of a module that no gradient is to pass through."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the module; its output belongs to no graph."""
        output: torch.Tensor = super().__call__(*args, **kwargs)
        return output.detach()


class StandIn(nn.Module):
    """Takes a module's place with its plain attributes (attention_type, layer_idx) and without its parameters."""

    def __init__(self, original: nn.Module | None = None) -> None:
        super().__init__()
        own = set(vars(self))
        for name, value in vars(original).items() if original is not None else ():
            if name not in own and not isinstance(value, (nn.Module, torch.Tensor)):
                setattr(self, name, value)


class Absent(StandIn):
    """Takes the place of what lies above the line, where a pass never comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Fail in any case."""
        raise RuntimeError("the prefix ran past the frost line")


class Arrival(StandIn):
    """Takes the place of the first module above the line."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """End the pass with what comes in."""
        raise Arrived(args, kwargs)


class PassThrough(StandIn):
    """Takes the place of a block below the line.

    Args:
        block: what it stands for.
        returned: length of the tuple that the block returns; none if it returns the hidden states alone.
    """

    def __init__(self, block: nn.Module, returned: int | None) -> None:
        super().__init__(block)
        self._returned = returned

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what comes in, in the form in which the block returns it."""
        if self._returned is None:
            return hidden_states
        return (hidden_states, *[None] * (self._returned - 1))


class EmbeddingStub(StandIn):
    """Takes the place of an embedding table; its output is replaced at the frost line."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__(table)
        self.register_buffer("weight", torch.empty(0, dtype=next(table.parameters()).dtype), persistent=False)

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return a zero that broadcasts."""
        return torch.zeros((), device=ids.device)


def stand_ins_below(
    model: nn.Module, anatomy: Anatomy, boundary: int, returned: Sequence[int | None]
) -> dict[nn.Module, nn.Module]:
    """Make what stands in a suffix for the embeddings and the blocks below ``boundary``.

    An embedding table that the head shares stays; ``returned`` is of ``Prefix.returned``.
    """
    head: Any = model.get_submodule(anatomy.head)
    below = list(model.get_submodule(anatomy.blocks).children())[:boundary]
    replaced: dict[nn.Module, nn.Module] = {
        block: PassThrough(block, length) for block, length in zip(below, returned, strict=True)
    }
    for table in map(model.get_submodule, anatomy.embeddings):
        if getattr(table, "weight", None) is not head.weight:
            replaced[table] = EmbeddingStub(table)
    return replaced
