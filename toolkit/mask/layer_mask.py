"""From selectors to a layer mask, and the mask laid onto a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.config.schema import MaskConfig
from toolkit.errors import MaskError
from toolkit.mask.selectors import resolve
from toolkit.models.anatomy import Anatomy, TensorInfo


@dataclass(frozen=True)
class MaskedTensor:
    """A trainable tensor: what a checkpoint must match, name by name and in this order."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerMask:
    """Exactly which tensors train.

    ``boundary`` b is the frost line: blocks 0 … b-1 and the embeddings are frozen, b is the lowest block with a
    trainable tensor. It equals ``block_count`` when only the norm or the head trains, and 0 when anything before the
    blocks does.
    """

    trainable: tuple[MaskedTensor, ...]
    boundary: int
    block_count: int
    untie_head: bool
    """The head is given its own tensor before training, because it shared the embeddings' storage."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trainable tensors in the model's order."""
        return tuple(tensor.name for tensor in self.trainable)

    def save(self, path: Path) -> None:
        """Write the mask as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LayerMask:
        """The mask that ``dataclasses.asdict`` took apart."""
        trainable = tuple(
            MaskedTensor(tensor["name"], tuple(tensor["shape"]), tensor["dtype"]) for tensor in values["trainable"]
        )
        return LayerMask(trainable, values["boundary"], values["block_count"], values["untie_head"])


def build_mask(config: MaskConfig, anatomy: Anatomy) -> LayerMask:
    """Resolve ``config`` on a model's parts.

    Raises:
        MaskError: a selector is at fault (see ``selectors.resolve``), or a selected tensor is also in a part of the
            model that is not selected, and ``config.tied`` does not part them.
    """
    selected = resolve(config.train, anatomy)
    untie = _untie_head(selected, config.tied, anatomy)
    _refuse_half_a_tie(selected, anatomy.tied_head if untie else None, anatomy)
    names = _canonical(selected, untie, anatomy)
    trainable = tuple(
        MaskedTensor(tensor.name, tensor.shape, tensor.dtype) for tensor in anatomy.tensors if tensor.name in names
    )
    return LayerMask(trainable, _boundary(names, anatomy), anatomy.block_count, untie)


def _untie_head(selected: frozenset[str], policy: Literal["error", "untie"], anatomy: Anatomy) -> bool:
    tied = anatomy.tied_head
    if tied is None or not selected & {tied.name, tied.alias_of}:
        return False
    if policy == "untie":
        if other := next((t for t in anatomy.tensors if t.alias_of and t is not tied), None):
            raise MaskError(
                f"mask.tied: untie is not possible: {other.name} shares the tensor {other.alias_of}, and transformers "
                "ties that by the same switch (tie_word_embeddings), so no export could be loaded again. Choose a "
                "mask.train without head (and embeddings)"
            )
        return True
    raise MaskError(
        f"the mask selects {tied.name}, but the head and the embeddings share one tensor ({tied.alias_of}): training "
        "one changes the other. Choose:\n"
        "  mask.tied: untie   the head gets its own tensor and trains alone; the embeddings stay as they are\n"
        "  mask.train without head (and embeddings)   the shared tensor stays frozen"
    )


def _refuse_half_a_tie(selected: frozenset[str], parted: TensorInfo | None, anatomy: Anatomy) -> None:
    """A tensor that several blocks share trains in all of them or in none."""
    for alias in anatomy.tensors:
        if alias.alias_of is None or alias is parted or alias.part == "other":
            continue
        pair = {alias.name, alias.alias_of}
        if len(pair & selected) == 1:
            (chosen,), (other,) = pair & selected, pair - selected
            raise MaskError(
                f"the mask selects {chosen} but not {other}, and both are one tensor: training one changes the other. "
                "Select both or neither"
            )


def _canonical(selected: frozenset[str], untie: bool, anatomy: Anatomy) -> set[str]:
    """Selected names with aliases replaced by the tensor they share, unless the head is untied."""
    tied = anatomy.tied_head
    names = set()
    for name in selected:
        alias = anatomy.by_name[name].alias_of
        names.add(name if alias is None or (untie and tied is not None and name == tied.name) else alias)
    return names


def _boundary(names: set[str], anatomy: Anatomy) -> int:
    tensors = [anatomy.by_name[name] for name in names]
    if any(tensor.part in ("embeddings", "other") for tensor in tensors):
        return 0
    return min((tensor.block for tensor in tensors if tensor.block is not None), default=anatomy.block_count)
