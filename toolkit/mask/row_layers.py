"""Tables some of whose rows train: the rows are a small parameter beside the frozen weight.

A table keeps its class's own forward, which is run once more with the rows in the place of the weight. So an embedding
that scales its output (Gemma's) scales them too, and no gradient as large as the table is ever made: peft's layer for
this copies the whole table in each forward pass, and its backward pass makes a gradient of that size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from toolkit.mask.rows import TableRows
from toolkit.models.module_class import extend_class, restore_class
from toolkit.runtime.errors import MaskError


@dataclass(frozen=True)
class RowPlaces:
    """Rows of a table that have values of their own."""

    ids: tuple[int, ...]
    """Numbers of the rows, ascending."""
    numbers: torch.Tensor
    """``ids`` as a tensor [R] on the device."""

    def within(self, tile: slice) -> tuple[slice, slice | torch.Tensor] | None:
        """Return which of these rows lie in a ``tile`` of the table, and their places in it; None if none does."""
        part = slice(bisect_left(self.ids, tile.start), bisect_left(self.ids, tile.stop))
        own = self.ids[part]
        if not own:
            return None
        if own[-1] - own[0] + 1 == len(own):
            return part, slice(own[0] - tile.start, own[-1] + 1 - tile.start)
        return part, self.numbers[part] - tile.start


class TrainedRows(NamedTuple):
    """The values [R, H] of rows that train, and the R rows of the table that they take the place of."""

    values: torch.Tensor
    places: RowPlaces


class TableWithRows(nn.Module):
    """Extends the class of a table; see ``add_rows``."""

    weight: nn.Parameter
    row_ids: dict[str, tuple[int, ...]]
    """Ids of the rows that each attribute holds."""
    ascending_ids: tuple[int, ...]
    """All of these ids."""
    row_index: torch.Tensor
    """``ascending_ids`` as a tensor [R]."""
    row_order: torch.Tensor
    """[R], which of the rows, one attribute after the other, has the n-th id."""

    def trained_rows(self) -> TrainedRows:
        """Return the rows in the order of their ids, with gradients to each attribute that holds some."""
        held = [getattr(self, name) for name in self.row_ids]
        values = held[0] if len(held) == 1 else torch.cat(held).index_select(0, self.row_order)
        return TrainedRows(values, RowPlaces(self.ascending_ids, self.row_index))

    def hold_rows(self, attribute: str, values: nn.Parameter, ids: tuple[int, ...]) -> None:
        """Hold rows in an attribute, beside those held so far."""
        self.register_parameter(attribute, values)
        self.row_ids = {**self.row_ids, attribute: ids}
        held = list(chain(*self.row_ids.values()))
        self.ascending_ids = tuple(sorted(held))
        order = sorted(range(len(held)), key=held.__getitem__)
        for name, numbers in (("row_index", self.ascending_ids), ("row_order", order)):
            self.register_buffer(name, torch.tensor(numbers, device=values.device), persistent=False)

    @contextmanager
    def _in_place_of_weight(self, **attributes: Any) -> Iterator[None]:
        """Let attributes of this object hide its parameters, which the class's own forward then computes with."""
        hidden = {name: vars(self)[name] for name in attributes if name in vars(self)}
        vars(self).update(attributes)
        try:
            yield
        finally:
            for name in attributes:
                del vars(self)[name]
            vars(self).update(hidden)


class _LookUp(torch.autograd.Function):
    """``values[places]``, whose gradient is summed up in float32 and rounded once; ``padding`` gets none (-1: no row).

    torch's own sums up in bfloat16 on a CPU: of 2,000 equal tokens it was off by 30 %.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, padding: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.padding, ctx.rows, ctx.dtype = padding, len(values), values.dtype
        return values.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        summed = torch.ops.aten.embedding_dense_backward(wide, places, ctx.rows, ctx.padding, False)
        return summed.to(ctx.dtype), None, None


class EmbeddingWithRows(TableWithRows):
    """Extends the class of an embedding table."""

    padding_idx: int | None

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Look up ids [...] in the table, and those of the rows in these: [..., H]."""
        values, places = self.trained_rows()
        place = torch.searchsorted(places.numbers, ids).clamp_(max=len(places.ids) - 1)
        is_own = places.numbers[place] == ids
        padding = places.ids.index(self.padding_idx) if self.padding_idx in places.ids else -1
        looked_up = _LookUp.apply(values, place.flatten(), padding)  # type: ignore[no-untyped-call]
        with self._in_place_of_weight(weight=looked_up, padding_idx=None):
            own = super().forward(torch.arange(ids.numel(), device=ids.device).view(ids.shape), *args, **kwargs)
        return torch.where(is_own.unsqueeze(-1), own, super().forward(ids, *args, **kwargs))


