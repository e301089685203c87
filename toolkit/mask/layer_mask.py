"""The layer mask: which tensors train, resolved from the recipe's selectors. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from toolkit.config.mask_schema import LoraEntry, MaskConfig, MaskGroup, RowsEntry
from toolkit.mask.adapters import Adapter, adapted_weight, resolve_adapter
from toolkit.mask.quantised_layers import QuantisedLayers, resolve_quantised
from toolkit.mask.rows import TableRows, refuse_shared_rows, resolve_rows, select_tables
from toolkit.mask.selectors import resolve_selectors
from toolkit.models.anatomy import Anatomy
from toolkit.runtime.errors import MaskError
from toolkit.runtime.paths import replace_text


@dataclass(frozen=True)
class TrainableTensor:
    """A trainable tensor; a checkpoint must have the same ones, in the same order."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors that share a learning rate and a weight decay; None takes the recipe's."""

    names: tuple[str, ...]
    learning_rate: float | None = None
    weight_decay: float | None = None


Tied = Literal["no", "untie", "both", "head_only"]


@dataclass(frozen=True)
class LayerMask:
    """The exact set of tensors that train.

    ``boundary`` b is the frost line: blocks 0 … b-1 and the embeddings are frozen, b is the lowest block with a
    trainable tensor. It equals ``block_count`` when only the norm or the head trains, and 0 when anything before the
    blocks does.
    """

    trainable: tuple[TrainableTensor, ...]
    boundary: int
    block_count: int
    tied: Tied
    """Treatment of a head that shares the embeddings' tensor: ``untie`` copies it first, ``both`` trains the
    shared tensor, ``head_only`` trains it through the head alone; ``no`` if the mask does not select it."""
    groups: tuple[ParameterGroup, ...]
    """Disjoint groups that together hold all trainable tensors."""
    adapters: tuple[Adapter, ...] = ()
    """Low-rank adapters, whose tensors are among ``trainable``."""
    rows: tuple[TableRows, ...] = ()
    """Rows of frozen tables, whose tensors are among ``trainable``."""
    quantised: tuple[QuantisedLayers, ...] = ()
    """Frozen linear layers of adapted blocks that are held in 8 or 4 bits, in all phases of a schedule."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trainable tensors in the model's order."""
        return tuple(tensor.name for tensor in self.trainable)

    @property
    def parameters(self) -> int:
        """Number of scalar parameters that train."""
        return sum(tensor.parameters for tensor in self.trainable)

    @property
    def has_prefix(self) -> bool:
        """True if part of the model runs before the first trained block, without gradients."""
        return self.boundary > 0 or self.tied == "head_only"

    def save(self, path: Path) -> None:
        """Write the mask as JSON."""
        replace_text(path, json.dumps(self.as_dict(), indent=1))

    def as_dict(self) -> dict[str, Any]:
        """Return the mask as JSON values; what it does not have is left out, for versions that knew none of it."""
        later = ("adapters", "rows", "quantised")
        return {key: value for key, value in asdict(self).items() if value or key not in later}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LayerMask:
        """Restore a mask from its ``as_dict``."""
        trainable = tuple(
            TrainableTensor(tensor["name"], tuple(tensor["shape"]), tensor["dtype"]) for tensor in values["trainable"]
        )
        groups = tuple(ParameterGroup(**{**group, "names": tuple(group["names"])}) for group in values["groups"])
        adapters = tuple(map(Adapter.from_dict, values.get("adapters", ())))
        rows = tuple(map(TableRows.from_dict, values.get("rows", ())))
        quantised = tuple(map(QuantisedLayers.from_dict, values.get("quantised", ())))
        return LayerMask(
            trainable, values["boundary"], values["block_count"], values["tied"], groups, adapters, rows, quantised
        )


