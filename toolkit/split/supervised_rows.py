"""Run position-wise modules on the supervised positions alone.

Above the last block's attention no position looks at another: its MLP, the final norm and the head give each position
an output of its own. Only the supervised ones enter the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from toolkit.data.batches import Batch
from toolkit.models.anatomy import Anatomy
from toolkit.models.quantised_linear import QuantisedWeight
from toolkit.split.module_tree import EndOfPass


class SupervisedRows(NamedTuple):
    """The S supervised positions of a batch of B x T."""

    numbers: torch.Tensor
    """[S] indices of the positions in the flattened batch."""
    positions: torch.Size
    """Shape of the batch, B x T."""

    @classmethod
    def of(cls, batch: Batch) -> SupervisedRows:
        """Return the supervised positions of ``batch``, without a device sync: S is known from the targets."""
        numbers = torch.nonzero_static(batch.supervised.flatten(), size=len(batch.targets))
        return cls(numbers.squeeze(1), batch.input_ids.shape)

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """Gather [B, T, H] to [1, S, H].

        Raises:
            TypeError: the states do not have the batch's shape B x T (XLNet's are T x B).
        """
        if states.shape[:-1] != self.positions:
            raise TypeError(f"expected hidden states of {tuple(self.positions)} positions, found {tuple(states.shape)}")
        return states.flatten(0, 1).index_select(0, self.numbers).unsqueeze(0)

    def put_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Scatter [1, S, H] to [B, T, H], with zeros elsewhere."""
        flat = rows.new_zeros(self.positions.numel(), rows.shape[-1])
        return flat.index_copy_(0, self.numbers, rows.squeeze(0)).view(*self.positions, -1)


class RowsMLP(nn.Module):
    """Extends the class of the last block's MLP, which maps [B, T, H] to [B, T, H] position by position."""

    rows: SupervisedRows | None = None
    """Positions to compute; None computes all of them."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the MLP on ``rows`` alone; its output is zero at the other positions."""
        if self.rows is None:
            return super().__call__(hidden_states, *args, **kwargs)
        return self.rows.put_back(super().__call__(self.rows.take(hidden_states), *args, **kwargs))


class RowsBlock(EndOfPass):
    """Extends the class of the last block, so that a call can give the positions for its MLP to compute.

    The rows are an argument of ``forward``, because checkpointing calls it again with the same arguments in backward,
    when the next batch may have run. Between a block's forward and its MLP lies transformers' code, which hands on no
    argument of ours; so the MLP has them as an attribute for as long as the block computes.
    """

    mlp_name: str
    """Name of the child whose class ``RowsMLP`` extends."""

    def forward(self, *args: Any, supervised_rows: SupervisedRows | None = None, **kwargs: Any) -> Any:
        """Call the block; its MLP computes ``supervised_rows`` alone, or all positions if None."""
        mlp: Any = self.get_submodule(self.mlp_name)
        mlp.rows = supervised_rows
        try:
            return super().forward(*args, **kwargs)
        finally:
            mlp.rows = None


def dense_mlp(block: nn.Module, anatomy: Anatomy) -> str | None:
    """Return the name of the last block's MLP; None unless it is one child with matrices, and no mixture of experts."""
    index = anatomy.block_count - 1
    prefix = f"{anatomy.blocks}.{index}."
    owners = {
        tensor.name[len(prefix) :].split(".")[0]
        for tensor in anatomy.tensors
        if tensor.block == index and tensor.component == "mlp"
    }
    if len(owners) != 1:
        return None
    (name,) = owners
    mlp = block.get_submodule(name)
    shapes = [parameter.ndim for parameter in mlp.parameters()]
    shapes += [2 for module in mlp.modules() if isinstance(module, QuantisedWeight)]
    lists = any(isinstance(module, nn.ModuleList) for module in mlp.modules())
    return name if shapes.count(2) >= 2 and max(shapes) == 2 and not lists else None
