"""Apply a mask to a meta model, cut it at the frost line, and trace micro batches through it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.activation_cache.packing import set_attention
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import LayerMask
from toolkit.models.anatomy import Anatomy
from toolkit.models.varlen import VARLEN
from toolkit.optim.groups import embedding_ids
from toolkit.planning.engine_memory import TensorSizes
from toolkit.planning.meta_model import MetaModel
from toolkit.planning.trace import BatchShape, Trace, trace
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.loss_head import Shortcuts
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split


@dataclass(frozen=True)
class MetaSplit:
    """A meta model with a mask applied, cut at its frost line."""

    model: PreTrainedModel
    """A copy of the meta model with the mask applied."""
    anatomy: Anatomy
    mask: LayerMask
    boundary: int | None
    """Block below which it is cut; None if it is not cut."""
    prefix: Prefix | None
    suffix: Suffix
    trained: dict[str, nn.Parameter]
    tensors: TensorSizes
    _traces: dict[tuple[BatchShape, bool], Trace] = field(default_factory=dict)

    @property
    def head(self) -> torch.Tensor:
        """Return the head's matrix [vocabulary, hidden_size]."""
        matrix: torch.Tensor = self.model.get_output_embeddings().weight
        return matrix

    @cached_property
    def checkpointed(self) -> Suffix:
        """Return a second suffix on the same model, with activation checkpointing from the frost line up."""
        _, suffix = split(self.model, self.anatomy, self.boundary)
        suffix.set_shortcuts(self.suffix.shortcuts)
        checkpoint_blocks(suffix.blocks(self.mask.boundary))
        return suffix

    def trace(self, shape: BatchShape, checkpointing: bool) -> Trace:
        """Trace a micro batch of ``shape``, with or without activation checkpointing; the traces are cached."""
        key = (shape, checkpointing)
        if key not in self._traces:
            suffix = self.checkpointed if checkpointing else self.suffix
            self._traces[key] = trace(self.prefix, suffix, self.trained.values(), shape, self.head.shape[0])
        return self._traces[key]


def meta_split(meta: MetaModel, mask: LayerMask, boundary: int | None, packed: bool, shortcuts: Shortcuts) -> MetaSplit:
    """Apply ``mask`` to a copy of the meta model and cut it below block ``boundary``, as a run does; None is no cut."""
    model, anatomy = copy.deepcopy(meta.model), meta.anatomy  # applying a mask changes the model
    if packed and model.config._attn_implementation == "sdpa":
        set_attention(model, VARLEN)
    apply_mask(model, mask, anatomy)
    model.train()
    prefix, suffix = split(model, anatomy, boundary)
    suffix.set_shortcuts(shortcuts)
    if prefix is None and mask.tied == "head_only":
        suffix.detach_embeddings()
    trained = trainable_parameters(suffix.model, mask)
    return MetaSplit(model, anatomy, mask, boundary, prefix, suffix, trained, _tensor_sizes(prefix, suffix, trained))


def _tensor_sizes(prefix: Prefix | None, suffix: Suffix, trained: dict[str, nn.Parameter]) -> TensorSizes:
    """Return the sizes of trained, frozen and shared tensors of a split model."""

    def storages(module: nn.Module | None) -> dict[int, int]:
        parameters = module.parameters() if module is not None else ()
        return {p.untyped_storage()._cdata: p.numel() for p in parameters}

    below, above = storages(prefix), storages(suffix)
    return TensorSizes(
        shared=sum(size for storage, size in below.items() if storage in above),
        trained=tuple(parameter.numel() for parameter in trained.values()),
        frozen=tuple(p.numel() for p in suffix.parameters() if not p.requires_grad),
        width=next(suffix.parameters()).element_size(),
        tables=tuple(p.numel() for p in trained.values() if id(p) in embedding_ids(suffix.model)),
    )