def build_mask(config: MaskConfig, anatomy: Anatomy) -> LayerMask:
    """Resolve the recipe's mask section: the union of ``train``, minus ``freeze`` and integer tensors.

    Raises:
        MaskError: a selector is invalid (see ``resolve_selectors``), nothing is left to train, a tensor is in two
            groups, or one that is shared with another part is selected and not selected, or trained and frozen.
    """
    integers = {tensor.name for tensor in anatomy.tensors if not tensor.can_train}
    frozen = resolve_selectors(config.freeze, anatomy) | integers
    plain = [item for item in config.train if isinstance(item, str)]
    selected = [ParameterGroup(tuple(resolve_selectors(plain, anatomy)))]
    selected += [
        ParameterGroup(tuple(resolve_selectors(item.select, anatomy)), item.learning_rate, item.weight_decay)
        for item in _entries(config, MaskGroup)
    ]
    adapters = [(item.lora, resolve_adapter(item.lora, frozen, anatomy)) for item in _entries(config, LoraEntry)]
    tables = [(item.rows, select_tables(item.rows, frozen, anatomy)) for item in _entries(config, RowsEntry)]
    all_names = frozenset(name for group in selected for name in group.names) - frozen
    if not (all_names or adapters or tables):
        raise MaskError(
            "the mask leaves nothing to train: mask.freeze takes away all that mask.train selects, or it is integer "
            "tables, which have no gradient"
        )
    touched = all_names.union(*(names for _, names in tables))
    tied = _tied_treatment(touched, config.tied, anatomy)
    _refuse_partly_selected_ties(touched, anatomy)
    _refuse_frozen_ties(touched, frozen, tied, anatomy)
    groups = []
    for group in selected:
        canonical = _resolve_aliases(all_names & set(group.names), tied, anatomy)
        groups.append(replace(group, names=tuple(t.name for t in anatomy.tensors if t.name in canonical)))
    rows: list[TableRows] = []
    for entry, names in tables:
        own = [resolve_rows(entry, table, anatomy) for table in sorted(_resolve_aliases(names, tied, anatomy))]
        groups.append(ParameterGroup(tuple(part.name for part in own), entry.learning_rate, entry.weight_decay))
        rows += own
    refuse_shared_rows(rows, _resolve_aliases(all_names, tied, anatomy))
    beside = _tensors_of_rows(rows, anatomy)
    for lora, adapter in adapters:
        low_rank = _tensors_of_adapter(adapter, anatomy)
        _refuse_adapted_twice(low_rank, beside, all_names)
        beside |= low_rank
        trained_beside = tuple(tensor.name for tensors in low_rank.values() for tensor in tensors)
        groups.append(ParameterGroup(trained_beside, lora.learning_rate, lora.weight_decay))
    _refuse_overlap(groups)
    trained = {name for group in groups for name in group.names}
    trainable: list[TrainableTensor] = []
    for t in anatomy.tensors:
        trainable += [TrainableTensor(t.name, t.shape, t.dtype)] if t.name in trained else beside.get(t.name, [])
    boundary = _lowest_trained_block({adapted_weight(name) for name in trained}, tied, anatomy)
    return LayerMask(
        tuple(trainable), boundary, anatomy.block_count, tied, tuple(g for g in groups if g.names),
        tuple(adapter for _, adapter in adapters), tuple(rows), resolve_quantised(adapters, trained, anatomy),
    )  # fmt: skip


_Entry = TypeVar("_Entry", MaskGroup, LoraEntry, RowsEntry)


def _entries(config: MaskConfig, kind: type[_Entry]) -> list[_Entry]:
    """Return the entries of ``mask.train`` of one kind."""
    return [item for item in config.train if isinstance(item, kind)]


def _tensors_of_rows(rows: Sequence[TableRows], anatomy: Anatomy) -> dict[str, list[TrainableTensor]]:
    """Return the tensors of rows by the table that they stand beside."""
    beside: dict[str, list[TrainableTensor]] = {}
    for own in rows:
        table = anatomy.by_name[own.table]
        made = TrainableTensor(own.name, (own.count, *table.shape[1:]), table.dtype)
        beside.setdefault(own.table, []).append(made)
    return beside


def _tensors_of_adapter(adapter: Adapter, anatomy: Anatomy) -> dict[str, list[TrainableTensor]]:
    """Return the tensors of an adapter by the weight that they stand beside."""
    beside: dict[str, list[TrainableTensor]] = {}
    for module in adapter.modules:
        dtype = anatomy.by_name[f"{module}.weight"].dtype
        beside[f"{module}.weight"] = [TrainableTensor(*made, dtype) for made in adapter.tensors(module, anatomy)]
    return beside


def _refuse_frozen_ties(selected: frozenset[str], frozen: frozenset[str], tied: Tied, anatomy: Anatomy) -> None:
    """Raise MaskError if ``mask.freeze`` names a tensor that trains under another name."""
    if both := sorted(_resolve_aliases(selected, tied, anatomy) & frozen):
        raise MaskError(
            f"mask.freeze keeps {both[0]} frozen, but head and embeddings share that tensor, and mask.tied: {tied} "
            "trains it; take it out of mask.freeze, or write mask.tied: untie to train a copy as the head"
        )


