"""Run what is computed position by position on the supervised positions alone, where nothing else is read of it.

Above the last block's attention no position looks at another: its MLP, the final norm and the head give each position
an output of its own. Only the supervised ones enter the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from toolkit.models.anatomy import Anatomy


class Rows(NamedTuple):
    """The supervised positions of a batch."""

    numbers: torch.Tensor
    """[S], counted through the whole batch."""
    positions: torch.Size
    """B × T."""


def take_rows(states: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[B, T, H] to [1, S, H].

    Raises:
        TypeError: the states are of other positions than the batch, or in another order (XLNet's are T × B).
    """
    if states.shape[:-1] != rows.positions:
        raise TypeError(f"expected hidden states of {tuple(rows.positions)} positions, found {tuple(states.shape)}")
    return states.flatten(0, 1).index_select(0, rows.numbers).unsqueeze(0)


class OnSupervisedRows:
    """Gathers the rows of a module's input and puts its output back among zeros, while it is given rows."""

    def __init__(self, module: nn.Module) -> None:
        """
        Args:
            module: maps hidden states [B, T, H] to [B, T, H'] position by position, and is called once a pass.
        """  # noqa: D205, D212
        self._rows: Rows | None = None
        self._shape: torch.Size = torch.Size()
        module.register_forward_pre_hook(self._gather)
        module.register_forward_hook(self._scatter)

    @contextmanager
    def on(self, rows: Rows | None) -> Iterator[None]:
        """Only ``rows`` are computed inside; all of them where there is none."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None:
            return None
        self._shape = args[0].shape
        return (take_rows(args[0], self._rows), *args[1:])

    def _scatter(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        if self._rows is None:
            return None
        flat: torch.Tensor = output.new_zeros(self._shape[0] * self._shape[1], output.shape[-1])
        return flat.index_copy_(0, self._rows.numbers, output.squeeze(0)).view(*self._shape[:2], -1)


class MLPOnSupervisedRows:
    """The same for the MLP within a block, whose rows travel with the block's arguments.

    Gradient checkpointing runs the block again in backward, when the next batch may have set other rows; it repeats the
    arguments.
    """

    def __init__(self, block: nn.Module, mlp: nn.Module) -> None:
        """
        Args:
            block: the model's last one; checkpointing is to be laid over it after this.
            mlp: a module within it.
        """  # noqa: D205, D212
        self._rows: Rows | None = None
        self._mlp = OnSupervisedRows(mlp)
        self._forward = block.forward
        block.register_forward_pre_hook(self._pass_on, with_kwargs=True)
        block.forward = self._run

    @contextmanager
    def on(self, rows: Rows | None) -> Iterator[None]:
        """Only ``rows`` are computed by passes that begin inside."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _pass_on(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs if self._rows is None else {**kwargs, "supervised_rows": self._rows}

    def _run(self, *args: Any, supervised_rows: Rows | None = None, **kwargs: Any) -> Any:
        with self._mlp.on(supervised_rows):
            return self._forward(*args, **kwargs)


def dense_mlp(block: nn.Module, index: int, anatomy: Anatomy) -> nn.Module | None:
    """The block's MLP, if it is one child of at least two matrices and no mixture of experts."""
    prefix = f"{anatomy.blocks}.{index}."
    owners = {
        tensor.name[len(prefix) :].split(".")[0]
        for tensor in anatomy.tensors
        if tensor.block == index and tensor.component == "mlp"
    }
    if len(owners) != 1:
        return None
    mlp = block.get_submodule(owners.pop())
    shapes = [parameter.ndim for parameter in mlp.parameters()]
    lists = any(isinstance(module, nn.ModuleList) for module in mlp.modules())
    return mlp if shapes.count(2) >= 2 and max(shapes) == 2 and not lists else None
