"""Apply a mask to a meta model, cut it at the frost line, and trace micro batches through it."""

from __future__ import annotations

import copy
from functools import cached_property

from torch import nn

from toolkit.activation_cache.packing import set_attention
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import LayerMask
from toolkit.models.quantised_linear import quantised_layer_bytes
from toolkit.models.varlen import VARLEN
from toolkit.optim.groups import embedding_ids
from toolkit.planning.meta_model import MetaModel
from toolkit.planning.tensor_sizes import TensorSizes
from toolkit.planning.trace import AllocationLog, BatchShape, Trace, choose_shortcuts, trace
from toolkit.split.activation_checkpointing import checkpoint_blocks
from toolkit.split.loss_head import Shortcuts
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split


class MetaSplit:
    """A copy of a meta model with a mask applied, cut below block ``boundary`` as a run does; None leaves it whole.

    Args:
        meta: the meta model.
        mask: mask to apply.
        boundary: number of frozen blocks below the cut.
        packed: True if micro batches are packed.
        shortcuts: shortcuts that the run takes; None chooses them with the first trace.
    """

    def __init__(
        self, meta: MetaModel, mask: LayerMask, boundary: int | None, packed: bool, shortcuts: Shortcuts | None
    ) -> None:
        self.model, self.anatomy = copy.deepcopy(meta.model), meta.anatomy  # applying a mask changes the model
        self.mask, self._boundary, self.shortcuts = mask, boundary, shortcuts
        if packed and self.model.config._attn_implementation == "sdpa":
            set_attention(self.model, VARLEN)
        apply_mask(self.model, mask, self.anatomy)
        self.model.train()
        with _probe_log():
            self.prefix, self.suffix = split(self.model, self.anatomy, boundary)
        if self.prefix is None and mask.tied == "head_only":
            self.suffix.detach_embeddings()
        self._trained = trainable_parameters(self.suffix.model, mask)
        self.tensors = _tensor_sizes(self.prefix, self.suffix, self._trained)
        self._traces: dict[tuple[BatchShape, bool], Trace] = {}

    @property
    def is_cut(self) -> bool:
        """Return False if the mask leaves a frozen prefix that runs inside the suffix."""
        return self.prefix is not None or not self.mask.has_prefix

    @cached_property
    def _checkpointed(self) -> Suffix:
        """Return a second suffix on the same model, with activation checkpointing from the frost line up."""
        with _probe_log():
            _, suffix = split(self.model, self.anatomy, self._boundary)
        checkpoint_blocks(suffix.blocks(self.mask.boundary))
        return suffix

    def trace(self, shape: BatchShape, checkpointing: bool) -> Trace:
        """Trace a micro batch of ``shape``, with or without activation checkpointing; the traces are cached."""
        key = (shape, checkpointing)
        if key not in self._traces:
            if self.shortcuts is None:
                self.shortcuts = choose_shortcuts(self.prefix, self.suffix, shape)
            suffix = self._checkpointed if checkpointing else self.suffix
            suffix.shortcuts = self.shortcuts
            vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
            self._traces[key] = trace(self.prefix, suffix, self._trained.values(), shape, vocabulary)
        return self._traces[key]


def _probe_log() -> AllocationLog:
    """Return a log that answers what ``split``'s probe over two tokens asks of a meta tensor."""
    return AllocationLog(BatchShape(1, 2, 0), set(), ())


def _tensor_sizes(prefix: Prefix | None, suffix: Suffix, trained: dict[str, nn.Parameter]) -> TensorSizes:
    """Return the sizes of trained, frozen and shared tensors of a split model."""

    def storages(module: nn.Module | None) -> dict[int, int]:
        parameters = module.parameters() if module is not None else ()
        return {p.untyped_storage()._cdata: p.numel() for p in parameters}

    below, above, tables = storages(prefix), storages(suffix), embedding_ids(suffix.model)
    return TensorSizes(
        shared=sum(size for storage, size in below.items() if storage in above),
        trained=tuple(parameter.numel() for parameter in trained.values()),
        frozen=tuple(p.numel() for p in suffix.parameters() if not p.requires_grad),
        width=next(suffix.parameters()).element_size(),
        tables=tuple(p.numel() for p in trained.values() if id(p) in tables),
        quantised=quantised_layer_bytes(suffix),
    )