def _refuse_adapted_twice(entry: Mapping[str, Any], others: Mapping[str, Any], whole: frozenset[str]) -> None:
    """Raise MaskError if a layer of a ``lora`` entry is in another one, or trains whole as well."""
    if both := [name for name in entry if name in others]:
        raise MaskError(
            f"two lora entries of mask.train adapt {both[0]} and {len(both) - 1} more layers; expected one adapter a "
            "layer: let their select or targets not overlap"
        )
    if both := [name for name in entry if name in whole]:
        raise MaskError(
            f"mask.train trains {both[0]} and {len(both) - 1} more layers whole and through an adapter; expected one "
            "of the two: take them out of the selectors, or out of lora.select"
        )


def _refuse_overlap(groups: list[ParameterGroup]) -> None:
    """Raise MaskError if a tensor is in two groups."""
    for group, other in combinations(groups, 2):
        if both := sorted(set(group.names) & set(other.names)):
            raise MaskError(
                f"the mask puts {both[0]} and {len(both) - 1} more tensors into two groups of mask.train, so their "
                "learning rate is unknown; let the groups' selectors not overlap"
            )


def _tied_treatment(selected: frozenset[str], policy: str, anatomy: Anatomy) -> Tied:
    """Return ``LayerMask.tied`` for the selected names and the recipe's ``mask.tied``.

    Raises:
        MaskError: a tied head is selected and the policy is ``error`` or cannot be followed.
    """
    tied = anatomy.tied_head
    if tied is None or not selected & {tied.name, tied.alias_of}:
        return "no"
    if policy == "head_only" and tied.alias_of in selected:
        raise MaskError(
            "mask.tied is head_only, but the mask selects the embeddings too; write tied: both, or leave embeddings out"
        )
    other = next((t for t in anatomy.tensors if t.alias_of and t is not tied), None)
    if policy == "untie" and other is not None:
        raise MaskError(
            f"mask.tied: untie is not possible: {other.name} shares the tensor {other.alias_of}, and transformers "
            "ties that by the same switch (tie_word_embeddings), so no export could be loaded again. Choose both or "
            "head_only, or leave head and embeddings out of mask.train"
        )
    if policy in ("untie", "both", "head_only"):
        return cast("Tied", policy)
    raise MaskError(
        f"the mask selects {tied.name if tied.name in selected else tied.alias_of}, but the head and the embeddings "
        f"share one tensor ({tied.alias_of}): training one changes the other. Choose:\n"
        "  mask.tied: untie      the head gets its own tensor and trains alone; the embeddings stay as they are\n"
        "  mask.tied: both       the shared tensor trains as one; nothing below it stays frozen\n"
        "  mask.tied: head_only  the shared tensor trains through the head alone; the embeddings move along\n"
        "or leave head and embeddings out of mask.train, and the shared tensor stays frozen"
    )


def _refuse_partly_selected_ties(selected: frozenset[str], anatomy: Anatomy) -> None:
    """Raise MaskError if only one of two parts that share a tensor is selected; a tied head has its own policy."""
    for alias in anatomy.tensors:
        if alias.alias_of is None or alias is anatomy.tied_head or alias.part == "other":
            continue
        pair = {alias.name, alias.alias_of}
        if len(pair & selected) == 1:
            (name,), (other,) = pair & selected, pair - selected
            raise MaskError(
                f"the mask selects {name} but not {other}, and both are one tensor: training one changes the other. "
                "Select both or neither"
            )


def _resolve_aliases(selected: frozenset[str], tied: Tied, anatomy: Anatomy) -> set[str]:
    """Replace each alias by the name of the tensor that it shares, except for a head that is untied."""
    head = anatomy.tied_head
    names = set()
    for name in selected:
        alias = anatomy.by_name[name].alias_of
        is_untied_head = tied == "untie" and head is not None and name == head.name
        names.add(name if alias is None or is_untied_head else alias)
    return names


def _lowest_trained_block(names: set[str], tied: Tied, anatomy: Anatomy) -> int:
    """Return the boundary of the trained tensors ``names``, see ``LayerMask``."""
    head = anatomy.tied_head
    if tied == "head_only" and head is not None:  # no gradient goes through the embeddings
        names = names - {head.alias_of or ""}
    tensors = [anatomy.by_name[name] for name in names]
    if any(tensor.part in ("embeddings", "other") for tensor in tensors):
        return 0
    return min((tensor.block for tensor in tensors if tensor.block is not None), default=anatomy.block_count)