class HeadWithRows(TableWithRows):
    """Extends the class of the language-model head. The loss takes the rows by themselves, see ``LossHead``."""

    bias: nn.Parameter | None

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return logits [..., V] of hidden states [..., H], of which the rows' columns are computed with these."""
        values, places = self.trained_rows()
        logits = super().forward(hidden, *args, **kwargs)
        with self._in_place_of_weight(weight=values, bias=None if self.bias is None else self.bias[places.numbers]):
            own = super().forward(hidden, *args, **kwargs)
        return logits.index_copy(-1, places.numbers, own)


def unused_rows(model: nn.Module, called: Collection[nn.Module]) -> list[str]:
    """Return the tables with rows that are not among the modules ``called``: the model computes with the weight itself.

    Of a tied head and the embeddings one is enough; a suffix does not look tokens up.
    """
    tables = {name: module for name, module in model.named_modules() if isinstance(module, TableWithRows)}
    used = {table._parameters["weight"] for table in tables.values() if table in called}
    return [name for name, table in tables.items() if table._parameters["weight"] not in used]


def add_rows(model: PreTrainedModel, rows: Sequence[TableRows]) -> None:
    """Put rows beside their tables, with the tables' values, unless they are there; a tied head shares them.

    Raises:
        MaskError: a table is of a class that is no lookup and no linear layer.
    """
    for own in rows:
        weight = model.get_parameter(own.table)
        sharing = [module for module in model.modules() if module._parameters.get("weight") is weight]
        attribute = own.name.rpartition(".")[2]
        if any(attribute in module._parameters for module in sharing):
            continue
        index = torch.tensor(own.ids, device=weight.device)
        values = nn.Parameter(weight.detach().index_select(0, index))
        for module in sharing:
            _attach(module, attribute, values, own.ids, own.table)


def _attach(module: nn.Module, attribute: str, values: nn.Parameter, ids: tuple[int, ...], table: str) -> None:
    """Add rows to one module of a table."""
    if not isinstance(module, TableWithRows):
        extension = next((kind for plain, kind in _EXTENSIONS.items() if isinstance(module, plain)), None)
        if extension is None:
            raise MaskError(
                f"mask.train: rows trains some of {table}, which is a {type(module).__name__} here; expected an "
                "nn.Embedding or nn.Linear. Train it whole, or leave it out"
            )
        extend_class(module, extension)
        vars(module)["row_ids"] = {}
    assert isinstance(module, TableWithRows)
    module.hold_rows(attribute, values, ids)


_EXTENSIONS: dict[type[nn.Module], type[TableWithRows]] = {nn.Embedding: EmbeddingWithRows, nn.Linear: HeadWithRows}
"""Extensions by the class of the table."""


@torch.no_grad()
def merge_rows(
    model: PreTrainedModel,
    masters: Mapping[str, torch.Tensor],
    rounding: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    """Write the rows into their tables, and take them out of the model; see ``toolkit.mask.apply.merge_adapters``.

    Args:
        model: model with rows, changed in place.
        masters: float32 values of trained tensors by name; rows without them keep their rounded ones.
        rounding: rounds float32 values into the precision of the table.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, TableWithRows)}
    places = [(name, module, attribute) for name, module in modules.items() for attribute in module.row_ids]
    exact = {module._parameters[a]: masters[f"{name}.{a}"] for name, module, a in places if f"{name}.{a}" in masters}
    for _, module, attribute in places:
        values = module._parameters.pop(attribute)
        assert values is not None
        rounded = torch.empty_like(values, dtype=module.weight.dtype)
        rounding(exact.get(values, values.float()), rounded)
        module.weight.index_copy_(0, torch.tensor(module.row_ids[attribute], device=values.device), rounded)
    for module in modules.values():
        for buffer in ("row_index", "row_order"):
            del module._buffers[buffer]
        del module.row_ids, module.ascending_ids
        for kind in _EXTENSIONS.values():
            restore_class(module, kind)
