"""The layer mask: which tensors train, resolved from the recipe's selectors. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

from toolkit.config.mask_schema import LoraEntry, MaskConfig, MaskGroup
from toolkit.mask.adapters import Adapter, adapted_weight, resolve_adapter
from toolkit.mask.quantised_layers import QuantisedLayers, resolve_quantised
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
        values = asdict(self)
        for key in ("adapters", "quantised"):
            if not values[key]:
                del values[key]
        return values

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LayerMask:
        """Restore a mask from its ``as_dict``."""
        trainable = tuple(
            TrainableTensor(tensor["name"], tuple(tensor["shape"]), tensor["dtype"]) for tensor in values["trainable"]
        )
        groups = tuple(ParameterGroup(**{**group, "names": tuple(group["names"])}) for group in values["groups"])
        adapters = tuple(map(Adapter.from_dict, values.get("adapters", ())))
        quantised = tuple(map(QuantisedLayers.from_dict, values.get("quantised", ())))
        boundary, block_count = values["boundary"], values["block_count"]
        return LayerMask(trainable, boundary, block_count, values["tied"], groups, adapters, quantised)


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
        for item in config.train
        if isinstance(item, MaskGroup)
    ]
    entries = [item.lora for item in config.train if isinstance(item, LoraEntry)]
    adapters = tuple(resolve_adapter(entry, frozen, anatomy) for entry in entries)
    all_names = frozenset(name for group in selected for name in group.names) - frozen
    if not all_names and not entries:
        raise MaskError(
            "the mask leaves nothing to train: mask.freeze takes away all that mask.train selects, or it is integer "
            "tables, which have no gradient"
        )
    tied = _tied_treatment(all_names, config.tied, anatomy)
    _refuse_partly_selected_ties(all_names, anatomy)
    groups = []
    for group in selected:
        canonical = _resolve_aliases(all_names & set(group.names), tied, anatomy)
        if both := sorted(canonical & frozen):
            raise MaskError(
                f"mask.freeze keeps {both[0]} frozen, but head and embeddings share that tensor, and mask.tied: {tied} "
                "trains it; take it out of mask.freeze, or write mask.tied: untie to train a copy as the head"
            )
        groups.append(replace(group, names=tuple(t.name for t in anatomy.tensors if t.name in canonical)))
    low_rank: dict[str, list[TrainableTensor]] = {}
    for entry, adapter in zip(entries, adapters, strict=True):
        beside: dict[str, list[TrainableTensor]] = {}
        for module in adapter.modules:
            dtype = anatomy.by_name[f"{module}.weight"].dtype
            beside[f"{module}.weight"] = [TrainableTensor(*made, dtype) for made in adapter.tensors(module, anatomy)]
        _refuse_adapted_twice(beside, low_rank, all_names)
        low_rank |= beside
        names = tuple(tensor.name for tensors in beside.values() for tensor in tensors)
        groups.append(ParameterGroup(names, entry.learning_rate, entry.weight_decay))
    _refuse_overlap(groups)
    trained = {name for group in groups for name in group.names}
    trainable: list[TrainableTensor] = []
    for t in anatomy.tensors:
        trainable += [TrainableTensor(t.name, t.shape, t.dtype)] if t.name in trained else low_rank.get(t.name, [])
    boundary = _lowest_trained_block({adapted_weight(name) for name in trained}, tied, anatomy)
    used = tuple(group for group in groups if group.names)
    mask = LayerMask(tuple(trainable), boundary, anatomy.block_count, tied, used, adapters)
    return replace(mask, quantised=resolve_quantised(list(zip(entries, adapters, strict=True)), trained, anatomy))


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
